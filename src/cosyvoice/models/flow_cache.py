"""What one Euler step of the flow remembers of the frames before.

In: keys, values and inputs of convolutions, frame after frame. Out: the same with all that came
before. Sizes: B rows, H heads, T new frames, P frames of a shared prefix, C head size, D width.
It knows no network.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CONV_TAPS = 31  # of the positional convolutions
CACHE_GROWTH_FRAMES = 500  # ten seconds: seldom enough to copy, little enough to waste


class StepCache(Protocol):
    """What one Euler step remembers of the frames before."""

    def pad(self, conv: int, x: Tensor) -> Tensor:
        """x [B, T, D] with the 30 frames that came before it in front, zeros at the start."""
        ...

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """All keys and values so far, the new k and v [B, H, T, C] at the end, in parts along T."""
        ...


class NoCache:
    """For a pass over everything at once: nothing before, nothing kept."""

    def pad(self, conv: int, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, CONV_TAPS - 1, 0))

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [k], [v]


@dataclass
class KeptCache:
    """Everything: exact, 2 * depth * 2 * D numbers per frame.

    `prefix` is shared with other caches and only read; `own` grows.
    """

    prefix: dict[int, Tensor] = field(default_factory=dict)  # layer -> [2, B, H, P, C]
    contexts: dict[int, Tensor] = field(default_factory=dict)  # conv -> [B, 30, D]
    own: dict[int, Tensor] = field(default_factory=dict)  # layer -> [2, B, H, capacity, C]
    n_own: dict[int, int] = field(default_factory=dict)  # layer -> frames held in `own`

    def pad(self, conv: int, x: Tensor) -> Tensor:
        before = self.contexts.get(conv)
        if before is None:
            before = x.new_zeros(x.shape[0], CONV_TAPS - 1, x.shape[2])
        padded = torch.cat([before, x], dim=1)
        # A clone, so that the 30 frames do not keep the whole chunk alive.
        self.contexts[conv] = padded[:, -(CONV_TAPS - 1) :].clone()
        return padded

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        start = self.n_own.get(layer, 0)
        stop = start + k.shape[2]
        own = self._room(layer, stop, k)
        own[0, :, :, start:stop] = k
        own[1, :, :, start:stop] = v
        self.n_own[layer] = stop
        parts = [own[:, :, :, :stop]]
        if layer in self.prefix:
            parts.insert(0, self.prefix[layer])
        return [part[0] for part in parts], [part[1] for part in parts]

    def freeze(self) -> "KeptCache":
        """A cache whose frames are all prefix, for `fork`."""
        assert not self.prefix, "only a cache of its own frames can become a prefix"
        prefix = {i: own[:, :, :, : self.n_own[i]].clone() for i, own in self.own.items()}
        return KeptCache(prefix, self.contexts)

    def fork(self) -> "KeptCache":
        """A cache that goes on from here; the prefix stays shared."""
        return KeptCache(self.prefix, dict(self.contexts))

    @property
    def n_bytes(self) -> int:
        """Of its own frames."""
        return sum(own.nbytes for own in self.own.values())

    @property
    def n_prefix_bytes(self) -> int:
        return sum(prefix.nbytes for prefix in self.prefix.values())

    def _room(self, layer: int, n_frames: int, like: Tensor) -> Tensor:
        own = self.own.get(layer)
        if own is not None and own.shape[3] >= n_frames:
            return own
        n_batch, n_heads, _, head_dim = like.shape
        capacity = CACHE_GROWTH_FRAMES * math.ceil(n_frames / CACHE_GROWTH_FRAMES)
        larger = like.new_empty(2, n_batch, n_heads, capacity, head_dim)
        if own is not None:
            n_held = self.n_own[layer]
            larger[:, :, :, :n_held] = own[:, :, :, :n_held]
        self.own[layer] = larger
        return larger
