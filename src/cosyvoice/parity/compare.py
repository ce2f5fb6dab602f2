"""Ours against theirs: one row for each tensor and each recorded value.

In: what we computed, what was recorded, the tolerance. Out: a `Row` with the largest and the mean
difference and a verdict. It knows neither what the numbers mean nor where they came from.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .goldens import EXACT, INPUT, Spec, Tolerance

PASS = "pass"
FAIL = "FAIL"  # where it is not a matter of size, a reason follows
LATER = "later"  # recorded for a stage this command does not run


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    shape: tuple[int, ...]
    max_abs: float | None  # None: nothing was compared
    l1: float | None  # mean absolute difference
    tolerance: Tolerance
    verdict: str

    @property
    def has_failed(self) -> bool:
        return self.verdict.startswith(FAIL)

    @property
    def counts(self) -> bool:
        return self.verdict != LATER


def uncompared(name: str, spec: Spec, verdict: str) -> Row:
    """A row of a tensor that is given, or that could not be compared."""
    return Row(name, spec.shape, None, None, spec.tolerance, verdict)


def compare_tensors(
    name: str, ours: Tensor, golden: Tensor, *, tolerance: Tolerance, max_rms: float | None
) -> Row:
    """Largest and mean difference; `max_rms` bounds the root mean square where it is given."""
    shape = tuple(golden.shape)
    if tuple(ours.shape) != shape:
        return Row(name, shape, None, None, tolerance, f"{FAIL}: shape {list(ours.shape)}")
    a, b = ours.detach().double(), golden.double()
    # Equal infinities differ by nothing, though their difference is not a number.
    difference = torch.where(a == b, 0.0, (a - b).abs())
    if not difference.numel():
        return Row(name, shape, 0.0, 0.0, tolerance, PASS)
    max_abs, l1 = float(difference.max()), float(difference.mean())
    rms = float(difference.square().mean().sqrt())
    verdict = PASS if max_abs <= _limit(tolerance) else FAIL  # false where it is not a number
    if verdict == PASS and max_rms is not None and not rms <= max_rms:
        verdict = f"{FAIL}: RMS {rms:.1e} > {max_rms:g}"
    return Row(name, shape, max_abs, l1, tolerance, verdict)


def compare_values(name: str, ours: Any, golden: Any) -> Row:
    """Equal or not. `{"any": true}` stands for any answer, `{"error": ...}` for the reference's
    failure, which is not to be imitated; so there is one anyway."""
    is_free = isinstance(golden, dict) and not golden.keys().isdisjoint(("any", "error"))
    is_same = is_free or bool(ours == golden)
    shape = (len(golden),) if isinstance(golden, list | dict) else ()
    difference = 0.0 if is_same else 1.0
    verdict = PASS if is_same else f"{FAIL}: {_brief(ours)}"
    return Row(name, shape, difference, difference, EXACT, verdict)


def _limit(tolerance: Tolerance) -> float:
    assert tolerance != INPUT, "what is given is not compared"
    return 0.0 if tolerance == EXACT else float(tolerance)


def _brief(value: Any, n_chars: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= n_chars else f"{text[:n_chars]}..."
