"""The outcome of a comparison of rules, as tables for people and one JSON line for programs.

In: rows of scores. Out: text. It knows no clock and no scheduler.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

from .contest import Row, best, contest
from .costs import LARGE_GPU, TWO_CORES, Costs

HEAD = (
    *("rule", "first audio p50", "p95", "p99", "C50", "C100", "C200"),
    *("gaps s", "file s", "audio s/s"),
)
MACHINES = (LARGE_GPU, TWO_CORES)
N_LINES = 240


@dataclass(frozen=True)
class Report:
    """Rows of all machines, in the order of the loads."""

    machines: tuple[Costs, ...]
    rows: tuple[Row, ...]
    n_lines: int
    seed: int

    def of(self, costs: Costs) -> list[Row]:
        return [row for row in self.rows if row.machine == costs.machine]

    def to_json(self) -> str:
        """One line; what could not be measured is null."""
        rows = [
            {"machine": row.machine, "load": row.load.name, "rule": row.rule}
            | {name: _finite(value) for name, value in asdict(row.score).items()}
            for row in self.rows
        ]
        winners = {costs.machine: best(self.of(costs)) for costs in self.machines}
        chosen = {machine: row and row.rule for machine, row in winners.items()}
        outcome = {"n_lines": self.n_lines, "seed": self.seed, "best": chosen}
        return json.dumps({**outcome, "rows": rows}, allow_nan=False)


def run_rules(
    machines: Sequence[Costs] = MACHINES, *, n_lines: int = N_LINES, seed: int = 0
) -> Report:
    """Compare all rules on all machines; the same arguments give the same report."""
    rows = [row for costs in machines for row in contest(costs, n_lines=n_lines, seed=seed)]
    return Report(tuple(machines), tuple(rows), n_lines, seed)


def print_report(report: Report, file: TextIO | None = None) -> None:
    """Markdown tables, one for each machine and load, then one JSON line; to standard output."""
    file = file or sys.stdout
    for line in lines_of(report):
        file.write(line + "\n")
    file.write(report.to_json() + "\n")


def lines_of(report: Report) -> Iterator[str]:
    """The tables."""
    for costs in report.machines:
        rows = report.of(costs)
        for load in dict.fromkeys(row.load for row in rows):
            yield f"### {costs.machine}, {load.name}\n"
            yield "| " + " | ".join(HEAD) + " |"
            yield "|---|" + "--:|" * (len(HEAD) - 1)
            yield from (_line(row) for row in rows if row.load == load)
            yield ""
        winner = best(rows)
        yield (
            f"Best on {costs.machine}: {winner.rule}, at {winner.load.name}\n"
            if winner
            else f"No rule keeps streams whole on {costs.machine}: none is chosen\n"
        )


def _line(row: Row) -> str:
    s = row.score
    first = (f"{x:.2f}" for x in (s.first_audio_p50_s, s.first_audio_p95_s, s.first_audio_p99_s))
    whole = (f"{100 * x:.0f} %" for x in (s.c50, s.c100, s.c200))
    rest = (f"{s.gap_s:.1f}", f"{s.offline_p50_s:.1f}", f"{s.audio_per_s:.2f}")
    return "| " + " | ".join((row.rule, *first, *whole, *rest)) + " |"


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
