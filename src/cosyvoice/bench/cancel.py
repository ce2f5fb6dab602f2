"""Closing a stream in the middle: how long does its work go on?

In: a subject. Out: milliseconds from `close()` to the freeing of all the request holds, at each
kind of step. It is closed as such a step begins, so the figure is about the step's own length.
"""

import threading
import time
from typing import Any

from cosyvoice.config import TOKENS_HZ

from .streams import WARM_TOKENS, listen, running
from .subject import Subject, Watch
from .timing import Timing

STAGES = ("prefill", "decode", "render")
SPEECH_S = 12  # never heard to the end
LIMIT_S = 120.0


def figures(subject: Subject, n_repeats: int) -> dict[str, Any]:
    """Orphaned work by stage, and the longest step of that kind while nobody was cancelled."""
    with running(subject) as (engine, runner):
        listen(engine, subject.request(WARM_TOKENS))
        longest_s = {
            k: max(d.stop_s - d.start_s for d in runner.did if d.kind == k) for k in STAGES
        }

        def orphaned_s(stage: str) -> float:
            begun, watch = threading.Event(), Watch()
            watch.began[stage] = begun
            runner.watch = watch
            stream = engine.submit(subject.request(SPEECH_S * TOKENS_HZ))
            assert begun.wait(LIMIT_S), f"no {stage} within {LIMIT_S} s"
            start_s = time.monotonic()
            stream.close()
            assert watch.released.wait(LIMIT_S), f"not freed within {LIMIT_S} s of closing"
            return time.monotonic() - start_s

        found = {s: Timing(tuple(orphaned_s(s) for _ in range(n_repeats))) for s in STAGES}
    return {
        "orphaned": found,
        "longest_step_ms": {stage: round(1e3 * s, 2) for stage, s in longest_s.items()},
    }
