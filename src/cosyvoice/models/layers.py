"""Layers that several networks are made of. They know no network."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear layer that takes its input in the type of its own weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Joint(nn.ModuleDict):
    """Several projections of one input, their outputs end to end.

    A packed network computes them as one product.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([projection(x) for projection in self.projections], dim=-1)

    @property
    def projections(self) -> Sequence[Projection]:
        return list(cast(Iterable[Projection], self.values()))

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one projection that computes them all."""
        weights: list[Tensor] = [p.weight for p in self.projections]
        biases: list[Tensor] = [p.bias for p in self.projections if p.bias is not None]
        return torch.cat(weights), torch.cat(biases) if biases else None
