"""What a stage finds: tensors under the names of the set, and values at places in its documents.

Comes in and goes out: data. It knows neither tolerance nor verdict.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .goldens import Place


@dataclass(frozen=True)
class Computed:
    """One tensor of ours."""

    name: str
    value: Tensor
    is_head: bool = False  # the set may hold only the first samples of it
    is_piece: bool = False  # one of several in order: the set must have just as many


@dataclass(frozen=True)
class Fact:
    """One value of ours, to stand in a document of the set."""

    place: Place
    value: Any
    file: str = ""  # the document of the stage, if not another


Found = Computed | Fact
