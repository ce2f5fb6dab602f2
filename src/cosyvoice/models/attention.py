"""Attention of the flow: who sees whom, where frames stand, and how the sum is computed.

In: queries, keys and values [B, H, T, C]. Out: [B, H, T, C].
Sizes: B rows, H heads, T new frames, S all frames so far, C head size. It knows no cache.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROPE_THETA = 10_000.0


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


Attend = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]


def attend_fused(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """softmax(q k^T / sqrt(C)) v: q [B, H, T, C]; keys and values [B, H, S_i, C], end to end."""
    return F.scaled_dot_product_attention(q, joined(keys), joined(values))


def attend_by_products(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """The same by batched products: on a CPU as fast in float32, over twice as fast in bfloat16."""
    # Keys that lie in one piece are multiplied so much faster that the copy pays.
    k = joined(keys).contiguous()
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))  # [B, H, T, S]
    return torch.matmul(scores.softmax(dim=-1), joined(values))


def joined(parts: Sequence[Tensor], dim: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def first(parts: Sequence[Tensor], n: int) -> list[Tensor]:
    """The first n frames of parts [B, H, S_i, C]."""
    cut, n_left = [], n
    for part in parts:
        if n_left:
            cut.append(part[:, :, :n_left])
            n_left -= cut[-1].shape[2]
    assert n_left == 0, f"{n} keys wanted, {n - n_left} there"
    return cut


class AttentionForm(NamedTuple):
    """How attention is computed, and the type of its cache."""

    dtype: torch.dtype
    attend: Attend


EXACT = AttentionForm(torch.float32, attend_by_products)
