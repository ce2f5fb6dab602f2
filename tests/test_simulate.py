"""The simulation of scheduling rules: laws of every rule, and never a time."""

import io
import json
from dataclasses import asdict, replace
from math import inf
from pathlib import Path

import pytest

from cosyvoice.config import TOKEN_SAMPLES
from cosyvoice.errors import BadRequest
from cosyvoice.simulate import print_report, read_costs, run_rules
from cosyvoice.simulate.contest import FIRST, KEPT, RULES, Row, best
from cosyvoice.simulate.costs import LARGE_GPU, TWO_CORES, Costs, Span
from cosyvoice.simulate.load import Line, Load, write_lines
from cosyvoice.simulate.rehearsal import FIRST_ID, Heard, Rehearsal
from cosyvoice.simulate.rules import Rule
from cosyvoice.simulate.score import percentile, score

LINES = write_lines(7, 8, offline_share=0.3)
LOADS = (Load(offered=20.0), Load(n_clients=5))


def perform(rule: Rule | None, load: Load, costs: Costs = LARGE_GPU) -> list[Heard]:
    return Rehearsal(LINES, load, rule, costs).perform()


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.name)
@pytest.mark.parametrize("rule", (None, *RULES), ids=lambda rule: rule.name if rule else "engine's")
def test_every_line_is_heard_whole_and_in_order(rule: Rule | None, load: Load) -> None:
    performed = perform(rule, load)
    assert sorted(map(id, (h.line for h in performed))) == sorted(map(id, LINES))
    for h in performed:
        expected = [
            (sentence, FIRST_ID + i)
            for sentence, (_, n_tokens) in enumerate(h.line.sentences)
            for i in range(n_tokens)
        ]
        assert h.tokens == expected
        assert round(h.audio_s * 24_000) == len(expected) * TOKEN_SAMPLES


@pytest.mark.parametrize("rule", (None, *RULES), ids=lambda rule: rule.name if rule else "engine's")
def test_time_only_moves_on(rule: Rule | None) -> None:
    rehearsal = Rehearsal(LINES, LOADS[1], rule, LARGE_GPU)
    for h in rehearsal.perform():
        times = [h.asked_at_s, *(at_s for at_s, _ in h.pieces), h.ended_at_s]
        assert times == sorted(times)  # type: ignore[type-var]
    assert 0 < rehearsal.busy_s <= rehearsal.now_s


def test_the_kept_rule_is_what_the_engine_does() -> None:
    for load in LOADS:
        for costs in (LARGE_GPU, TWO_CORES):
            ours, kept = perform(None, load, costs), perform(KEPT, load, costs)
            assert [h.pieces for h in ours] == [h.pieces for h in kept]


def test_same_seed_same_report() -> None:
    first, again, other = (run_rules((LARGE_GPU,), n_lines=3, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.rows != other.rows


def test_no_more_clients_than_asked_for_are_served_at_once() -> None:
    performed = perform(None, Load(n_clients=3))
    for h in performed:
        beside = [o for o in performed if o.asked_at_s <= h.asked_at_s < (o.ended_at_s or inf)]
        assert len(beside) <= 3


def test_gaps_are_the_silence_between_pieces() -> None:
    line = Line(streaming=True, n_prompt_tokens=0, sentences=((10, 50),), arrives=0)
    h = Heard(line, 1.0, pieces=[(2.0, 0.5), (2.25, 0.5), (3.25, 0.5), (4.0, 0.5)])
    assert h.first_audio_s == 1.0
    assert h.gaps_s == [0.0, 0.0, 0.25, 0.25]
    assert score([h], busy_s=1.0).c200 == 0.0


def test_percentile_is_one_of_the_values() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([3.0], 0.99) == 3.0


def test_who_shares_a_pass_pays_for_it_once() -> None:
    span = Span(n_frames=50, n_keys=300)
    for costs in (LARGE_GPU, TWO_CORES):
        alone, together = costs.render([span]), costs.render([span] * 4)
        assert together == pytest.approx(4 * alone - 3 * costs.flow_pass_s)


def test_the_best_rule_keeps_streams_whole_and_throughput_up() -> None:
    like = score(perform(None, LOADS[0]), busy_s=1.0)

    def rows(rule: str, p95_s: float, c100: float, rate: float) -> list[Row]:
        s = replace(like, first_audio_p95_s=p95_s, c100=c100, audio_per_s=rate)
        return [Row("m", load, rule, s) for load in LOADS]

    first = rows(FIRST.name, 0.9, 1.0, 10.0)
    soon = rows("soon", 0.5, 0.99, 9.8)
    broken = rows("broken", 0.1, 0.98, 10.0)
    slow = rows("slow", 0.1, 1.0, 9.6)
    winner = best([*first, *soon, *broken, *slow])
    assert winner is not None
    assert winner.rule == "soon"
    assert best(broken + rows(FIRST.name, 0.9, 0.5, 10.0)) is None


def test_report_ends_with_one_line_of_json() -> None:
    report = run_rules((replace(LARGE_GPU, machine="ours"),), n_lines=2)
    out = io.StringIO()
    print_report(report, out)
    last = json.loads(out.getvalue().splitlines()[-1])
    assert len(last["rows"]) == len(report.rows)
    assert set(last["best"]) == {"ours"}


def test_measured_costs_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(asdict(TWO_CORES)))
    assert read_costs(path) == TWO_CORES
    for wrong in ({"decode_s": -1.0}, {"n_slots": 0}, {"machine": 3}, {"speed": 1.0}):
        path.write_text(json.dumps(asdict(TWO_CORES) | wrong))
        with pytest.raises(BadRequest):
            read_costs(path)
    with pytest.raises(BadRequest, match="no JSON"):
        read_costs(tmp_path / "missing.json")
