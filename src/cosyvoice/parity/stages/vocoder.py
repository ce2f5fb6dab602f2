"""Stage 6: mel to audio: pitch, excitation, the trunk's inside, and audio whole or in pieces.

In: mels and noise. Out: what `Vocoder` makes of them, at once, without its end, and piece by piece.
"""

from collections.abc import Iterator

from torch import Tensor

from cosyvoice.config import FRAME_SAMPLES
from cosyvoice.parity.eavesdrop import Heard, listening
from cosyvoice.parity.found import Computed, Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject

SOURCE = "m_source"
SPECTRUM_READER = "source_downs.0"  # its input is the spectrum of the excitation


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """Every part for which the set has an input."""
    mel = part.tensor("mel")  # [1, 80, T]
    yield from _pitch(subject, mel)
    yield from _whole(part, subject, mel)
    yield from _without_end(subject, mel)
    if "extreme" in part.groups:
        audio = subject.vocoder.decode(part.tensor("extreme.mel"), part.tensor("extreme.source"))
        yield Computed("extreme.wav", audio)
    if "chunked" in part.groups:
        yield from _pieces(part, subject, mel)


def _pitch(subject: Subject, mel: Tensor) -> Iterator[Found]:
    vocoder = subject.vocoder
    f0 = vocoder.pitch(mel)  # [1, T]
    yield Computed("f0_f64", f0)
    yield Computed("f0", f0.float())
    source = vocoder.m_source
    yield Computed("sine_per_frame", source.sines(f0.float(), source.start()))
    yield Computed("uv", source.voiced(f0.float()))


def _whole(part: Part, subject: Subject, mel: Tensor) -> Iterator[Found]:
    vocoder, wanted = subject.vocoder, part.under("final")
    with listening(vocoder, [*wanted, SPECTRUM_READER, SOURCE]) as heard:
        audio = vocoder.extend(vocoder.start(subject.source_noise), mel[0].T, last=True)
    yield Computed("wav_final", audio[None])
    yield Computed("source", heard.outputs.pop(SOURCE))
    yield from _spectrum(heard)
    for path, output in heard.outputs.items():
        yield Computed(f"final.{path}", output)


def _spectrum(heard: Heard) -> Iterator[Found]:
    real, imaginary = heard.inputs[SPECTRUM_READER].chunk(2, dim=1)  # [1, 9, K]
    yield Computed("stft_real", real)
    yield Computed("stft_imag", imaginary)


def _without_end(subject: Subject, mel: Tensor) -> Iterator[Found]:
    vocoder, predictor = subject.vocoder, subject.vocoder.f0_predictor
    f0 = predictor(mel, predictor.start()).float()  # the last frames are seen and not answered
    noise = subject.source_noise.rows(0, f0.shape[1] * FRAME_SAMPLES)
    state = vocoder.start(subject.source_noise, early=False)
    yield Computed("f0_nofinal", f0)
    yield Computed("source_nofinal", vocoder.excite(f0, noise[None]))
    yield Computed("wav_nofinal", vocoder.extend(state, mel[0].T, last=False)[None])


def _pieces(part: Part, subject: Subject, mel: Tensor) -> Iterator[Found]:
    vocoder = subject.vocoder
    state = vocoder.start(subject.source_noise, early=False)
    start, stops = 0, part.whole.note("hift_chunked", "mel_lengths")
    for i, stop in enumerate(stops):
        audio = vocoder.extend(state, mel[0, :, start:stop].T, last=i + 1 == len(stops))
        yield Computed(f"chunked.wav_{i}", audio[None], is_piece=True)
        start = stop
