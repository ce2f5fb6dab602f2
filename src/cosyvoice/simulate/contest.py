"""Which rules meet under which loads on which machines, and who wins.

In: how many lines, a seed, and costs if there are measured ones. Out: rows with scores, and the
best rule of a machine by one stated criterion. It knows no table.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import inf

from .costs import LARGE_GPU, TWO_CORES, Costs
from .load import Load, write_lines
from .rehearsal import N_TOGETHER, Rehearsal
from .rules import Rule
from .score import Score, score

ENGINE = "the engine's"
FIRST = Rule("a  render first")
GUARDED = Rule("", slack_passes=2.0, guard_s=0.3, n_together=N_TOGETHER)
KEPT = replace(GUARDED, name=ENGINE, renders_if_few_write=True)  # what the engine does
RULES: tuple[Rule, ...] = (
    FIRST,
    *(Rule(f"b  slack {slack_s:g} s", slack_s=slack_s) for slack_s in (0.2, 0.5, 1.0, 2.0)),
    Rule("c  newcomers, then slack 0.5 s", slack_s=0.5, unstarted_s=-inf),
    Rule("d  slack 0.5 s, prefill, render", slack_s=0.5, prefill_first=True),
    *(Rule(f"e  {n} together", n_together=n) for n in (2, 4, N_TOGETHER)),
    Rule("b+e  slack 0.5 s, 16 together", slack_s=0.5, n_together=N_TOGETHER),
    Rule("b+e  slack 2 passes, 16 together", slack_passes=2.0, n_together=N_TOGETHER),
    replace(GUARDED, name="and a guard of 0.3 s"),
    replace(KEPT, name="engine's, 1 together", n_together=1),
    replace(KEPT, name="engine's, 4 together", n_together=4),
    replace(KEPT, name="f  engine's, hops of 25", hop_blocks=(1,)),
    replace(KEPT, name="f  engine's, hops of what is there", hop_blocks=None),
    replace(KEPT, name="f  engine's, first hop of 20 at least", first_hop_tokens=20),
    replace(KEPT, name="g  engine's, 4 writers", n_writers=4),
    replace(KEPT, name="g  engine's, 16 writers", n_writers=16),
    replace(KEPT, name="engine's, files last", files_last=True),
)
CLIENTS = (1, 2, 4, 8, 16, 32)
OFFERED = {TWO_CORES.machine: (0.3, 0.6), LARGE_GPU.machine: (20.0, 35.0)}  # audio s per s
FULL = {TWO_CORES.machine: 4, LARGE_GPU.machine: 32}  # clients
FEW_CLIENTS = 2
MANY_CLIENTS = 32  # for a machine we know nothing of
MIN_CONTINUITY = 0.99
MIN_THROUGHPUT = 0.97


@dataclass(frozen=True)
class Row:
    """One rule under one load on one machine."""

    machine: str
    load: Load
    rule: str
    score: Score


def contest(costs: Costs, *, n_lines: int, seed: int) -> list[Row]:
    """All rules under four loads, then the first and the engine's with ever more clients."""
    n_full = FULL.get(costs.machine, MANY_CLIENTS)
    offered = OFFERED.get(costs.machine) or _offered(costs, n_lines=n_lines, seed=seed)
    loads = [Load(offered=each) for each in offered]
    loads += [Load(n_clients=n) for n in (FEW_CLIENTS, n_full)]
    rows = [
        _row(costs, load, rule, n_lines=n_lines, seed=seed)
        for rule in (None, *RULES)
        for load in loads
    ]
    sweep = [Load(n_clients=n) for n in CLIENTS if n not in (FEW_CLIENTS, n_full)]
    rows += [
        _row(costs, load, rule, n_lines=n_lines, seed=seed)
        for rule in (None, FIRST)
        for load in sweep
    ]
    return rows


def _offered(costs: Costs, *, n_lines: int, seed: int) -> tuple[float, float]:
    """A half and nine tenths of what the machine can do under the first rule."""
    full = Load(n_clients=MANY_CLIENTS)
    most = _row(costs, full, FIRST, n_lines=n_lines, seed=seed).score.audio_per_s
    return most / 2, most * 0.9


def _row(costs: Costs, load: Load, rule: Rule | None, *, n_lines: int, seed: int) -> Row:
    lines = write_lines(seed, n_lines, offline_share=load.offline_share)
    rehearsal = Rehearsal(lines, load, rule, costs)
    heard = rehearsal.perform()
    name = rule.name if rule is not None else ENGINE
    return Row(costs.machine, load, name, score(heard, rehearsal.busy_s))


def best(rows: Iterable[Row]) -> Row | None:
    """The best rule of one machine, shown under the load that decides; None where there is none.

    At the highest offered load that some rule bears with 99 in 100 streams free of gaps over
    100 ms: of the rules that do, and lose no more than 3 in 100 of the first rule's throughput
    with few clients or many, the one whose first audio comes soonest at p95.
    """
    rows = list(rows)
    slow = _slower_than_first(rows)
    bearing = [
        row
        for row in rows
        if row.load.offered and row.score.c100 >= MIN_CONTINUITY and row.rule not in slow
    ]
    highest = max((row.load.offered for row in bearing), default=0.0)
    return min(
        (row for row in bearing if row.load.offered == highest),
        key=lambda row: row.score.first_audio_p95_s,
        default=None,
    )


def _slower_than_first(rows: list[Row]) -> set[str]:
    closed = [row for row in rows if row.load.n_clients]
    least = {
        row.load: MIN_THROUGHPUT * row.score.audio_per_s for row in closed if row.rule == FIRST.name
    }
    return {row.rule for row in closed if row.score.audio_per_s < least[row.load]}
