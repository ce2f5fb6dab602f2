"""Causal convolutions whose past is an argument, and the residual blocks made of them.

Comes in: `x` `[B, C, n]` and the past of the layer, `[B, C, n_past]`, the inputs that came just
before x: zeros at the start of an utterance, which is exactly the zero padding of the whole.
Goes out: the outputs for x; the past is overwritten in place, so it keeps its size and address.
Whole or in pieces is therefore the same code. Gradients stop at the past.
Knows nothing of mel, audio or utterances.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SNAKE_EPSILON = 1e-9


class CausalConv(nn.Module):
    """A convolution that looks back only; an output is made as soon as its last input is there."""

    def __init__(
        self, n_in: int, n_out: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in * kernel_size)  # torch's default for a convolution
        self.weight = nn.Parameter(torch.empty(n_out, n_in, kernel_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))
        self.n_in = n_in
        self.stride = stride
        self.dilation = dilation
        self.n_span = (kernel_size - 1) * dilation + 1
        self.n_past = self.n_span - stride

    def start(self, n_batch: int = 1) -> Tensor:
        """The past of a layer that has seen nothing."""
        return self.bias.new_zeros(n_batch, self.n_in, self.n_past)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        x = torch.cat([past, x], dim=-1)  # [B, n_in, n_past + n]
        n_joined = x.shape[-1]
        past.copy_(x[..., n_joined - self.n_past :].detach())
        # The last output ends on the last input. An input too many can only stand at the front:
        # the extra first column of a spectrum, which takes the place of one zero of the past.
        n_surplus = (n_joined - self.n_span) % self.stride
        return F.conv1d(
            x[..., n_surplus:], self.weight, self.bias, self.stride, dilation=self.dilation
        )  # [B, n_out, n // stride]


class CausalUpsample(CausalConv):
    """Repeats each input `rate` times, then convolves; the past holds repeated inputs."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, *, rate: int) -> None:
        super().__init__(n_in, n_out, kernel_size)
        self.rate = rate

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return super().forward(x.repeat_interleave(self.rate, dim=-1), past)  # [B, n_out, n * rate]


class Snake(nn.Module):
    """x + sin^2(alpha x) / alpha, one alpha per channel."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(n_channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        sine = (x * alpha).sin_()
        return torch.addcmul(x, sine / (alpha + SNAKE_EPSILON), sine)  # [B, C, n]


class ResidualBlock(nn.Module):
    """For each dilation: snake, dilated convolution, snake, convolution, added to the input."""

    def __init__(self, n_channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        first = [CausalConv(n_channels, n_channels, kernel_size, dilation=d) for d in dilations]
        second = [CausalConv(n_channels, n_channels, kernel_size) for _ in dilations]
        # Typed by what they hold, which ModuleList does not tell.
        self.convs1 = cast("list[CausalConv]", nn.ModuleList(first))
        self.convs2 = cast("list[CausalConv]", nn.ModuleList(second))
        self.activations1 = nn.ModuleList(Snake(n_channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(n_channels) for _ in dilations)

    def start(self, n_batch: int = 1) -> list[Tensor]:
        """The past of each convolution: first and second of each dilation in turn."""
        pairs = zip(self.convs1, self.convs2, strict=True)
        return [conv.start(n_batch) for pair in pairs for conv in pair]

    def forward(self, x: Tensor, pasts: list[Tensor]) -> Tensor:
        layers = zip(
            self.activations1,
            self.convs1,
            self.activations2,
            self.convs2,
            pasts[0::2],
            pasts[1::2],
            strict=True,
        )
        for snake1, conv1, snake2, conv2, past1, past2 in layers:
            z = conv1(snake1(x), past1)
            x = x + conv2(snake2(z), past2)
        return x  # [B, C, n]
