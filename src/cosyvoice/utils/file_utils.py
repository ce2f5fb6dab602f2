"""`load_wav`, where the reference's scripts look for it."""

from torch import Tensor

from cosyvoice import audio
from cosyvoice.audio import Source


def load_wav(wav: Source, target_sr: int, min_sr: int = 16_000) -> Tensor:
    """A recording as float32 [1, n] at `target_sr` Hz; BadRequest below `min_sr`."""
    return audio.load_wav(wav, target_sr, min_sr)
