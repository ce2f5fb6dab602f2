"""Mel to 24 kHz audio, at once or as the mel arrives.

Comes in: mel frames (natural log, 50 Hz), in pieces of any length. Goes out: 480 samples per frame,
the same whatever the pieces, because all that a piece needs of the past is carried in the state.
Only three things look ahead: the pitch (3 frames), the first convolution (4 frames), half a Fourier
window. Knows nothing of tokens or text.

Symbols: T frames, N samples, K spectrum columns (120 per frame, and one before the first).
"""

from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cosyvoice.config import FRAME_SAMPLES, VocoderConfig

from .convolution import CausalConv, CausalUpsample, ResidualBlock
from .noise import SourceNoise
from .source import F0Predictor, HarmonicSource
from .spectrum import ShortFourier

MAX_MAGNITUDE = 100.0
MAX_PIECE_FRAMES = 100  # bounds memory; and what fits a CPU's caches is faster
POST_SLOPE = 0.01  # before conv_post; elsewhere the configured slope


@dataclass(frozen=True)
class Piece:
    """Frames start..stop-1 of an utterance, rendered together."""

    start: int
    stop: int
    is_last: bool

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def source_start(self) -> int:
        return 0 if self.is_first else self.start + 1

    @property
    def source_stop(self) -> int:
        """One frame more, for the last column reaches into it; at the end there is none."""
        return self.stop if self.is_last else self.stop + 1


@dataclass
class TrunkState:
    """The past of each convolution of the trunk, named as the layers are."""

    ups: list[Tensor]
    source_downs: list[Tensor]
    source_resblocks: list[list[Tensor]]
    resblocks: list[list[Tensor]]
    conv_post: Tensor


@dataclass
class VocoderState:
    """What one utterance carries from piece to piece: the same size at any time, batch first."""

    noise: SourceNoise
    delay_frames: int  # mel frames that must follow one before it is rendered
    n_frames: int  # received
    n_rendered_frames: int
    mel: Tensor  # [1, 80, delay]: the last frames received
    f0: list[Tensor]  # past of the F0 predictor's layers
    phase: Tensor  # [1, 1, H] float64
    source: Tensor  # [1, 1, N]: excitation that the next column needs, to the end of what is made
    trunk: TrunkState
    overlap: Tensor  # [1, 2, N]: audio whose columns are not all there, and its weight
    held: Tensor  # [1, N]: finished audio that the reference would not have finished yet


class Vocoder(nn.Module):
    """The causal HiFT generator; parameters are named as in the folded checkpoint."""

    def __init__(self, config: VocoderConfig) -> None:
        super().__init__()
        n_frame_samples = config.columns_per_frame * config.hop_samples
        assert n_frame_samples == FRAME_SAMPLES, (config.upsample_rates, config.hop_samples)
        self.config = config
        self.fourier = ShortFourier(config.n_fft, config.hop_samples)
        self.f0_predictor = F0Predictor(config)
        self.m_source = HarmonicSource(config)
        base = config.base_channels
        self.conv_pre = nn.Conv1d(config.n_mels, base, config.lookahead_frames + 1)
        # Typed by what they hold, which ModuleList does not tell.
        self.ups = cast("list[CausalUpsample]", nn.ModuleList())
        self.source_downs = cast("list[CausalConv]", nn.ModuleList())
        self.source_resblocks = cast("list[ResidualBlock]", nn.ModuleList())
        self.resblocks = cast("list[ResidualBlock]", nn.ModuleList())
        for stage in range(len(config.upsample_rates)):
            self._add_stage(stage, base >> (stage + 1))
        n_last = base >> len(config.upsample_rates)
        self.conv_post = CausalConv(n_last, config.n_fft + 2, kernel_size=7)

    def _add_stage(self, stage: int, width: int) -> None:
        config = self.config
        rate, kernel_size = config.upsample_rates[stage], config.upsample_kernel_sizes[stage]
        self.ups.append(CausalUpsample(2 * width, width, kernel_size, rate=rate))
        stride = prod(config.upsample_rates[stage + 1 :])  # spectrum columns per output
        down_size = 2 * stride if stride > 1 else 1
        self.source_downs.append(CausalConv(config.n_fft + 2, width, down_size, stride=stride))
        self.source_resblocks.append(
            ResidualBlock(width, config.source_kernel_sizes[stage], config.source_dilations[stage])
        )
        self.resblocks.extend(
            ResidualBlock(width, size, dilations)
            for size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilations, strict=True
            )
        )

    def start(self, noise: SourceNoise, *, early: bool = True) -> VocoderState:
        """A fresh state; not `early`: audio appears as late as the reference makes it."""
        config, fourier = self.config, self.fourier
        # A frame is rendered once the pitch of the next is known: its last column reaches there.
        delay_frames = max(config.lookahead_frames, config.f0_lookahead_frames + 1)
        n_held = 0
        n_edge = fourier.margin_samples - fourier.hop_samples  # unfinished at the end of a frame
        if not early:
            delay_frames = config.lookahead_frames + config.f0_lookahead_frames
            n_held = FRAME_SAMPLES - n_edge
        zeros = self.conv_pre.weight.new_zeros
        return VocoderState(
            noise=noise,
            delay_frames=delay_frames,
            n_frames=0,
            n_rendered_frames=0,
            mel=zeros(1, config.n_mels, delay_frames),
            f0=self.f0_predictor.start(),
            phase=self.m_source.start(),
            source=zeros(1, 1, FRAME_SAMPLES + n_edge),
            trunk=self._start_trunk(),
            overlap=zeros(1, 2, fourier.overlap_samples),
            held=zeros(1, n_held),
        )

    def extend(self, state: VocoderState, mel: Tensor, last: bool = False) -> Tensor:
        """The audio `[N]` that `mel` `[T, 80]` completes; to the very end if `last`."""
        parts = mel.split(MAX_PIECE_FRAMES)
        audio = [self._extend(state, part, last=False) for part in parts[:-1]]
        return torch.cat([*audio, self._extend(state, parts[-1], last=last)])  # [N]

    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Whole utterances from mel `[B, 80, T]` and excitation `[B, 1, 480 T]`: `[B, 480 T]`."""
        margin = self.fourier.margin_samples
        columns = self.fourier.analyse(F.pad(source, (margin, margin), mode="reflect"))
        mel = F.pad(mel, (0, self.config.lookahead_frames))
        columns = self._trunk(mel, columns, self._start_trunk(len(mel)))
        return self._weighed(self.fourier.overlap_add(columns)[..., margin:-margin])

    def pitch(self, mel: Tensor) -> Tensor:
        """Pitch of whole utterances, `[B, 80, T]` to `[B, T]` Hz in the predictor's precision."""
        mel = F.pad(mel, (0, self.config.f0_lookahead_frames))
        return self.f0_predictor(mel, self.f0_predictor.start(len(mel)))

    def excite(self, f0: Tensor, noise: Tensor) -> Tensor:
        """Excitation `[B, 1, 480 T]` of whole utterances: pitch `[B, T]`, noise `[B, 480 T, H]`."""
        return self.m_source(f0.float(), self.m_source.start(len(f0)), noise)

    def _start_trunk(self, n_batch: int = 1) -> TrunkState:
        return TrunkState(
            ups=[layer.start(n_batch) for layer in self.ups],
            source_downs=[layer.start(n_batch) for layer in self.source_downs],
            source_resblocks=[block.start(n_batch) for block in self.source_resblocks],
            resblocks=[block.start(n_batch) for block in self.resblocks],
            conv_post=self.conv_post.start(n_batch),
        )

    def _extend(self, state: VocoderState, mel: Tensor, *, last: bool) -> Tensor:
        window = torch.cat([state.mel, mel.T[None]], dim=-1)  # [1, 80, delay + T]
        window_start = state.n_frames - state.delay_frames  # frames before 0 are zeros
        state.mel = window[..., len(mel) :].clone()
        state.n_frames += len(mel)
        stop = state.n_frames if last else state.n_frames - state.delay_frames
        piece = Piece(state.n_rendered_frames, stop, last)
        if stop <= piece.start:
            return mel.new_zeros(0)
        if last:
            n_zeros = max(self.config.lookahead_frames, self.config.f0_lookahead_frames)
            window = F.pad(window, (0, n_zeros))
        window = window[..., piece.start - window_start :]
        columns = self._columns(state, piece, self._excite(state, piece, window))
        window = window[..., : stop - piece.start + self.config.lookahead_frames]
        columns = self._trunk(window, columns, state.trunk)
        state.n_rendered_frames = stop
        return self._finish(state, piece, columns)[0]  # [N]

    def _excite(self, state: VocoderState, piece: Piece, window: Tensor) -> Tensor:
        """Excitation of the piece `[1, 1, N]`, from the mel that begins with its first frame."""
        start, stop = piece.source_start, piece.source_stop
        f0_stop = stop + self.config.f0_lookahead_frames
        f0 = self.f0_predictor(window[..., start - piece.start : f0_stop - piece.start], state.f0)
        noise = state.noise.rows(start * FRAME_SAMPLES, stop * FRAME_SAMPLES)
        return self.m_source(f0.float(), state.phase, noise[None])

    def _columns(self, state: VocoderState, piece: Piece, source: Tensor) -> Tensor:
        """Spectrum `[1, 18, K]` of the excitation; carries what the next columns cover."""
        if not piece.is_first:
            source = torch.cat([state.source, source], dim=-1)
        # The utterance is mirrored at both ends, and begins with a column of its own.
        margin = self.fourier.margin_samples
        source = F.pad(source, (margin * piece.is_first, margin * piece.is_last), mode="reflect")
        n_columns = self.config.columns_per_frame * (piece.stop - piece.start) + piece.is_first
        n_advance = self.fourier.hop_samples * n_columns
        state.source = source[..., n_advance:].clone()
        return self.fourier.analyse(source[..., : n_advance + self.fourier.overlap_samples])

    def _trunk(self, mel: Tensor, spectrum: Tensor, state: TrunkState) -> Tensor:
        """Spectrum `[B, 18, K]` of the audio, from mel with its lookahead and the source's."""
        x = self.conv_pre(mel)  # [B, C, T]
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, self.config.lrelu_slope), state.ups[stage])
            source = self.source_downs[stage](spectrum, state.source_downs[stage])
            source = self.source_resblocks[stage](source, state.source_resblocks[stage])
            if source.shape[-1] > x.shape[-1]:  # the last stage has an output for column 0 too
                x = F.pad(x, (1, 0), mode="reflect")
            x = self._blocks(stage, x + source, state)
        return _from_polar(self.conv_post(F.leaky_relu(x, POST_SLOPE), state.conv_post))

    def _blocks(self, stage: int, x: Tensor, state: TrunkState) -> Tensor:
        """Mean of the residual blocks of one stage."""
        n_blocks = len(self.config.resblock_kernel_sizes)
        mine = range(stage * n_blocks, (stage + 1) * n_blocks)
        outputs = [self.resblocks[i](x, state.resblocks[i]) for i in mine]
        return sum(outputs[1:], start=outputs[0]) / n_blocks  # [B, C, n]

    def _finish(self, state: VocoderState, piece: Piece, columns: Tensor) -> Tensor:
        """Audio `[1, N]` of output columns; carries what the next columns overlap."""
        fourier = self.fourier
        sums = fourier.overlap_add(columns)
        sums[..., : fourier.overlap_samples] += state.overlap
        n_done = fourier.hop_samples * columns.shape[-1]
        state.overlap = sums[..., n_done:].clone()
        if piece.is_last:
            n_done = sums.shape[-1] - fourier.margin_samples
        audio = self._weighed(sums[..., fourier.margin_samples * piece.is_first : n_done])
        if not piece.is_first:
            audio = torch.cat([state.held, audio], dim=-1)
        n_ready = audio.shape[-1] - (0 if piece.is_last else state.held.shape[-1])
        state.held = audio[..., n_ready:].clone()
        return audio[..., :n_ready]

    def _weighed(self, sums: Tensor) -> Tensor:
        limit = self.config.audio_limit
        return (sums[:, 0] / sums[:, 1]).clamp(-limit, limit)  # [B, N]


def _from_polar(x: Tensor) -> Tensor:
    """Real and imaginary parts of what the network gives as log magnitude and sine of the phase."""
    log_magnitude, angle = x.chunk(2, dim=1)
    magnitude = log_magnitude.exp().clamp(max=MAX_MAGNITUDE)
    phase = angle.sin()  # as it stands in the reference: a sine, used as an angle
    return torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=1)  # [B, 18, K]
