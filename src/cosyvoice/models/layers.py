"""Layers that several networks are made of. They know no network."""

from torch import Tensor, nn


class Projection(nn.Linear):
    """A linear layer that takes its input in the type of its own weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
