"""A parity run: every stage computed, every tensor and value of the set compared.

In: a model directory, a golden set, the stages asked for. Out: a `Report`. What a stage cannot
compute is a failed row; only a broken set or model directory stops the run. It knows no tensor's
meaning.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cosyvoice.errors import BadRequest, ModelFilesError

from .compare import FAIL, LATER, Row, compare_tensors, compare_values, uncompared
from .found import Computed, Fact, Found
from .goldens import INPUT, GoldenSet, Part, SetError, shown
from .report import Report
from .stages import STAGES, Stage
from .subject import Subject

NOISE = "noise"  # given to stages 6 and 7
NOISE_STAGES = frozenset({6, 7})
TRAINING = "9_"  # `cosyvoice train` answers for it

Tell = Callable[[str], None]


def tell_stderr(line: str) -> None:
    """How far the run is, for whoever watches."""
    print(line, file=sys.stderr, flush=True)


def run(
    model_dir: Path,
    goldens: Path,
    stages: Collection[int] | None = None,
    *,
    tell: Tell = tell_stderr,
) -> Report:
    """Compare the model's `stages`, all if none is named, with a golden set.

    Raises BadRequest where the set is broken or a stage does not exist, and ModelFilesError where
    the model directory is.
    """
    golden_set = GoldenSet.open(Path(goldens))
    chosen = _chosen(stages or ())
    with steady():
        subject = Subject(Path(model_dir), golden_set)
        parts = {stage.stem: _timed(golden_set, stage, subject, tell) for stage in chosen}
    return Report(parts | _others(golden_set, chosen))


def _timed(golden_set: GoldenSet, stage: Stage, subject: Subject, tell: Tell) -> list[Row]:
    started_s = time.monotonic()
    rows = _rows(Part(golden_set, stage.stem), stage, subject)
    n_failed = sum(row.has_failed for row in rows)
    seconds = time.monotonic() - started_s
    tell(f"stage {stage.stem}: {len(rows)} rows, {n_failed} failed, {seconds:.1f} s")
    return rows


def _others(golden_set: GoldenSet, chosen: list[Stage]) -> dict[str, list[Row]]:
    """Rows of the files that belong to no stage of ours: noise, training, what we do not know."""
    others = {}
    for file in golden_set.specs:
        part = Part(golden_set, file.removesuffix(".safetensors"))
        is_asked = len(chosen) == len(STAGES)
        if part.stem == NOISE:
            is_asked = any(stage.number in NOISE_STAGES for stage in chosen)
        if not is_asked or any(part.stem == stage.stem for stage in STAGES):
            continue
        if part.stem.startswith(TRAINING):
            others[part.stem] = [Row(file, (len(part.specs),), None, None, LATER, LATER)]
        else:
            golden_set.check(file)
            others[part.stem] = Comparison(part).rows()
    return others


@contextmanager
def steady() -> Iterator[None]:
    """One thread and no gradients: the same sums in the same order every time."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(n_threads)


def _chosen(numbers: Collection[int]) -> list[Stage]:
    known = {stage.number for stage in STAGES}
    for number in numbers:
        if number not in known:
            raise BadRequest(
                f"there is no stage {number}: choose from {min(known)} to {max(known)}"
            )
    return [stage for stage in STAGES if not numbers or stage.number in numbers]


def _rows(part: Part, stage: Stage, subject: Subject) -> list[Row]:
    """All rows of a stage, in the order of the set, then the values of its document."""
    if part.specs:
        part.whole.check(part.file)
    comparison = Comparison(part)
    problem = ""
    try:
        for found in stage.compute(part, subject):
            comparison.take(found)
    except (SetError, ModelFilesError):
        raise
    except Exception as error:  # noqa: BLE001 - reported as rows, and the other stages still run
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return comparison.rows(problem)


class Comparison:
    """Collects the rows of one stage."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._tensors: dict[str, Row] = {}
        self._facts: list[Row] = []

    def take(self, found: Found) -> None:
        if isinstance(found, Fact):
            self._facts.append(self._fact(found))
        elif found.name in self._part.specs:
            self._tensors[found.name] = self._tensor(found)
        elif found.is_piece:
            shape = tuple(found.value.shape)
            verdict = f"{FAIL}: the set has no such piece"
            self._facts.append(Row(self._name(found.name), shape, None, None, INPUT, verdict))

    def rows(self, problem: str = "") -> list[Row]:
        """One row for each tensor of the set; `problem` says why some are not computed."""
        rows = [self._tensors.get(name) or self._absent(name, problem) for name in self._part.specs]
        if problem and not any(problem in row.verdict for row in rows):
            rows.append(Row(f"{self._part.stem}: all", (), None, None, INPUT, f"{FAIL}: {problem}"))
        return [*rows, *self._facts]

    def _tensor(self, found: Computed) -> Row:
        spec, golden = self._part.specs[found.name], self._part.tensor(found.name)
        if spec.tolerance == INPUT:
            return uncompared(self._name(found.name), spec, INPUT)
        ours = found.value[..., : golden.shape[-1]] if found.is_head else found.value
        return compare_tensors(
            self._name(found.name),
            ours,
            golden,
            tolerance=spec.tolerance,
            max_rms=self._max_rms(found.name),
        )

    def _max_rms(self, name: str) -> float | None:
        """The bound on waveforms that `params` sets, if this is one it names."""
        rule = self._part.whole.params.get("waveform_rms")
        is_waveform = name.rpartition(".")[2].startswith("wav")
        if not (rule and is_waveform and self._part.stem in str(rule["applies_to"])):
            return None
        return float(rule["max_rms_difference"])

    def _absent(self, name: str, problem: str) -> Row:
        spec = self._part.specs[name]
        is_given = spec.tolerance == INPUT
        return uncompared(
            self._name(name), spec, INPUT if is_given else f"{FAIL}: {problem or 'not computed'}"
        )

    def _fact(self, fact: Fact) -> Row:
        file = fact.file or self._part.text_file
        return compare_values(
            f"{file}:{shown(fact.place)}", fact.value, self._part.whole.at(file, fact.place)
        )

    def _name(self, name: str) -> str:
        return f"{self._part.file}:{name}"
