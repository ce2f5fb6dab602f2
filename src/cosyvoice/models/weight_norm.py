"""Folds the weight normalisation of a vocoder checkpoint into plain weights.

Comes in: the entries of `hift.pt`, in any of the three forms in which they are stored, perhaps cut
out of a checkpoint of the GAN trainer. Goes out: tensors named as the parameters of `Vocoder`,
float32, the F0 predictor's float64. Knows no file and no module.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cosyvoice.errors import ModelFilesError

GAIN_SUFFIXES = (".parametrizations.weight.original0", ".weight_g")
DIRECTION_SUFFIXES = (".parametrizations.weight.original1", ".weight_v")
TRAINER_ENTRIES = frozenset({"epoch", "step"})
TRAINER_PREFIX = "discriminator."
GENERATOR_PREFIX = "generator."
FLOAT64_PREFIX = "f0_predictor."  # float32 there drifts audibly over time


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights of the generator; ModelFilesError where half of a weight is missing."""
    tensors = {
        name.removeprefix(GENERATOR_PREFIX): value
        for name, value in state.items()
        if name not in TRAINER_ENTRIES and not name.startswith(TRAINER_PREFIX)
    }
    gains = _take(tensors, GAIN_SUFFIXES)
    directions = _take(tensors, DIRECTION_SUFFIXES)
    unpaired = gains.keys() ^ directions.keys()
    if unpaired:
        raise ModelFilesError(
            f"hift.pt has half of a normalised weight ({min(unpaired)}); download the file again"
        )
    folded = {name: _as_stored(name, value) for name, value in tensors.items()}
    for name, direction in directions.items():
        weight = f"{name}.weight"
        folded[weight] = _fold(_as_stored(weight, gains[name]), _as_stored(weight, direction))
    return folded


def _take(tensors: dict[str, Tensor], suffixes: tuple[str, str]) -> dict[str, Tensor]:
    """Remove the entries that end so; what is left of their names leads to them."""
    taken = {}
    for suffix in suffixes:
        for name in [name for name in tensors if name.endswith(suffix)]:
            taken[name.removesuffix(suffix)] = tensors.pop(name)
    return taken


def _as_stored(name: str, value: Tensor) -> Tensor:
    return value.to(torch.float64 if name.startswith(FLOAT64_PREFIX) else torch.float32)


def _fold(gain: Tensor, direction: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)  # [n_out, 1, 1]
    return direction * (gain / norm)  # [n_out, n_in, k]
