"""Memory: of a text of several sentences, of many requests, and of very long ones.

In: a subject. Out: MiB, at present and at most. Peaks begin anew with each part where the system
lets us (Linux), else they are those of the whole process so far. It knows no network.
"""

from dataclasses import replace
from typing import Any

from cosyvoice.config import SAMPLE_RATE_HZ, TOKENS_HZ
from cosyvoice.engine.engine import Engine

from .machine import forget_peak, memory_mib
from .progress import tell
from .streams import listen, running
from .subject import Subject
from .timing import quantile

SENTENCE_S = 6
TEXT_S = 60
LONG_TEXT_S = 600
SHORT_TOKENS = 12
N_LEADING = 10  # requests until everything has its size


def figures(subject: Subject, n_requests: int, *, is_long: bool) -> dict[str, Any]:
    """is_long: ten minutes of sentences and one unbroken minute too."""
    found: dict[str, Any] = {"before": memory_mib(subject.device)}
    with running(subject) as (engine, _):
        tell(f"memory: {n_requests} short requests")
        found["requests"] = _requests(engine, subject, n_requests)
    found["sentences_60s"] = _sentences(subject, TEXT_S)
    if is_long:
        found["sentences_600s"] = _sentences(subject, LONG_TEXT_S)
        found["unbroken_60s"] = _unbroken(subject)
    return found


def _requests(engine: Engine, subject: Subject, n_requests: int) -> dict[str, Any]:
    """Growth from the tenth request to the last."""
    present = []
    for i in range(n_requests):
        listen(engine, subject.request(SHORT_TOKENS, seed=i))
        present.append(memory_mib(subject.device)["present"])
    start = present[min(N_LEADING, n_requests) - 1]
    return {
        "n": n_requests,
        "present_mib": present[-1],
        "growth_mib": round(present[-1] - start, 1),
    }


def _sentences(subject: Subject, text_s: int) -> dict[str, Any]:
    """A streamed text; is its memory at the end what it was in the beginning?"""
    n_sentences = text_s // SENTENCE_S
    request = subject.request(*[SENTENCE_S * TOKENS_HZ] * n_sentences)
    forget_peak(subject.device)
    present, audio_s, told = [], 0.0, 0
    with running(subject) as (engine, _):
        for piece in engine.submit(request):
            audio_s += len(piece) / SAMPLE_RATE_HZ
            present.append(memory_mib(subject.device)["present"])
            if int(audio_s) // 10 > told:
                told = int(audio_s) // 10
                tell(f"memory: {audio_s:.0f} of {text_s} s of sentences")
    half = len(present) // 2
    return memory_mib(subject.device) | {
        "audio_s": round(audio_s, 2),
        "median_first_half": quantile(present[:half], 0.5),
        "median_second_half": quantile(present[half:], 0.5),
    }


def _unbroken(subject: Subject) -> dict[str, Any]:
    """One sentence of a minute: what does not fit the flow's budget is computed anew."""
    tell("memory: one unbroken minute")
    forget_peak(subject.device)
    config = replace(subject.config, n_slots=1)
    with running(subject.under(config)) as (engine, runner):
        heard = listen(engine, subject.request(TEXT_S * TOKENS_HZ))
    return memory_mib(subject.device) | {
        "audio_s": round(heard.audio_s, 2),
        "rtf": round(heard.rtf, 3),
        "flow_budget_mib": config.flow_bytes >> 20,
        "n_dropped_steps": runner.n_dropped_steps,
    }
