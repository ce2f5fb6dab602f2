"""The Python door: the reference's class and methods, over one engine.

In: the reference's arguments. Out: generators of `{"tts_speech": float32 tensor [1, n]}` at 24 kHz.
Scripts written for the reference run unchanged; `speak` is the same for those who want a `Stream`.
It knows no protocol and no tensor inside the models.
"""

import logging
import threading
import weakref
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from cosyvoice.audio import Source
from cosyvoice.config import OURS, REFERENCE, SAMPLE_RATE_HZ, EngineConfig
from cosyvoice.engine.engine import Engine
from cosyvoice.engine.loading import load_models
from cosyvoice.engine.runner import Runner
from cosyvoice.engine.stream import Stream
from cosyvoice.errors import BadRequest, Cancelled, ModelFilesError
from cosyvoice.frontend import FrontEnd, Order
from cosyvoice.models.checkpoint import resolve_model_dir
from cosyvoice.spk2info import read_spk2info, write_spk2info
from cosyvoice.text import Tokenizer
from cosyvoice.voice import VoiceEncoder
from cosyvoice.voicebook import VoiceBook, default_voice_dir

log = logging.getLogger(__name__)

Text = str | Iterable[str]
Speech = Generator[dict[str, Tensor], None, None]
TextFrontend = bool | Literal["reference"]

SPK2INFO_FILE = "spk2info.pt"
MAX_SEED = 2**63 - 1


class CosyVoice3:
    """A model, ready to speak.

    model_dir: a directory in the published layout; None takes `COSYVOICE_MODEL_DIR`, then
    `pretrained_models/Fun-CosyVoice3-0.5B`, then the bundled voice model.
    fp16: 16-bit weights where the device has them. load_trt, load_vllm, trt_concurrent: accepted
    for the reference's scripts; this engine needs none of them.
    compat: "reference" turns every deliberate difference off.
    Raises ModelFilesError where a file is missing or broken.
    """

    sample_rate = SAMPLE_RATE_HZ

    def __init__(
        self,
        model_dir: str | Path | None = None,
        load_trt: bool = False,
        load_vllm: bool = False,
        fp16: bool = False,
        trt_concurrent: int = 1,
        *,
        use_rl: bool = True,
        compat: Literal["ours", "reference"] = "ours",
        device: str = "auto",
        dtype: str = "auto",
        voices_dir: str | Path | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        if compat not in ("ours", "reference"):
            raise BadRequest(f"compat is 'ours' or 'reference', not {compat!r}")
        if load_trt or load_vllm:
            log.warning("load_trt and load_vllm change nothing: one engine of our own runs it all")
        rules = REFERENCE if compat == "reference" else OURS
        config = replace(engine or EngineConfig(), rules=rules)
        self.model_dir, self.model_note = resolve_model_dir(model_dir)
        chosen = _dtype(dtype, fp16=fp16)
        with ThreadPoolExecutor(max_workers=1) as loader:  # see `features.one_thread`
            runner = loader.submit(
                lambda: Runner(
                    load_models(self.model_dir, device=device, dtype=chosen, use_rl=use_rl), config
                )
            ).result()
        encoder = VoiceEncoder(self.model_dir, device=runner.models.device)
        self.frontend = FrontEnd(
            tokenizer=Tokenizer(self.model_dir),
            encoder=encoder,
            book=VoiceBook(Path(voices_dir or default_voice_dir()), encoder),
            rules=config.rules,
        )
        spk2info = self.model_dir / SPK2INFO_FILE
        if spk2info.exists():
            self.frontend.spk2info.update(read_spk2info(spk2info))
        self._check_vocabulary(runner.llm_config.text_vocab_size)
        self.model = Engine(runner, config)
        # Whoever forgets to close it does not keep the networks for ever.
        weakref.finalize(self, self.model.close).atexit = False

    def _check_vocabulary(self, n_rows: int) -> None:
        n_ids = len(self.frontend.tokenizer)
        if n_ids > n_rows:
            raise ModelFilesError(
                f"{self.model_dir}: the tokenizer has {n_ids} ids, the text table {n_rows} rows: "
                "vocab.json and config.json of CosyVoice-BlankEN do not belong together"
            )

    def close(self) -> None:
        """Stop the engine; unfinished streams raise Cancelled."""
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def speak(self, order: Order) -> Stream:
        """Start speaking; the stream gives audio as it is made.

        Raises BadRequest, VoiceNotFound and Overloaded.
        """
        return self.model.submit(self.frontend.request(order))

    def convert(
        self, source: Source, prompt: Source, *, streaming: bool = False, speed: float = 1.0
    ) -> Stream:
        """Voice conversion: the words of `source` in the voice of `prompt`."""
        return self.model.submit(
            self.frontend.conversion(source, prompt, streaming=streaming, speed=speed)
        )

    # Voices.

    def list_available_spks(self) -> list[str]:
        """Names of all stored voices."""
        return self.frontend.voice_names()

    def add_zero_shot_spk(
        self, prompt_text: str, prompt_wav: Source, zero_shot_spk_id: str
    ) -> bool:
        """Keep a voice under a name, in memory, its text as it is; `save_spkinfo` writes it."""
        if not zero_shot_spk_id:
            raise BadRequest("give the voice a name: zero_shot_spk_id is empty")
        ids = tuple(self.frontend.tokenizer.encode(prompt_text))
        voice = self.frontend.encoder.encode(prompt_wav).aligned()
        self.frontend.spk2info[zero_shot_spk_id] = replace(voice, transcript="", transcript_ids=ids)
        return True

    def save_spkinfo(self) -> None:
        """Write all voices of this model, added ones included, to `<model_dir>/spk2info.pt`."""
        write_spk2info(self.model_dir / SPK2INFO_FILE, self.frontend.spk2info)

    # The reference's methods. `seed`: None draws one from torch's global CPU generator.

    def inference_zero_shot(
        self,
        tts_text: Text,
        prompt_text: str,
        prompt_wav: Source | None,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: TextFrontend = True,
        *,
        seed: int | None = None,
    ) -> Speech:
        """Speak in the voice of a recording and go on as it began."""
        order = replace(
            _order(stream, speed, text_frontend, seed=seed),
            mode="zero_shot",
            voice=zero_shot_spk_id,
            recording=prompt_wav,
            transcript=prompt_text,
        )
        return self._speech(tts_text, order)

    def inference_cross_lingual(
        self,
        tts_text: Text,
        prompt_wav: Source | None,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: TextFrontend = True,
        *,
        seed: int | None = None,
    ) -> Speech:
        """Speak another language in the voice of a recording."""
        order = replace(
            _order(stream, speed, text_frontend, seed=seed),
            mode="cross_lingual",
            voice=zero_shot_spk_id,
            recording=prompt_wav,
        )
        return self._speech(tts_text, order)

    def inference_instruct2(
        self,
        tts_text: Text,
        instruct_text: str,
        prompt_wav: Source | None,
        zero_shot_spk_id: str = "",
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: TextFrontend = True,
        *,
        seed: int | None = None,
    ) -> Speech:
        """Speak in the voice of a recording, in the manner the instruction asks for."""
        order = replace(
            _order(stream, speed, text_frontend, seed=seed),
            mode="instruct2",
            voice=zero_shot_spk_id,
            recording=prompt_wav,
            instruction=instruct_text,
        )
        return self._speech(tts_text, order)

    def inference_sft(
        self,
        tts_text: Text,
        spk_id: str,
        stream: bool = False,
        speed: float = 1.0,
        text_frontend: TextFrontend = True,
        *,
        seed: int | None = None,
    ) -> Speech:
        """Speak in a stored voice."""
        order = replace(_order(stream, speed, text_frontend, seed=seed), mode="sft", voice=spk_id)
        return self._speech(tts_text, order)

    def inference_vc(
        self, source_wav: Source, prompt_wav: Source, stream: bool = False, speed: float = 1.0
    ) -> Speech:
        """Say what the source says, in the voice of the prompt."""
        yield from _tensors(self.convert(source_wav, prompt_wav, streaming=stream, speed=speed))

    def _speech(self, text: Text, order: Order) -> Speech:
        if isinstance(text, str):
            yield from _tensors(self.speak(replace(order, text=text)))
            return
        stream = self.speak(order)
        threading.Thread(target=_feed, args=(stream, text), daemon=True).start()
        yield from _tensors(stream)


# The reference's factory. There is one model family, so there is nothing to choose.
AutoModel = CosyVoice3


def _order(stream: bool, speed: float, text_frontend: TextFrontend, *, seed: int | None) -> Order:
    if seed is None:
        seed = int(torch.randint(0, MAX_SEED, (), device="cpu"))
    return Order(text=None, seed=seed, streaming=stream, speed=speed, text_frontend=text_frontend)


def _dtype(name: str, *, fp16: bool) -> str:
    """The reference's `fp16=True` means 16 bits on a GPU and nothing on a CPU."""
    if not fp16 or name != "auto":
        return name
    return "fp16" if torch.cuda.is_available() else "auto"


def _tensors(stream: Stream) -> Speech:
    with stream:
        for samples in stream:
            yield {"tts_speech": torch.from_numpy(samples)[None]}  # [1, n]


def _feed(stream: Stream, pieces: Iterable[str]) -> None:
    """Read the caller's pieces of text to a stream; their error becomes the stream's."""
    try:
        for piece in pieces:
            stream.say(piece)
        stream.end_text()
    except Cancelled:
        return  # the listener has left
    except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
        stream.end(error)
