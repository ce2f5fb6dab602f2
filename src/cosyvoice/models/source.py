"""What the vocoder is driven with: the pitch of the mel, and the sines that follow it.

Comes in: mel `[B, 80, T]`, then pitch `[B, T]` and the noise of the samples. Goes out: pitch in Hz,
then the excitation `[B, 1, n]` at 24 kHz. The pitch is computed in float64 and the phase is summed
in float64, for the phase grows to 1e5 and each rounding would be heard.
Knows nothing of the trunk that turns the excitation into speech.

Symbols: T frames, H sines.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosyvoice.config import FRAME_SAMPLES, SAMPLE_RATE_HZ, VocoderConfig

from .convolution import CausalConv

UNVOICED_SHARE = 3  # noise without a voice has a third of the sines' amplitude


class F0Predictor(nn.Module):
    """Pitch per frame, in float64. The first layer looks ahead, the others back."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        width = config.f0_channels
        first = nn.Conv1d(config.n_mels, width, config.f0_lookahead_frames + 1)
        others = [
            CausalConv(width, width, config.f0_kernel_size) for _ in range(config.n_f0_layers - 1)
        ]
        # Even names, as in the checkpoint: the odd ones are activations.
        self.condnet = nn.ModuleDict({str(2 * i): c for i, c in enumerate([first, *others])})
        self.classifier = nn.Linear(width, 1)
        self.double()

    def start(self, n_batch: int = 1) -> list[Tensor]:
        """The past of the layers that look back."""
        return [conv.start(n_batch) for conv in self._backward_layers()]

    def forward(self, mel: Tensor, pasts: list[Tensor]) -> Tensor:
        """Pitch of all but the last frames, which are lookahead only."""
        x = F.elu(self.condnet["0"](mel.to(self.classifier.weight.dtype)))
        for conv, past in zip(self._backward_layers(), pasts, strict=True):
            x = F.elu(conv(x, past))
        return self.classifier(x.transpose(1, 2)).squeeze(-1).abs()  # [B, T] Hz

    def _backward_layers(self) -> list[CausalConv]:
        return cast("list[CausalConv]", list(self.condnet.values())[1:])


class HarmonicSource(nn.Module):
    """Sines at the multiples of the pitch, held for a frame each, noise, and their mixture."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        self.sine_amplitude = config.sine_amplitude
        self.noise_std = config.noise_std
        self.voiced_threshold_hz = config.voiced_threshold_hz
        self.n_sines = config.n_sines
        self.l_linear = nn.Linear(self.n_sines, 1)

    def start(self, n_batch: int = 1) -> Tensor:
        """Phase of each sine before the first frame, in turns per sample."""
        shape = (n_batch, 1, self.n_sines)
        return self.l_linear.weight.new_zeros(shape, dtype=torch.float64)

    @torch.no_grad()
    def sines(self, f0: Tensor, phase: Tensor) -> Tensor:
        """One value per frame for each sine, `[B, T, H]`, from pitch `[B, T]`; advances `phase`."""
        multiples = torch.arange(1, self.n_sines + 1, device=f0.device, dtype=f0.dtype)
        turns = (f0[..., None] * multiples / SAMPLE_RATE_HZ) % 1  # [B, T, H], of one sample
        # Summed in float64 and each sum rounded, then scaled in this order: as the published model.
        total = torch.cat([phase, turns.double()], dim=1).cumsum(dim=1)  # [B, 1 + T, H]
        phase.copy_(total[:, -1:])
        angle = total[:, 1:].to(f0.dtype) * 2 * math.pi * FRAME_SAMPLES
        return self.sine_amplitude * angle.sin()  # [B, T, H]

    def voiced(self, f0: Tensor) -> Tensor:
        """1 where the frame has a pitch, else 0."""
        return (f0 > self.voiced_threshold_hz).to(f0.dtype)[..., None]  # [B, T, 1]

    def forward(self, f0: Tensor, phase: Tensor, noise: Tensor) -> Tensor:
        """The excitation; `noise` is `[B, FRAME_SAMPLES * T, H]`. No gradient reaches the pitch."""
        voiced = self.voiced(f0)
        sines = voiced * self.sines(f0, phase)
        unvoiced_std = self.sine_amplitude / UNVOICED_SHARE
        std = voiced * self.noise_std + (1 - voiced) * unvoiced_std
        noise = noise.unflatten(1, (-1, FRAME_SAMPLES))  # [B, T, 480, H]
        mixed = torch.addcmul(sines[:, :, None], std[:, :, None], noise)
        return self.l_linear(mixed).flatten(1).tanh()[:, None]  # [B, 1, 480 T]
