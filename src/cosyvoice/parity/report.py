"""The outcome of a parity run, as a table for people and one JSON line for programs.

In: rows. Out: text. It knows no tensor; where a number could not be computed the JSON has null.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from .compare import INPUT, PASS, Row
from .goldens import Tolerance

HEAD = ("name", "shape", "max abs", "L1", "tolerance", "verdict")
NUMBERS = (2, 3, 4)  # columns that are set to the right


@dataclass(frozen=True)
class Report:
    """All rows, and the part of the set each belongs to."""

    parts: dict[str, list[Row]]  # by the stem of the file

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.parts.values() for row in rows]

    @property
    def n_rows(self) -> int:
        return sum(row.counts for row in self.rows)

    @property
    def n_failed(self) -> int:
        return sum(row.has_failed for row in self.rows)

    @property
    def passed(self) -> bool:
        return self.n_failed == 0

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else 1

    def to_json(self) -> str:
        """One line."""
        rows = [
            {
                "name": row.name,
                "shape": list(row.shape),
                "max_abs": _finite(row.max_abs),
                "l1": _finite(row.l1),
                "tolerance": row.tolerance,
                "verdict": row.verdict,
            }
            for row in self.rows
        ]
        outcome = {"passed": self.passed, "n_rows": self.n_rows, "n_failed": self.n_failed}
        return json.dumps({**outcome, "rows": rows}, ensure_ascii=False, allow_nan=False)

    def print(self, out: TextIO | None = None) -> None:
        """The table, a line for each stage, and last the JSON object; to stdout by default."""
        for line in (*_table(self.rows), "", *_summary(self), self.to_json()):
            print(line, file=out or sys.stdout)


def _table(rows: list[Row]) -> Iterator[str]:
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    for line in cells:
        padded = (
            cell.rjust(width) if i in NUMBERS else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    shape = "x".join(str(n) for n in row.shape) or "-"
    difference = (_number(row.max_abs), _number(row.l1))
    return (row.name, shape, *difference, _tolerance(row.tolerance), row.verdict)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def _tolerance(value: Tolerance) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _summary(report: Report) -> Iterator[str]:
    for stem, rows in report.parts.items():
        n_passed = sum(row.verdict == PASS for row in rows)
        n_given = sum(row.verdict == INPUT for row in rows)
        n_failed = sum(row.has_failed for row in rows)
        n_later = sum(not row.counts for row in rows)
        counts = f"{n_passed} passed, {n_failed} failed, {n_given} given"
        yield f"{stem}: {'recorded for later' if n_later else counts}"
    verdict = "parity holds" if report.passed else "parity FAILS"
    yield f"{verdict}: {report.n_rows} rows, {report.n_failed} failed"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
