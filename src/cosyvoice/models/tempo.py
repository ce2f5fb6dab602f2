"""Tempo: mel frames in, fewer or more mel frames out, pitch unchanged.

In: mel [T, M] whole or in pieces. Out: mel at another speed. It knows neither flow nor vocoder.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def mel_at_speed(mel: Tensor, speed: float) -> Tensor:
    """Offline change of tempo: mel [T, M] -> [int(T / speed), M] (docs/spec/frontend.md 8)."""
    n = max(1, int(len(mel) / speed))
    return F.interpolate(mel.T[None], size=n, mode="linear", align_corners=False)[0].T


@dataclass(frozen=True)
class WholeTempo:
    """The offline change of tempo, for a mel that comes in one piece."""

    speed: float

    def extend(self, mel: Tensor, last: bool) -> Tensor:
        assert last, "the offline change of tempo takes the whole mel at once"
        return mel_at_speed(mel, self.speed) if len(mel) else mel


@dataclass
class Tempo:
    """Change of tempo in a stream: the mel is read at the exact step `speed`.

    Output frame j stands at (j + 0.5) * speed - 0.5, between two input frames. Any cut of the
    input gives the same output; at the end int(T / speed) frames have come out, as offline.
    """

    speed: float
    held: Tensor | None = None  # [n, M]: input frames still needed
    n_dropped: int = 0  # input frames before `held`
    n_read: int = 0  # output frames so far

    def extend(self, mel: Tensor, last: bool) -> Tensor:
        held = mel if self.held is None else torch.cat([self.held, mel])
        n_known = self.n_dropped + len(held)
        if last:
            stop = max(int(n_known / self.speed), 1 if n_known else 0)
        else:  # both neighbours of the last output must be known
            stop = max(self.n_read, math.floor((n_known - 0.5) / self.speed - 0.5))
        out = self._read(held, self.n_read, stop)
        self.n_read = stop
        n_done = max(0, min(math.floor(self._position(stop)) - 1, n_known) - self.n_dropped)
        self.held, self.n_dropped = held[n_done:], self.n_dropped + n_done
        return out

    def _position(self, j: int) -> float:
        return max(0.0, (j + 0.5) * self.speed - 0.5)

    def _read(self, held: Tensor, start: int, stop: int) -> Tensor:
        j = torch.arange(start, stop, dtype=torch.float64)
        at = ((j + 0.5) * self.speed - 0.5).clamp(min=0) - self.n_dropped
        left = at.floor().long().clamp(max=max(0, len(held) - 1))
        right = (left + 1).clamp(max=max(0, len(held) - 1))
        share = (at - left).clamp(0, 1).to(held.dtype)[:, None].to(held.device)
        left, right = left.to(held.device), right.to(held.device)
        return held[left] * (1 - share) + held[right] * share
