"""Linear layers in the form a CPU multiplies fastest.

In: a network of `Projection`s. Out: the same network, each of them replaced by one whose weight is
reordered for oneDNN (float32, bfloat16) or quantised to eight bits. Names and results stay, but for
rounding; the replaced layers cannot be trained or saved. It knows no network.

Why: at the sizes of this model torch's own product reaches 220 GFLOP/s in float32 on two Zen 5
cores, the same product through packed oneDNN 500; int8 reaches 1700 (docs/benchmarks.md).
"""

import warnings

import torch
from torch import Tensor, nn

from .layers import Joint, Projection

INT8_LIMIT = 127


class PackedLinear(nn.Module):
    """x W^T + b with a weight reordered by oneDNN, in the weight's own type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.bias = None if bias is None else bias.detach().to(weight.dtype)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """x W^T + b with 8-bit weights, one scale per output row, and x quantised as it comes.

    In and out are float32. The activation has one scale per call: error 1 to 2 % of the output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        weight = weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_LIMIT
        zeros = torch.zeros(len(weight), dtype=torch.long)
        with warnings.catch_warnings():
            # Quantised tensors are to leave torch one day; no other product is as fast today.
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if bias is None else bias.detach().float()
        self._packed = torch.ops.quantized.linear_prepack(quantised, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x.float(), self._packed, reduce_range=False)


Kind = type[PackedLinear] | type[Int8Linear]


def pack(network: nn.Module, kind: Kind = PackedLinear) -> None:
    """Replace every `Projection` of the network; each old weight is freed as it is replaced.

    Where torch was built without oneDNN the network stays as it is.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Joint):
                setattr(module, name, kind(*child.merged()))
            elif isinstance(child, Projection):
                setattr(module, name, kind(child.weight, child.bias))
