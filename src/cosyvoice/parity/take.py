"""One utterance, really spoken by the model under test, and the inputs a set takes from it.

In: a recording, its transcript, a text, a seed. Out: a `Take`, and through `give` the given
tensors, documents and notes of a set; what stages compute of them is recorded elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from cosyvoice.audio import Recording
from cosyvoice.config import (
    FRAME_SAMPLES,
    FRAMES_PER_TOKEN,
    MAX_SILENT_RUN_TOKENS,
    OURS,
    SILENT_TOKENS,
    TOKEN_SAMPLES,
    LLMConfig,
)
from cosyvoice.engine.request import Request
from cosyvoice.errors import BadRequest
from cosyvoice.frontend import Order
from cosyvoice.text import complete_transcript

from .eavesdrop import Performance, listening, perform
from .goldens import INDEX, GoldenSet
from .kinds import RECORDING, kinds
from .subject import Subject

EXCITATION = "m_source"  # the vocoder's part that makes it
DIT_TIME = 0.3  # at which the DiT's inside is recorded
MAX_VOCODER_FRAMES = 60  # of mel whose way through the vocoder is recorded
N_SCORES = 8  # score vectors recorded for the sampler
N_SCHEDULE_TOKENS = 130  # of the long stream: three chunks or more after any prompt
N_LOGP_CALLS = 4  # of text-in, whose log-probabilities are recorded
LOUDER = 5.0  # log-mel added, so that magnitudes and samples are clipped
MAX_RMS_DIFFERENCE = 1e-2  # of waveforms, as in the published sets

TOKENIZER_DOCUMENT = "1_tokenizer.json"
LLM_DOCUMENT = "3_llm.json"
SAMPLING_DOCUMENT = "4_sampling.json"
TEXT_DOCUMENT = "8_text.json"
LLM_TENSORS = "3_llm.safetensors"
SAMPLING_TENSORS = "4_sampling.safetensors"

PARAMS: dict[str, dict[str, Any]] = {
    "dit_full": {"t": DIT_TIME, "attention": "full"},
    "dit_streaming": {"t": DIT_TIME, "attention": "block-causal"},
    "e2e": {"prompt": RECORDING},
    "speed": {"prompt": RECORDING, "speed": 1.3, "stream": False},
    "silent": {"prompt": RECORDING, "stream": False},
    "short_stream": {"prompt": RECORDING, "tokens": "7_e2e:tokens[:9]", "stream": True},
    "vc": {"source": RECORDING, "prompt": RECORDING},
    "waveform_rms": {
        "applies_to": "7_e2e *.wav*, 6_hift waveforms",
        "max_rms_difference": MAX_RMS_DIFFERENCE,
    },
}


@dataclass(frozen=True)
class Line:
    """What is to be said, and after which recording."""

    recording: Recording
    transcript: str
    text: str
    seed: int


@dataclass(frozen=True)
class Take:
    """How it was said."""

    line: Line
    segment: str  # the first one of the text, normalised
    request: Request
    performance: Performance
    excitation: Tensor  # [1, 1, 480 T]

    @property
    def transcript(self) -> str:
        return complete_transcript(self.line.transcript)

    @property
    def text_ids(self) -> tuple[int, ...]:
        return self.request.sentences[0].ids

    @property
    def n_frames(self) -> int:
        return self.performance.mel.shape[2]


def speak(subject: Subject, line: Line) -> Take:
    """Say the first segment, the language model drawing as it does in service."""
    segments = subject.front_end.text.segments(line.text)
    if not segments:
        raise BadRequest("there is nothing to speak: give a text with letters or digits")
    subject.encoder.encode(line.recording)  # refused here, it is called by its name
    order = Order(
        text=segments[0],
        seed=line.seed,
        recording=line.recording.data,
        transcript=complete_transcript(line.transcript),
        mode="zero_shot",
    )
    request = subject.front_end.request(order)
    request = replace(request, sentences=request.sentences[:1])
    with listening(subject.vocoder, [EXCITATION]) as heard:
        performance = perform(subject.models, request, rules=OURS)
    return Take(line, segments[0], request, performance, heard.outputs[EXCITATION])


def give(goldens: GoldenSet, subject: Subject, take: Take, *, prompt_file: str) -> None:
    """Put everything into the set that is given to the stages and not computed by them."""
    said = {"text": take.segment, "prompt_text": take.transcript}
    n_frames = min(take.n_frames, MAX_VOCODER_FRAMES)
    goldens.notes |= {
        "features": {"info": {RECORDING: {"file": prompt_file}}, **said},
        "e2e": {**said, "seed": take.line.seed, "n_tokens": len(take.performance.tokens)},
        "hift_chunked": {"mel_lengths": [n_frames // 2, n_frames]},
    }
    goldens.params |= PARAMS
    goldens.documents |= _documents(subject, take) | {INDEX: {"notes": goldens.notes}}
    goldens.tensors |= {
        LLM_TENSORS: _written(take),
        "5_flow.safetensors": _flowing(subject, take),
        "6_hift.safetensors": _voiced(take, n_frames),
        "7_e2e.safetensors": _spoken(take),
        "noise.safetensors": _noise(subject, take),
    }
    goldens.specs |= kinds(subject.config)


def give_scores(goldens: GoldenSet) -> None:
    """Some of the scores stage 3 has computed become inputs of the sampler."""
    llm = goldens.tensors[LLM_TENSORS]
    scores, forced = llm["uni.logp"], llm["uni.forced"]
    steps = torch.linspace(0, len(forced), min(N_SCORES, len(scores))).long().unique().tolist()
    goldens.tensors[SAMPLING_TENSORS] = {
        name: tensor
        for i, step in enumerate(steps)
        for name, tensor in (
            (f"logits_{i:02d}", scores[step]),
            (f"history_{i:02d}", forced[:step]),
        )
    }
    goldens.documents[SAMPLING_DOCUMENT] = [
        {"desc": f"draw {step}", "fallback_index": 0} for step in steps
    ]


def _documents(subject: Subject, take: Take) -> dict[str, Any]:
    texts = dict.fromkeys((take.line.text, take.segment, take.transcript))
    draws = _draws(subject.config.llm, take)
    return {
        TOKENIZER_DOCUMENT: {"strings": [{"text": text} for text in texts]},
        LLM_DOCUMENT: {"cases": {"uni": {}, "bistream": {"sampled": draws}}},
        TEXT_DOCUMENT: {"rows": [{"text": take.line.text}]},
    }


def _draws(config: LLMConfig, take: Take) -> list[int]:
    """What text-in is made to say: its own tokens over and over, until all text must be read."""
    n_text, n_speech = config.mix_ratio
    n_ids = len(take.request.prompt.llm_text) + len(take.text_ids)
    n_draws = n_speech * (n_ids // n_text + 1) + 1
    return [*_repeated(take.performance.tokens, n_draws), config.eos]


def _written(take: Take) -> dict[str, Tensor]:
    prompt = take.request.prompt
    given = {
        "text": ids(take.text_ids)[None],
        "prompt_text": ids(prompt.llm_text)[None],
        "prompt_speech_token": ids(prompt.llm_speech)[None],
    }
    plain, text_in = (
        {f"{case}.{name}": tensor for name, tensor in given.items()} for case in ("uni", "bistream")
    )
    return {
        **plain,
        "uni.forced": ids(take.performance.tokens),
        **text_in,
        "bistream.logp_calls": ids(range(N_LOGP_CALLS)),
    }


def _flowing(subject: Subject, take: Take) -> dict[str, Tensor]:
    prompt, tokens = take.request.prompt.flow, take.performance.tokens
    given = {"prompt_token": ids(prompt.tokens)[None], "prompt_feat": prompt.mel[None]}
    n_tokens = max(len(tokens), N_SCHEDULE_TOKENS)
    n_frames = len(prompt.mel) + FRAMES_PER_TOKEN * n_tokens
    return {
        **given,
        "token": ids(tokens)[None],
        "embedding": prompt.embedding[None],
        "rand_noise": subject.own_flow_noise[None, :, :n_frames],
        **{f"schedule.{name}": tensor for name, tensor in given.items()},
        "schedule.token": ids(_repeated(tokens, N_SCHEDULE_TOKENS))[None],
    }


def _voiced(take: Take, n_frames: int) -> dict[str, Tensor]:
    mel = take.performance.mel[:, :, :n_frames]
    source = take.excitation[:, :, : n_frames * FRAME_SAMPLES]
    return {"mel": mel, "extreme.mel": mel + LOUDER, "extreme.source": source}


def _spoken(take: Take) -> dict[str, Tensor]:
    tokens = ids(take.performance.tokens)
    return {"tokens": tokens, "speed.tokens": tokens, "silent.tokens_in": ids(_with_pauses(take))}


def _with_pauses(take: Take) -> list[int]:
    """The utterance between two silences, each longer than is kept."""
    pause = [min(SILENT_TOKENS)] * (MAX_SILENT_RUN_TOKENS + 3)
    return [*pause, *take.performance.tokens, *pause]


def _noise(subject: Subject, take: Take) -> dict[str, Tensor]:
    """As much as the longest case needs: one with pauses, or voice conversion."""
    n_tokens = max(len(_with_pauses(take)), len(take.request.prompt.flow.tokens) + 1)
    return {"sine_waves": subject.source_noise.rows(0, n_tokens * TOKEN_SAMPLES)[None]}


def _repeated(tokens: Sequence[int], n: int) -> list[int]:
    return list(islice(cycle(tokens), n))


def ids(values: Sequence[int]) -> Tensor:
    """[n] int32."""
    return torch.tensor(list(values), dtype=torch.int32)
