"""Stage 2: recordings to what the models hear, and to the input of a zero-shot request.

In: the recordings, a text and a transcript. Out: features as the voice encoder computes them,
and the zero-shot prompt as prompt assembly makes it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cosyvoice import prompt as prompts
from cosyvoice.audio import load_wav
from cosyvoice.config import PROMPT_RATE_HZ, SAMPLE_RATE_HZ
from cosyvoice.features import kaldi_fbank, mel_spectrogram, speaker_features, whisper_mel
from cosyvoice.parity.found import Computed, Fact, Found
from cosyvoice.parity.goldens import INDEX, Part
from cosyvoice.parity.subject import Subject
from cosyvoice.voice import Voice


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """Everything for each recording the notes name."""
    for name, info in part.whole.note("features", "info").items():
        recording = part.recording(info["file"])
        yield from _waveforms(name, recording)
        voice = subject.encoder.encode(recording)
        yield Computed(f"{name}.speech_token", voice.tokens[None])
        yield Computed(f"{name}.embedding", voice.embedding[None])
        for field, value in _zero_shot(part, subject, voice).items():
            yield Computed(f"{name}.zero_shot.{field}", value)


def _waveforms(name: str, recording: Path) -> Iterator[Found]:
    heard = load_wav(recording, PROMPT_RATE_HZ)  # [1, n]
    spoken = load_wav(recording, SAMPLE_RATE_HZ)
    yield Computed(f"{name}.wav16k", heard, is_head=True)
    yield Computed(f"{name}.wav24k", spoken, is_head=True)
    yield Fact(("notes", "features", "info", name, "n16"), heard.shape[1], INDEX)
    yield Fact(("notes", "features", "info", name, "n24"), spoken.shape[1], INDEX)
    yield Computed(f"{name}.mel24k", mel_spectrogram(spoken).transpose(1, 2))
    yield Computed(f"{name}.whisper128", whisper_mel(heard))
    yield Computed(f"{name}.fbank80", kaldi_fbank(heard[0]))
    yield Computed(f"{name}.fbank80_cmn", speaker_features(heard[0]))


def _zero_shot(part: Part, subject: Subject, voice: Voice) -> dict[str, Tensor]:
    """The fields of the reference's model input; lengths are [1], the others have a batch axis."""
    text = subject.tokenizer.encode(part.whole.note("features", "text"))
    transcript = subject.tokenizer.encode(part.whole.note("features", "prompt_text"))
    prompt = prompts.zero_shot(voice, transcript)
    fields = {
        "text": row(text),
        "prompt_text": row(prompt.llm_text),
        "llm_prompt_speech_token": row(prompt.llm_speech),
        "flow_prompt_speech_token": row(prompt.flow.tokens),
        "prompt_speech_feat": prompt.flow.mel[None],  # [1, 2 P, 80]
    }
    lengths = {f"{name}_len": torch.tensor([value.shape[1]]) for name, value in fields.items()}
    # The reference hands the vector to both models, though its LLM does not look at it.
    vector = prompt.flow.embedding[None]
    return {**fields, **lengths, "llm_embedding": vector, "flow_embedding": vector}


def row(ids: list[int] | tuple[int, ...]) -> Tensor:
    """Ids as a batch of one: [1, n] int32."""
    return torch.tensor([list(ids)], dtype=torch.int32)
