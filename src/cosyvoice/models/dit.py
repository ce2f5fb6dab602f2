"""The diffusion transformer inside the flow: one velocity for each mel frame.

In: frames [B, T, 4M] (noisy mel, condition, mu, speaker, side by side) of one or more utterances,
the modulation of one Euler step and caches of what came before. Out: velocities [B, T, M].
Sizes: B batch rows, T new frames, S all frames so far, D width, H heads, C head size, M mel bins.
It knows no token, no schedule and no request. Formulas: docs/spec/flow.md section 3.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import FlowConfig

from .attention import AttentionForm, Segment, first, joined, rotate_first_head
from .flow_cache import CONV_TAPS, StepCache
from .layers import Projection

TIME_CHANNELS = 256
CONV_GROUPS = 16
NORM_EPS = 1e-6


class StepModulation(NamedTuple):
    """Shift, scale and gate of one point in time: what the time embedding does to the network."""

    blocks: Tensor  # [depth, B or 1, 6, D]: shift, scale, gate for attention, then for the MLP
    final: Tensor  # [B or 1, 2, D]: scale, shift


@dataclass(frozen=True)
class Lane:
    """One utterance's frames [start, stop) among those of a pass, and where they stand."""

    start: int
    stop: int
    cache: StepCache
    segments: Sequence[Segment]
    cos: Tensor  # [T, C / 2]
    sin: Tensor


@dataclass(frozen=True)
class Pass:
    """Several utterances side by side along T. Only attention and convolution tell them apart."""

    lanes: Sequence[Lane]
    form: AttentionForm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift [B or 1, D]."""
    if len(scale) == 1:  # all rows at one time, as in synthesis: then they are the norm's own
        return F.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], eps=NORM_EPS)
    x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return x * (1 + scale[:, None]) + shift[:, None]


class TimeEmbedding(nn.Module):
    """Time in [0, 1] -> [n, D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_mlp = nn.Sequential(
            Projection(TIME_CHANNELS, dim), nn.SiLU(), Projection(dim, dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        n = TIME_CHANNELS // 2
        steps = torch.arange(n, device=t.device).float()
        frequencies = torch.exp(steps * (-math.log(10_000) / (n - 1)))
        angles = 1000 * t.float()[:, None] * frequencies  # [n, 128]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.time_mlp(waves)


class ConvPosition(nn.Module):
    """Two causal grouped convolutions that tell frames where they stand."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv1d(dim, dim, CONV_TAPS, groups=CONV_GROUPS), nn.Mish())
        self.conv2 = nn.Sequential(nn.Conv1d(dim, dim, CONV_TAPS, groups=CONV_GROUPS), nn.Mish())

    def forward(self, h: Tensor, lanes: Sequence[Lane]) -> Tensor:
        h = h.to(cast(nn.Conv1d, self.conv1[0]).weight.dtype)
        for i, conv in enumerate((self.conv1, self.conv2)):
            padded = [lane.cache.pad(i, h[:, lane.start : lane.stop]) for lane in lanes]
            h = joined([conv(x.transpose(1, 2)).transpose(1, 2) for x in padded], dim=1)
        return h


class InputEmbedding(nn.Module):
    """[x; cond; mu; spk] of each frame -> [B, T, D]."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.proj = Projection(4 * config.n_mels, config.dim)
        self.conv_pos_embed = ConvPosition(config.dim)

    def forward(self, frames: Tensor, lanes: Sequence[Lane]) -> Tensor:
        h = self.proj(frames)
        return self.conv_pos_embed(h, lanes) + h


class ModulationHead(nn.Module):
    """Time embedding [n, D] -> n_parts vectors [n, n_parts, D]."""

    def __init__(self, dim: int, n_parts: int) -> None:
        super().__init__()
        self.n_parts = n_parts
        self.linear = Projection(dim, n_parts * dim)

    def vectors(self, c: Tensor) -> Tensor:
        return self.linear(F.silu(c)).float().unflatten(-1, (self.n_parts, -1))


class Attention(nn.Module):
    """Attention of the new frames over the caches and themselves."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        size = config.attention_size
        self.n_heads = config.n_heads
        self.to_q = Projection(config.dim, size)
        self.to_k = Projection(config.dim, size)
        self.to_v = Projection(config.dim, size)
        self.to_out = nn.Sequential(Projection(size, config.dim))

    def forward(self, x: Tensor, run: Pass, layer: int) -> Tensor:
        q, k, v = (self._heads(linear(x)) for linear in (self.to_q, self.to_k, self.to_v))
        y = [self._lane(q, k, v, lane, run.form, layer) for lane in run.lanes]
        return self.to_out(joined(y).transpose(1, 2).flatten(-2))  # [B, T, H * C]

    def _lane(
        self, q: Tensor, k: Tensor, v: Tensor, lane: Lane, form: AttentionForm, layer: int
    ) -> Tensor:
        q, k, v = (x[:, :, lane.start : lane.stop] for x in (q, k, v))  # [B, H, T, C]
        q = rotate_first_head(q, lane.cos, lane.sin).to(form.dtype)
        k = rotate_first_head(k, lane.cos, lane.sin).to(form.dtype)
        keys, values = lane.cache.keys(layer, k, v.to(form.dtype))
        parts = [
            form.attend(q[:, :, a:b], first(keys, n), first(values, n)) for a, b, n in lane.segments
        ]
        return joined(parts)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # [B, H, T, C]


class FeedForward(nn.Module):
    """D -> ff_mult * D -> D with the tanh form of GELU."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        first = nn.Sequential(Projection(dim, inner), nn.GELU(approximate="tanh"))
        # The checkpoint numbers these 0 and 2; between them stood a dropout.
        self.ff = nn.Sequential(first, nn.Identity(), Projection(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Block(nn.Module):
    """One transformer block: modulated attention, modulated MLP, both gated."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.attn_norm = ModulationHead(config.dim, 6)
        self.attn = Attention(config)
        self.ff = FeedForward(config.dim, config.dim * config.ff_mult)

    def forward(self, y: Tensor, modulation: Tensor, run: Pass, layer: int) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # each [B, D]
        a = self.attn(modulate(y, shift_a, scale_a), run, layer)
        y = torch.addcmul(y, gate_a[:, None], a.float())
        b = self.ff(modulate(y, shift_m, scale_m))
        return torch.addcmul(y, gate_m[:, None], b.float())


class FinalNorm(ModulationHead):
    """The last modulation: (scale, shift), the opposite order of the blocks'."""

    def forward(self, y: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.unbind(1)
        return modulate(y, shift, scale)


class DiT(nn.Module):
    """The velocity network. The residual stream is float32 whatever the weights are."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embed = TimeEmbedding(config.dim)
        self.input_embed = InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm_out = FinalNorm(config.dim, 2)
        self.proj_out = Projection(config.dim, config.n_mels)

    @property
    def blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.transformer_blocks)

    def modulation(self, t: Tensor) -> StepModulation:
        """Modulation vectors of the times t [n], one row each."""
        c = self.time_embed(t)  # [n, D]
        blocks = torch.stack([block.attn_norm.vectors(c) for block in self.blocks])
        return StepModulation(blocks, self.norm_out.vectors(c))

    def forward(self, frames: Tensor, modulation: StepModulation, run: Pass) -> Tensor:
        y = self.input_embed(frames, run.lanes).float()  # [B, T, D]
        for layer, block in enumerate(self.blocks):
            y = block(y, modulation.blocks[layer], run, layer)
        y = self.norm_out(y, modulation.final)
        return self.proj_out(y).float()
