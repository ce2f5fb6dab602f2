"""What one Euler step of the flow remembers of the frames before.

In: keys, values and inputs of convolutions, frame after frame. Out: the same with all that came
before. Sizes: B rows, H heads, T new frames, P frames of a shared prefix, C head size, D width.
It knows no network.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CONV_TAPS = 31  # of the positional convolutions


class Slabs:
    """Blocks of memory that caches take and give back.

    Pages of a fresh allocation cost as much as a tenth of the arithmetic they serve, so blocks
    that come back are kept for the next utterance, up to `max_free_bytes`. One thread at a time.
    """

    def __init__(self, max_free_bytes: int = 0) -> None:
        self._max_free_bytes = max_free_bytes
        self._free: dict[tuple[int, ...], list[Tensor]] = {}
        self._n_free_bytes = 0

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A block of this shape, of the type and on the device of `like`; its content is junk."""
        free = self._free.get(shape)
        if not free:
            return like.new_empty(shape)
        slab = free.pop()
        self._n_free_bytes -= slab.nbytes
        return slab

    def give(self, slab: Tensor) -> None:
        """Take a block back that nobody reads any more."""
        if self._n_free_bytes + slab.nbytes <= self._max_free_bytes:
            self._free.setdefault(tuple(slab.shape), []).append(slab)
            self._n_free_bytes += slab.nbytes


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
    """Everything: exact, 2 * depth * 2 * D numbers per frame, in slabs of one block of frames.

    `prefix` is shared with other caches and only read; `own` grows.
    """

    slabs: Slabs
    depth: int
    n_block: int  # frames of a slab
    prefix: list[Tensor] = field(default_factory=list)  # slabs [depth, 2, B, H, n_block, C]
    own: list[Tensor] = field(default_factory=list)
    n_own: list[int] = field(default_factory=list)  # per layer: frames held in `own`
    contexts: dict[int, Tensor] = field(default_factory=dict)  # conv -> [B, 30, D]

    def __post_init__(self) -> None:
        self.n_own = self.n_own or [0] * self.depth

    def pad(self, conv: int, x: Tensor) -> Tensor:
        before = self.contexts.get(conv)
        if before is None:
            before = x.new_zeros(x.shape[0], CONV_TAPS - 1, x.shape[2])
        padded = torch.cat([before, x], dim=1)
        # A clone, so that the 30 frames do not keep the whole chunk alive.
        self.contexts[conv] = padded[:, -(CONV_TAPS - 1) :].clone()
        return padded

    def keys(self, layer: int, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        self._append(layer, k, v)
        held = [slab[layer] for slab in self.prefix]  # [2, B, H, n_block, C] each
        n_left = self.n_own[layer]
        for slab in self.own:
            held.append(slab[layer, :, :, :, : min(n_left, self.n_block)])
            n_left -= self.n_block
        return [part[0] for part in held], [part[1] for part in held]

    def _append(self, layer: int, k: Tensor, v: Tensor) -> None:
        start = self.n_own[layer]
        stop = start + k.shape[2]
        while len(self.own) * self.n_block < stop:
            n_batch, n_heads, _, head_dim = k.shape
            shape = (self.depth, 2, n_batch, n_heads, self.n_block, head_dim)
            self.own.append(self.slabs.take(shape, k))
        for i in range(start // self.n_block, len(self.own)):
            first = i * self.n_block
            a, b = max(start, first), min(stop, first + self.n_block)
            self.own[i][layer, 0, :, :, a - first : b - first] = k[:, :, a - start : b - start]
            self.own[i][layer, 1, :, :, a - first : b - first] = v[:, :, a - start : b - start]
        self.n_own[layer] = stop

    def freeze(self) -> "KeptCache":
        """A cache whose frames are all prefix, for `fork`; they must be whole blocks."""
        assert not self.prefix, "only a cache of its own frames can become a prefix"
        assert self.n_own[0] == len(self.own) * self.n_block, f"{self.n_own[0]} frames"
        return replace(self, prefix=self.own, own=[], n_own=[])

    def fork(self) -> "KeptCache":
        """A cache that goes on from here; the prefix stays shared."""
        return replace(self, own=[], n_own=[], contexts=dict(self.contexts))

    def free(self) -> None:
        """Give its own slabs back; it must not be used any more."""
        for slab in self.own:
            self.slabs.give(slab)
        self.own = []

    @property
    def n_bytes(self) -> int:
        """Of its own frames."""
        return sum(slab.nbytes for slab in self.own)

    @property
    def n_prefix_bytes(self) -> int:
        return sum(slab.nbytes for slab in self.prefix)
