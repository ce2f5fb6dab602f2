"""The short Fourier transform between samples and the vocoder's columns, in both directions.

Comes in: samples with their surroundings, or columns `[B, 2 F, K]` (F real parts above F imaginary
parts). Goes out: the other one. Column k is centred on sample `hop * k`; the window is a periodic
Hann. Knows no utterance: who calls brings the neighbours on the left and keeps what overlaps.

Symbols: F = n_fft / 2 + 1 bins, K columns.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ShortFourier:
    """Analysis and overlap-add synthesis with one window; both are small fixed convolutions."""

    n_fft: int
    hop_samples: int

    @property
    def margin_samples(self) -> int:
        """How far the outermost columns stick out."""
        return self.n_fft // 2

    @property
    def overlap_samples(self) -> int:
        """How many samples after the last column are unfinished."""
        return self.n_fft - self.hop_samples

    def analyse(self, samples: Tensor) -> Tensor:
        """Columns of `samples` `[B, 1, N]`, the first over the first n_fft of them."""
        kernel = self._waves(samples.device) * self._window(samples.device)
        return F.conv1d(samples, kernel[:, None].to(samples.dtype), stride=self.hop_samples)

    def overlap_add(self, columns: Tensor) -> Tensor:
        """Sum of the windowed inverse transforms, and below it of the squared windows."""
        window = self._window(columns.device)
        # A one-sided spectrum stands for its mirror image too, but for the first and last bin.
        share = torch.full((columns.shape[1] // 2, 1), 2 / self.n_fft, device=columns.device)
        share[0] = share[-1] = 1 / self.n_fft
        kernel = self._waves(columns.device) * window * share.repeat(2, 1)
        pieces = torch.stack(
            [
                columns.transpose(1, 2) @ kernel.to(columns.dtype),
                window.square().to(columns.dtype).expand(len(columns), columns.shape[-1], -1),
            ],
            dim=1,
        )  # [B, 2, K, n_fft]
        return self._overlapped(pieces)

    def _overlapped(self, pieces: Tensor) -> Tensor:
        """Pieces `[B, 2, K, n_fft]` added up, piece k from sample `hop * k` on: `[B, 2, N]`."""
        n_pieces, hop = pieces.shape[2], self.hop_samples
        total = pieces.new_zeros(*pieces.shape[:2], hop * (n_pieces - 1) + self.n_fft)
        for start in range(0, self.n_fft, hop):
            part = pieces[..., start : start + hop].flatten(2)  # [B, 2, hop * K]
            total[..., start : start + hop * n_pieces] += part
        return total

    def _window(self, device: torch.device) -> Tensor:
        return torch.hann_window(self.n_fft, dtype=torch.float64, device=device)  # [n_fft]

    def _waves(self, device: torch.device) -> Tensor:
        """A cosine per bin, then a negative sine per bin."""
        bins = torch.arange(self.n_fft // 2 + 1, dtype=torch.float64, device=device)
        samples = torch.arange(self.n_fft, dtype=torch.float64, device=device)
        angle = torch.outer(bins, samples) * (2 * math.pi / self.n_fft)
        return torch.cat([angle.cos(), -angle.sin()])  # [2 F, n_fft]
