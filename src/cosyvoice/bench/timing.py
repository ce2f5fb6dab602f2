"""How long something takes, said so that a busy machine cannot lie: median, p95 and minimum.

In: work to do again and again. Out: a `Timing`. It knows no network and no device but by `wait`,
which is called before each look at the clock.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


def at_once() -> None:
    """For work that is done when its call returns."""


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of the values do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


@dataclass(frozen=True)
class Timing:
    """Times of the same work, done over and over."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return quantile(self.samples_s, 0.5)

    @property
    def p95_s(self) -> float:
        return quantile(self.samples_s, 0.95)

    @property
    def min_s(self) -> float:
        return min(self.samples_s)

    def per(self, n: float) -> "Timing":
        """The time of each of n equal parts of the work."""
        return Timing(tuple(sample / n for sample in self.samples_s))

    def to_json(self) -> dict[str, float | int]:
        """Milliseconds."""
        return {
            "median_ms": round(1e3 * self.median_s, 4),
            "p95_ms": round(1e3 * self.p95_s, 4),
            "min_ms": round(1e3 * self.min_s, 4),
            "n": len(self.samples_s),
        }

    def __str__(self) -> str:
        median, p95, least = (_shown(s) for s in (self.median_s, self.p95_s, self.min_s))
        return f"{median} median, {p95} p95, {least} min of {len(self.samples_s)}"


def best_of(
    work: Callable[[], Any],
    *,
    n: int,
    n_warm: int = 1,
    wait: Callable[[], None] = at_once,
) -> Timing:
    """Do the work n_warm times unseen, then n times by the clock."""
    assert n > 0, n
    for _ in range(n_warm):
        work()
    return Timing(tuple(seconds_of(work, wait) for _ in range(n)))


def seconds_of(work: Callable[[], Any], wait: Callable[[], None] = at_once) -> float:
    """The time of one go."""
    wait()
    start_s = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start_s


def _shown(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms"
