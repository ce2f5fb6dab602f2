"""What is measured: a model at hand, and the things one asks of it.

In: networks, limits, the length of the recording. Out: voices, requests and utterances whose ids
are random but always the same, and a runner that writes down what it did. It takes no time.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from cosyvoice.config import FRAMES_PER_TOKEN, OURS, TOKENS_HZ, EngineConfig
from cosyvoice.engine.draws import Draws
from cosyvoice.engine.request import Chunk, Hops, Request, Sentence, Utterance
from cosyvoice.engine.runner import Models, Runner
from cosyvoice.engine.script import MIN_TOKENS_PER_TEXT, Plain, plain_items
from cosyvoice.engine.stream import Audio, Stream
from cosyvoice.models.flow import FlowPrompt, Solver

if TYPE_CHECKING:
    from cosyvoice.prompt import Prompt

TEXT_IDS_PER_S = 5  # of a recording's transcript
ENDLESS_TOKENS = 1 << 30

Result = TypeVar("Result")


@dataclass(frozen=True)
class SpokenPrompt:
    """The fields of a `Prompt`, without the libraries that making one of a recording needs."""

    flow: FlowPrompt
    llm_text: tuple[int, ...]
    llm_speech: tuple[int, ...]


@dataclass(frozen=True)
class Subject:
    """A model, and what is asked of it."""

    models: Models
    config: EngineConfig
    prompt_s: float = 5.0

    @property
    def device(self) -> torch.device:
        return self.models.device

    @property
    def n_prompt_tokens(self) -> int:
        return round(self.prompt_s * TOKENS_HZ)

    @property
    def wait(self) -> Callable[[], None]:
        """Until the device has done what it was told."""
        return torch.cuda.synchronize if self.device.type == "cuda" else _nothing

    @cached_property
    def solver(self) -> Solver:
        config = self.config
        with torch.inference_mode():
            return self.models.flow.solver(
                config.flow_steps, cfg_rate=config.cfg_rate, form=self.models.attention
            )

    def under(self, config: EngineConfig) -> "Subject":
        """The same model with other limits."""
        return replace(self, config=config)

    def tokens(self, n: int, seed: int = 0) -> list[int]:
        """Speech tokens."""
        return _ids(n, self.models.flow.config.n_speech_tokens, seed)

    def mel(self, n_frames: int, seed: int = 0) -> Tensor:
        """Log-mel [n, 80] of a plausible size."""
        draw = torch.Generator().manual_seed(seed)
        mel = torch.randn(n_frames, self.models.flow.config.n_mels, generator=draw)
        return mel.to(self.device) - 4

    def voice(self, seed: int = 0) -> FlowPrompt:
        """A voice of `prompt_s` seconds; another seed is another voice."""
        n_tokens = self.n_prompt_tokens
        draw = torch.Generator().manual_seed(seed)
        embedding = torch.randn(self.models.flow.config.embedding_size, generator=draw)
        mel = self.mel(n_tokens * FRAMES_PER_TOKEN, seed)
        return FlowPrompt(tuple(self.tokens(n_tokens, seed)), mel, embedding)

    def request(
        self, *lengths: int, seed: int = 0, voice_seed: int = 0, streaming: bool = True
    ) -> Request:
        """Sentences of exactly that many tokens, all of the same length."""
        assert len(set(lengths)) == 1, lengths
        flow = self.voice(voice_seed)
        words = round(self.prompt_s * TEXT_IDS_PER_S)
        prompt = SpokenPrompt(flow, tuple(self.text_ids(words, voice_seed)), flow.tokens)
        # So many ids that the shortest speech allowed is as long as the longest.
        sentences = [
            Sentence(tuple(self.text_ids(-(-n // MIN_TOKENS_PER_TEXT), seed=1000 + i)))
            for i, n in enumerate(lengths)
        ]
        return Request(
            cast("Prompt", prompt),
            tuple(sentences),
            streaming=streaming,
            seed=seed,
            max_tokens=lengths[0],
        )

    def text_ids(self, n: int, seed: int) -> list[int]:
        return _ids(n, self.models.llm.config.text_vocab_size, seed)

    def utterance(self, n_items: int, seed: int = 0) -> Utterance:
        """An utterance that has n_items to read and never stops by itself."""
        config = self.models.llm.config
        n_text = n_items // 2
        items = plain_items(
            config,
            self.text_ids(n_text, seed),
            prompt_speech=self.tokens(max(0, n_items - n_text - 2), seed),
        )
        script = Plain(config, items[:n_items], min_len=ENDLESS_TOKENS, max_len=ENDLESS_TOKENS)
        request = self.request(MIN_TOKENS_PER_TEXT, seed=seed)
        hops = Hops(self.n_prompt_tokens, self.models.flow.config.block_tokens, OURS)
        stream = Stream(_Deaf(), seed=seed)
        lookahead = self.models.flow.config.lookahead_tokens
        return Utterance(request, stream, 0, script, hops, lookahead, Draws(seed, 0))


class Did(NamedTuple):
    """One step of the engine."""

    kind: str  # prefill, decode or render
    start_s: float
    stop_s: float


@dataclass
class Watch:
    """What others want to hear of a runner's steps."""

    began: dict[str, threading.Event] = field(default_factory=dict)  # by kind of step
    released: threading.Event = field(default_factory=threading.Event)


def on_its_own_thread(work: Callable[[], Result]) -> Result:
    """Do it on a thread that ends: its helpers do not disturb others (`features.one_thread`)."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(work).result()


class WatchedRunner(Runner):
    """A runner that notes each step, and each utterance's tokens as it is freed."""

    def __init__(self, models: Models, config: EngineConfig) -> None:
        super().__init__(models, config)
        self.did: list[Did] = []
        self.tokens: dict[int, list[int]] = {}  # by the request's seed, all its sentences
        self.watch = Watch()

    def read(self, utterance: Utterance, n_items: int) -> None:
        start_s = self._begin("prefill")
        super().read(utterance, n_items)
        self._note("prefill", start_s)

    def write(self, utterances: tuple[Utterance, ...]) -> list[int]:
        kind = "prefill" if len(utterances[0].pending) > 1 else "decode"
        start_s = self._begin(kind)
        drawn = super().write(utterances)
        self._note(kind, start_s)
        return drawn

    def render(self, utterances: Sequence[Utterance], chunks: Sequence[Chunk]) -> list[Audio]:
        start_s = self._begin("render")
        audio = super().render(utterances, chunks)
        self._note("render", start_s)
        return audio

    def release(self, utterance: Utterance) -> None:
        self.tokens.setdefault(utterance.request.seed, []).extend(utterance.tokens)
        super().release(utterance)
        self.watch.released.set()

    def forget(self) -> None:
        """Start the notes anew."""
        self.did = []
        self.tokens = {}

    def shares_s(self) -> dict[str, float]:
        """Seconds by kind of step."""
        kinds = ("prefill", "decode", "render")
        return {k: sum(d.stop_s - d.start_s for d in self.did if d.kind == k) for k in kinds}

    def _begin(self, kind: str) -> float:
        if kind in self.watch.began:
            self.watch.began[kind].set()
        return time.monotonic()

    def _note(self, kind: str, start_s: float) -> None:
        self.did.append(Did(kind, start_s, time.monotonic()))


class _Deaf:
    """Controls of a stream that no engine knows."""

    def say(self, stream: Stream, ids: list[int], *, last: bool) -> None: ...

    def cancel(self, stream: Stream) -> None: ...


def _ids(n: int, n_different: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(n_different, (n,), generator=draw).tolist()
    return ids


def _nothing() -> None:
    """A CPU's work is done when its call returns."""
