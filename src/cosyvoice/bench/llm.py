"""The LLM: prefill and decode as the engine does them, sampling included, against the sweep.

In: a subject and its ceilings. Out: figures. It knows no flow and no audio.
"""

from typing import Any

import torch

from cosyvoice.engine.request import Utterance

from .ceilings import Ceilings
from .subject import Subject, WatchedRunner
from .timing import Timing, best_of, seconds_of

PREFILLS = (100, 300)  # positions
BATCHES = (1, 2, 4, 8)
N_CACHED = 300
N_WARM = 3


def figures(subject: Subject, ceilings: Ceilings, n_steps: int) -> dict[str, Any]:
    """n_steps: how often a decode step is timed at each batch size."""
    runner = WatchedRunner(subject.models, subject.config)
    prefills = {str(n): _prefill(subject, runner, n) for n in PREFILLS}
    sizes = [n for n in BATCHES if n <= subject.config.n_slots]
    decodes = {n: _decode(subject, runner, n, n_steps) for n in sizes}
    sweep = ceilings.sweep()
    read_s = ceilings.llm_bytes() / ceilings.read_rate()
    first, last = decodes[sizes[0]], decodes[sizes[-1]]
    return {
        "prefill": prefills,
        "decode": {str(n): timing for n, timing in decodes.items()},
        "decode_per_token_ms": {str(n): _ms(t.median_s / n) for n, t in decodes.items()},
        "sweep_ms": _ms(sweep.min_s),
        "decode_to_sweep": round(first.min_s / sweep.min_s, 3),
        "decode_to_sweep_median": round(first.median_s / sweep.median_s, 3),
        "decode_to_memory": round(first.min_s / read_s, 3),
        f"batch_{sizes[-1]}_to_1": round(last.min_s / first.min_s, 3),
    }


def _prefill(subject: Subject, runner: WatchedRunner, n_items: int) -> Timing:
    def go() -> None:
        utterance = subject.utterance(n_items)
        runner.read(utterance, n_items)
        runner.release_slot(utterance)

    return best_of(go, n=3, wait=subject.wait)


def _decode(subject: Subject, runner: WatchedRunner, n: int, n_steps: int) -> Timing:
    utterances = tuple(subject.utterance(N_CACHED, seed) for seed in range(n))
    for utterance in utterances:
        _step(runner, (utterance,))
    times = [seconds_of(lambda: _step(runner, utterances)) for _ in range(N_WARM + n_steps)]
    for utterance in utterances:
        runner.release_slot(utterance)
    return Timing(tuple(times[N_WARM:]))


def _step(runner: WatchedRunner, utterances: tuple[Utterance, ...]) -> None:
    with torch.inference_mode():
        for utterance, drawn in zip(utterances, runner.write(utterances), strict=True):
            utterance.accept(drawn)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
