"""The vocoder: seconds of work per second of audio, at once and in pieces.

In: a subject. Out: figures. It knows no flow.
"""

from typing import Any

import torch

from cosyvoice.config import FRAMES_HZ

from .subject import Subject
from .timing import Timing, best_of

AUDIO_S = 4
CHUNK_FRAMES = 50


def figures(subject: Subject, n_repeats: int) -> dict[str, Any]:
    """Per second of audio: a whole utterance, and pieces of 50 frames."""
    whole = _timed(subject, AUDIO_S * FRAMES_HZ, early=False, n_repeats=n_repeats)
    pieces = _timed(subject, CHUNK_FRAMES, early=True, n_repeats=n_repeats)
    return {"per_audio_second": {"offline": whole, "chunks_50": pieces}}


@torch.inference_mode()
def _timed(subject: Subject, n_piece: int, *, early: bool, n_repeats: int) -> Timing:
    vocoder, noise = subject.models.vocoder, subject.models.source_noise
    pieces = subject.mel(AUDIO_S * FRAMES_HZ).split(n_piece)

    def go() -> None:
        state = vocoder.start(noise, early=early)
        for i, piece in enumerate(pieces):
            vocoder.extend(state, piece, last=i == len(pieces) - 1)

    return best_of(go, n=n_repeats, wait=subject.wait).per(AUDIO_S)
