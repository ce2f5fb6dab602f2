"""One utterance, really spoken by the model under test, and the inputs a set takes from it.

In: a recording, its transcript, a text, a seed. Out: a `Take`, and through `give` the given
tensors, documents and notes of a set; what stages compute of them is recorded elsewhere.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cosyvoice.audio import Recording
from cosyvoice.config import FRAME_SAMPLES, OURS
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
    goldens.documents |= _documents(take) | {INDEX: {"notes": goldens.notes}}
    goldens.tensors |= _tensors(subject, take)
    goldens.tensors["6_hift.safetensors"] = {"mel": take.performance.mel[:, :, :n_frames]}
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


def _documents(take: Take) -> dict[str, Any]:
    texts = dict.fromkeys((take.line.text, take.segment, take.transcript))
    return {
        TOKENIZER_DOCUMENT: {"strings": [{"text": text} for text in texts]},
        LLM_DOCUMENT: {"cases": {"uni": {}}},
        TEXT_DOCUMENT: {"rows": [{"text": take.line.text}]},
    }


def _tensors(subject: Subject, take: Take) -> dict[str, dict[str, Tensor]]:
    prompt, tokens = take.request.prompt, take.performance.tokens
    n_flow_frames = len(prompt.flow.mel) + take.n_frames
    noise = subject.source_noise.rows(0, take.n_frames * FRAME_SAMPLES)
    return {
        LLM_TENSORS: {
            "uni.text": ids(take.text_ids)[None],
            "uni.prompt_text": ids(prompt.llm_text)[None],
            "uni.prompt_speech_token": ids(prompt.llm_speech)[None],
            "uni.forced": ids(tokens),
        },
        "5_flow.safetensors": {
            "token": ids(tokens)[None],
            "prompt_token": ids(prompt.flow.tokens)[None],
            "prompt_feat": prompt.flow.mel[None],
            "embedding": prompt.flow.embedding[None],
            "rand_noise": subject.own_flow_noise[None, :, :n_flow_frames],
        },
        "7_e2e.safetensors": {"tokens": ids(tokens)},
        "noise.safetensors": {"sine_waves": noise[None]},
    }


def ids(values: tuple[int, ...] | list[int]) -> Tensor:
    """[n] int32."""
    return torch.tensor(list(values), dtype=torch.int32)
