"""One benchmark run: load, measure the ceilings, warm up, measure the parts, report.

In: options. Out: lines on stdout, the last of them one JSON object; progress on stderr. It knows
how nothing is measured.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cosyvoice.config import EngineConfig
from cosyvoice.engine.loading import load_models
from cosyvoice.errors import BadRequest
from cosyvoice.models.checkpoint import resolve_model_dir

from . import cancel, ceilings, flow, formats, llm, memory, streams, vocoder
from .ceilings import Ceilings
from .goals import judge
from .machine import forget_peak, machine, memory_mib
from .progress import tell
from .report import goal_lines, lines, to_json
from .subject import Subject, on_its_own_thread

PARTS = (
    "ceilings", "llm", "flow", "vocoder", "stream", "concurrency", "memory", "errors", "cancel",
)  # fmt: skip
CONCURRENCY = (1, 2, 4, 8)
STEPS_PER_REPEAT = 10  # of the LLM, which are short


@dataclass(frozen=True)
class Options:
    """What to measure, and how often."""

    model_dir: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    only: tuple[str, ...] = ()  # parts; all where empty
    prompt_s: float = 5.0
    n_tokens: int | None = None  # of speech, in `stream` and `concurrency`
    concurrency: tuple[int, ...] = ()
    n_repeats: int = 3
    n_requests: int = 20
    n_threads: int | None = None
    only_streaming: bool = False
    is_long: bool = False
    json_only: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        unknown = set(self.only) - set(PARTS)
        if unknown:
            raise BadRequest(f"no such part: {', '.join(sorted(unknown))}; use {', '.join(PARTS)}")
        return tuple(part for part in PARTS if not self.only or part in self.only)

    @property
    def engine(self) -> EngineConfig:
        """Slots for the largest crowd."""
        crowd = max(self.concurrency or CONCURRENCY)
        return EngineConfig(n_slots=max(EngineConfig.n_slots, crowd))


def names(listed: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name for name in listed.replace(" ", "").split(",") if name)


@dataclass
class Bench:
    """A run: what it measures on, and what it has found so far."""

    options: Options
    subject: Subject
    ceilings: Ceilings
    model_dir: Path
    found: dict[str, Any] = field(default_factory=dict)

    def measure(self, part: str) -> None:
        """Run one part, print it, and note the memory it took."""
        tell(part)
        start_s = time.monotonic()
        forget_peak(self.subject.device)
        self.found[part] = self._parts[part]()
        held = memory_mib(self.subject.device)
        self.found.setdefault("memory_after_mib", {})[part] = held
        took = f"{part} ({time.monotonic() - start_s:.1f} s, peak {held['peak']:.0f} MiB)"
        self.show(lines(took, self.found[part]))

    def show(self, shown: Sequence[str]) -> None:
        if not self.options.json_only:
            _write(shown)

    @property
    def _parts(self) -> dict[str, Callable[[], dict[str, Any]]]:
        o, subject = self.options, self.subject
        lengths = (o.n_tokens,) if o.n_tokens else ()
        return {
            "ceilings": lambda: ceilings.figures(self.ceilings),
            "llm": lambda: llm.figures(subject, self.ceilings, STEPS_PER_REPEAT * o.n_repeats),
            "flow": lambda: flow.figures(subject, self.ceilings, o.n_repeats),
            "vocoder": lambda: vocoder.figures(subject, o.n_repeats),
            "stream": lambda: streams.figures(
                subject, o.n_repeats, lengths, only_streaming=o.only_streaming
            ),
            "concurrency": lambda: streams.concurrency(
                subject, o.concurrency or CONCURRENCY, *lengths
            ),
            "memory": lambda: memory.figures(subject, o.n_requests, is_long=o.is_long),
            "errors": lambda: formats.figures(self.model_dir, subject.device, o.prompt_s),
            "cancel": lambda: cancel.figures(subject, o.n_repeats),
        }


def run(options: Options) -> dict[str, Any]:
    """Measure and print; what is printed last comes back too. Raises SpeechError."""
    parts = options.parts
    if options.n_threads:
        torch.set_num_threads(options.n_threads)
    bench = on_its_own_thread(lambda: _load(options))
    bench.show(lines("machine", bench.found["machine"]))
    bench.show(lines("model", bench.found["model"]))
    for part in parts:
        on_its_own_thread(partial(bench.measure, part))
    bench.found["goals"] = judge(bench.found)
    bench.show(goal_lines(bench.found["goals"]))
    _write(["", to_json(bench.found)] if not options.json_only else [to_json(bench.found)])
    return bench.found


def _load(options: Options) -> Bench:
    model_dir, note = resolve_model_dir(options.model_dir)
    tell(note)
    start_s = time.monotonic()
    models = load_models(model_dir, device=options.device, dtype=options.dtype)
    load_s = time.monotonic() - start_s
    subject = Subject(models, options.engine, options.prompt_s)
    found = {
        "machine": machine(models.device),
        "number_format": models.number_format,
        "prompt_s": options.prompt_s,
        "model": {
            "directory": str(model_dir),
            "number_format": models.number_format,
            "load_s": round(load_s, 2),
            "after_load_mib": memory_mib(models.device),
        },
    }
    return Bench(options, subject, Ceilings(subject), model_dir, found)


def _write(shown: Sequence[str]) -> None:
    sys.stdout.write("\n".join(shown) + "\n")
    sys.stdout.flush()
