"""The two noise buffers that no checkpoint holds, drawn as the published model draws them.

Comes in: the sizes of the model. Goes out: the flow's initial state and, row by row, the noise of
the vocoder's harmonic source. Both stand in one sequence of the CPU generator, started from seed 0,
with the throw-away initialisation of a few layers between them (docs/spec/checkpoint.md section 8).
Draws from generators of its own: torch's global random state is neither read nor moved.

Symbols: T frames, N samples, H harmonics.
"""

import torch
from torch import Tensor

from cosyvoice.config import MAX_FLOW_FRAMES, SAMPLE_RATE_HZ, FlowConfig, ModelConfig, VocoderConfig
from cosyvoice.errors import BadRequest

SEED = 0
MAX_SOURCE_S = 300
MAX_SOURCE_SAMPLES = MAX_SOURCE_S * SAMPLE_RATE_HZ  # 7 200 000 rows
FIRST_DRAW_SAMPLES = 10 * SAMPLE_RATE_HZ  # most sentences need no second draw


def flow_noise(n_frames: int = MAX_FLOW_FRAMES, *, n_mels: int = FlowConfig.n_mels) -> Tensor:
    """The initial state of the flow for frames 0..T-1, prompt included: normal, `[n_mels, T]`."""
    noise = _draw_flow_noise(torch.Generator().manual_seed(SEED), n_mels)
    return noise[:, :n_frames].clone()  # [n_mels, T]


class SourceNoise:
    """Rows of the harmonic source's noise, uniform on [0, 1); row n belongs to sample n.

    Rows are drawn when first asked for, and kept. One thread at a time.
    """

    def __init__(self, rows: Tensor, *, generator: torch.Generator | None = None) -> None:
        self._rows = rows  # [N, H]: drawn so far
        self._generator = generator  # draws the rows that follow; None: there are no more

    @classmethod
    def published(cls, config: ModelConfig, *, device: torch.device | str = "cpu") -> "SourceNoise":
        """The noise that the published model was made with, for these sizes."""
        generator = torch.Generator().manual_seed(SEED)
        _draw_flow_noise(generator, config.flow.n_mels)
        _skip_layers(generator, config.flow, config.vocoder)
        n_sines = config.vocoder.n_sines
        _skip_uniform(generator, n_sines)  # the initial phases, which reach no sample
        return cls(torch.empty(0, n_sines, device=device), generator=generator)

    @property
    def n_max_samples(self) -> int:
        return len(self._rows) if self._generator is None else MAX_SOURCE_SAMPLES

    def rows(self, start: int, stop: int) -> Tensor:
        """The noise of samples start..stop-1; BadRequest beyond the end of the buffer."""
        if stop > self.n_max_samples:
            limit_s = self.n_max_samples / SAMPLE_RATE_HZ
            raise BadRequest(f"the audio is longer than {limit_s:g} s; split the text")
        if stop > len(self._rows):
            self._draw(stop)
        return self._rows[start:stop]  # [N, H]

    def _draw(self, n_wanted: int) -> None:
        n_drawn, n_sines = self._rows.shape
        n_rows = min(max(n_wanted, 2 * n_drawn, FIRST_DRAW_SAMPLES), self.n_max_samples)
        # The fill is sequential, so drawing on continues the one large buffer.
        new = torch.rand(n_rows - n_drawn, n_sines, generator=self._generator)
        self._rows = torch.cat([self._rows, new.to(self._rows.device)])


def _draw_flow_noise(generator: torch.Generator, n_mels: int) -> Tensor:
    # Always all of it: a shorter draw has other values, and leaves the generator elsewhere.
    return torch.randn(n_mels, MAX_FLOW_FRAMES, generator=generator)  # [n_mels, T]


def _skip_layers(generator: torch.Generator, flow: FlowConfig, vocoder: VocoderConfig) -> None:
    """Advance as the default initialisers of the layers do that are built in between."""
    torch.randn(flow.n_speech_tokens, flow.n_mels, generator=generator)  # Embedding
    _skip_affine(generator, flow.n_mels, flow.embedding_size)  # speaker projection
    width = vocoder.f0_channels
    _skip_affine(generator, width, vocoder.n_mels * (vocoder.f0_lookahead_frames + 1))
    for _ in range(vocoder.n_f0_layers - 1):
        _skip_affine(generator, width, width * vocoder.f0_kernel_size)
    _skip_affine(generator, 1, width)  # F0 classifier


def _skip_affine(generator: torch.Generator, n_out: int, fan_in: int) -> None:
    """A Linear or Conv1d draws its weight, then its bias, uniformly."""
    _skip_uniform(generator, n_out * fan_in)
    _skip_uniform(generator, n_out)


def _skip_uniform(generator: torch.Generator, n_draws: int) -> None:
    torch.rand(n_draws, generator=generator)
