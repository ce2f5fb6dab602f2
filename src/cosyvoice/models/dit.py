"""The diffusion transformer inside the flow: one velocity for each mel frame.

In: frames [B, T, 4M] (noisy mel, condition, mu, speaker, side by side), the modulation of one
Euler step and a cache of what came before. Out: velocities [B, T, M].
Sizes: B batch rows, T new frames, S all frames so far, D width, H heads, C head size, M mel bins.
It knows no token, no schedule and no request. Formulas: spec/flow.md section 3.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import FlowConfig

from .layers import Projection

TIME_CHANNELS = 256
CONV_TAPS = 31
CONV_GROUPS = 16
ROPE_THETA = 10_000.0
NORM_EPS = 1e-6
CACHE_GROWTH_FRAMES = 500  # ten seconds: seldom enough to copy, little enough to waste


class Segment(NamedTuple):
    """Queries [start, stop) of the new frames see keys [0, n_keys)."""

    start: int
    stop: int
    n_keys: int


def full_segments(n_past: int, n_new: int) -> list[Segment]:
    """Everybody sees everybody."""
    return [Segment(0, n_new, n_past + n_new)]


def block_segments(n_past: int, n_new: int, block: int) -> list[Segment]:
    """Frame i sees frame j where j < block * (i // block + 1)."""
    segments, start = [], 0
    while start < n_new:
        block_end = block * ((n_past + start) // block + 1)
        stop = min(n_new, block_end - n_past)
        segments.append(Segment(start, stop, n_past + stop))
        start = stop
    return segments


def segment_mask(segments: list[Segment]) -> Tensor:
    """The boolean mask [T, S] the segments stand for: True where a query sees a key."""
    n_keys = max(segment.n_keys for segment in segments)
    sees = torch.zeros(segments[-1].stop, n_keys, dtype=torch.bool)  # [T, S]
    for start, stop, n_seen in segments:
        sees[start:stop, :n_seen] = True
    return sees


class StepModulation(NamedTuple):
    """Shift, scale and gate of one point in time: what the time embedding does to the network."""

    blocks: Tensor  # [depth, B or 1, 6, D]: shift, scale, gate for attention, then for the MLP
    final: Tensor  # [B or 1, 2, D]: scale, shift


class StepCache(Protocol):
    """What one Euler step remembers of the frames before."""

    def pad(self, conv: int, x: Tensor) -> Tensor:
        """x [B, T, D] with the 30 frames that came before it in front, zeros at the start."""
        ...

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far [B, H, S, C], the new k and v [B, H, T, C] at the end."""
        ...


class NoCache:
    """For a pass over everything at once: nothing before, nothing kept."""

    def pad(self, conv: int, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, CONV_TAPS - 1, 0))

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


@dataclass
class KeptCache:
    """Everything: exact, 2 * depth * 2 * D numbers per frame."""

    contexts: dict[int, Tensor] = field(default_factory=dict)  # conv -> [B, 30, D]
    kv: dict[int, Tensor] = field(default_factory=dict)  # layer -> [2, B, H, capacity, C]
    n_frames: dict[int, int] = field(default_factory=dict)  # layer -> frames held

    def pad(self, conv: int, x: Tensor) -> Tensor:
        before = self.contexts.get(conv)
        if before is None:
            before = x.new_zeros(x.shape[0], CONV_TAPS - 1, x.shape[2])
        padded = torch.cat([before, x], dim=1)
        # A clone, so that the 30 frames do not keep the whole chunk alive.
        self.contexts[conv] = padded[:, -(CONV_TAPS - 1) :].clone()
        return padded

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start = self.n_frames.get(layer, 0)
        stop = start + k.shape[2]
        held = self._room(layer, stop, k)
        held[0, :, :, start:stop] = k
        held[1, :, :, start:stop] = v
        self.n_frames[layer] = stop
        return held[0, :, :, :stop], held[1, :, :, :stop]

    def _room(self, layer: int, n_frames: int, like: Tensor) -> Tensor:
        held = self.kv.get(layer)
        if held is not None and held.shape[3] >= n_frames:
            return held
        n_batch, n_heads, _, head_dim = like.shape
        capacity = CACHE_GROWTH_FRAMES * math.ceil(n_frames / CACHE_GROWTH_FRAMES)
        larger = like.new_empty(2, n_batch, n_heads, capacity, head_dim)
        if held is not None:
            n_held = self.n_frames[layer]
            larger[:, :, :, :n_held] = held[:, :, :, :n_held]
        self.kv[layer] = larger
        return larger


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, C / 2] of the rotary angles at absolute frames `positions` [T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * ROPE_THETA**-exponents  # [T, C / 2]
    return angles.cos(), angles.sin()


def rotate_first_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate head 0 of x [B, H, T, C] by interleaved pairs; the others stay position-free.

    The published weights were trained with the rotation applied before the split into heads, to
    the first C of D channels only, so this quirk is part of the model.
    """
    even, odd = x[:, 0, :, 0::2].float(), x[:, 0, :, 1::2].float()  # [B, T, C / 2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned[:, None].to(x.dtype), x[:, 1:]], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift [B or 1, D]."""
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

    def forward(self, h: Tensor, cache: StepCache) -> Tensor:
        for i, conv in enumerate((self.conv1, self.conv2)):
            h = conv(cache.pad(i, h).transpose(1, 2)).transpose(1, 2)
        return h


class InputEmbedding(nn.Module):
    """[x; cond; mu; spk] of each frame -> [B, T, D]."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.proj = Projection(4 * config.n_mels, config.dim)
        self.conv_pos_embed = ConvPosition(config.dim)

    def forward(self, frames: Tensor, cache: StepCache) -> Tensor:
        h = self.proj(frames)
        return self.conv_pos_embed(h, cache) + h


class ModulationHead(nn.Module):
    """Time embedding [n, D] -> n_parts vectors [n, n_parts, D]."""

    def __init__(self, dim: int, n_parts: int) -> None:
        super().__init__()
        self.n_parts = n_parts
        self.linear = Projection(dim, n_parts * dim)

    def vectors(self, c: Tensor) -> Tensor:
        return self.linear(F.silu(c)).float().unflatten(-1, (self.n_parts, -1))


@dataclass(frozen=True)
class Past:
    """What a block needs to know of where its frames stand."""

    cache: StepCache
    segments: list[Segment]
    cos: Tensor  # [T, C / 2]
    sin: Tensor
    dtype: torch.dtype  # of attention and its cache


class Attention(nn.Module):
    """Attention of the new frames over the cache and themselves."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        size = config.attention_size
        self.n_heads = config.n_heads
        self.to_q = Projection(config.dim, size)
        self.to_k = Projection(config.dim, size)
        self.to_v = Projection(config.dim, size)
        self.to_out = nn.Sequential(Projection(size, config.dim))

    def forward(self, x: Tensor, past: Past, layer: int) -> Tensor:
        q, k, v = (
            self._heads(linear(x), past.dtype) for linear in (self.to_q, self.to_k, self.to_v)
        )
        q = rotate_first_head(q, past.cos, past.sin)
        k = rotate_first_head(k, past.cos, past.sin)
        k, v = past.cache.keys(layer, k, v)  # [B, H, S, C]
        parts = [
            F.scaled_dot_product_attention(q[:, :, a:b], k[:, :, :n], v[:, :, :n])
            for a, b, n in past.segments
        ]
        y = torch.cat(parts, dim=2).transpose(1, 2).flatten(-2)  # [B, T, H * C]
        return self.to_out(y)

    def _heads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2).to(dtype)  # [B, H, T, C]


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

    def forward(self, y: Tensor, modulation: Tensor, past: Past, layer: int) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # each [B, D]
        y = y + gate_a[:, None] * self.attn(modulate(y, shift_a, scale_a), past, layer)
        return y + gate_m[:, None] * self.ff(modulate(y, shift_m, scale_m))


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

    def forward(self, frames: Tensor, modulation: StepModulation, past: Past) -> Tensor:
        y = self.input_embed(frames, past.cache).float()  # [B, T, D]
        for layer, block in enumerate(self.blocks):
            y = block(y, modulation.blocks[layer], past, layer)
        y = self.norm_out(y, modulation.final)
        return self.proj_out(y).float()
