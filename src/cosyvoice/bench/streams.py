"""Whole requests through the engine: first audio, real-time factor, alone and together.

In: a subject. Out: figures. A request's clock starts before it is submitted and is read when audio
is put on its stream, so what a caller would see is what is measured. It knows no network.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosyvoice.config import SAMPLE_RATE_HZ, TOKENS_HZ
from cosyvoice.engine.engine import Engine
from cosyvoice.engine.request import Request
from cosyvoice.engine.stream import Audio, Stream

from .progress import tell
from .subject import Subject, WatchedRunner, on_its_own_thread
from .timing import Timing, quantile

STREAM_S = (4, 16)
OFFLINE_S = (4, 10)
WARM_TOKENS = 30
CONCURRENT_S = 4
UNHEARD_VOICE = 1000  # seeds from here on are new voices


@dataclass(frozen=True)
class Heard:
    """One request's audio as it came."""

    start_s: float
    arrivals: tuple[tuple[float, int], ...]  # when, and how many samples
    audio: Audio

    @property
    def first_s(self) -> float:
        return self.arrivals[0][0] - self.start_s

    @property
    def stop_s(self) -> float:
        return self.arrivals[-1][0]

    @property
    def total_s(self) -> float:
        return self.stop_s - self.start_s

    @property
    def audio_s(self) -> float:
        return len(self.audio) / SAMPLE_RATE_HZ

    @property
    def rtf(self) -> float:
        return self.total_s / self.audio_s

    @property
    def stalled_s(self) -> float:
        """How long a listener who starts at the first audio would have waited in all."""
        heard_until_s, stalled_s = self.arrivals[0][0], 0.0
        for when_s, n_samples in self.arrivals:
            stalled_s += max(0.0, when_s - heard_until_s)
            heard_until_s = max(heard_until_s, when_s) + n_samples / SAMPLE_RATE_HZ
        return stalled_s


@contextmanager
def running(subject: Subject) -> Iterator[tuple[Engine, WatchedRunner]]:
    """An engine that is stopped in the end."""
    runner = on_its_own_thread(lambda: WatchedRunner(subject.models, subject.config))
    engine = Engine(runner, subject.config)
    try:
        yield engine, runner
    finally:
        engine.close()


def listen(engine: Engine, request: Request) -> Heard:
    """Submit and hear to the end."""
    start_s = time.monotonic()
    return _hear(engine.submit(request), start_s)


def _hear(stream: Stream, start_s: float) -> Heard:
    arrivals, pieces = [], []
    for piece in stream:
        arrivals.append((time.monotonic(), len(piece)))
        pieces.append(piece)
    return Heard(start_s, tuple(arrivals), np.concatenate(pieces))


def listen_together(engine: Engine, requests: Sequence[Request]) -> list[Heard]:
    """Submit all at once and hear each in a thread of its own."""
    heard: dict[int, Heard] = {}
    start_s = time.monotonic()
    streams = [engine.submit(request) for request in requests]

    def hear(i: int) -> None:
        heard[i] = _hear(streams[i], start_s)

    threads = [threading.Thread(target=hear, args=(i,)) for i in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [heard[i] for i in range(len(streams))]


def figures(
    subject: Subject, n_repeats: int, lengths: Sequence[int] = (), *, only_streaming: bool = False
) -> dict[str, Any]:
    """lengths: tokens to force, instead of the usual ones."""
    with running(subject) as (engine, runner):
        listen(engine, subject.request(WARM_TOKENS))

        def timed(kind: str, requests: Sequence[Request]) -> dict[str, Any]:
            tell(f"stream: {kind}, {requests[0].max_tokens} tokens")
            return _summary([_noted(engine, runner, request) for request in requests])

        goes = range(n_repeats)
        found: dict[str, Any] = {"known_voice": {}, "new_voice": {}, "offline": {}}
        for n in lengths or _tokens(STREAM_S):
            known = [subject.request(n, seed=i) for i in goes]
            new = [subject.request(n, voice_seed=UNHEARD_VOICE + n + i) for i in goes]
            found["known_voice"][_named(n)] = timed("known voice", known)
            found["new_voice"][_named(n)] = timed("new voice", new)
        for n in () if only_streaming else lengths or _tokens(OFFLINE_S):
            whole = [subject.request(n, seed=i, streaming=False) for i in goes]
            found["offline"][_named(n)] = timed("offline", whole)
    return found


def _tokens(seconds: Sequence[int]) -> list[int]:
    return [s * TOKENS_HZ for s in seconds]


def _named(n_tokens: int) -> str:
    return f"{n_tokens / TOKENS_HZ:g}s"


Noted = tuple[Heard, dict[str, float]]


def _noted(engine: Engine, runner: WatchedRunner, request: Request) -> Noted:
    """What was heard, and the seconds of each kind of step."""
    runner.forget()
    return listen(engine, request), runner.shares_s()


def _summary(noted: Sequence[Noted]) -> dict[str, Any]:
    """The fastest go's chunks and steps stand for all."""
    heard, steps_s = min(noted, key=lambda one: one[0].total_s)
    rest_s = heard.total_s - sum(steps_s.values())
    return {
        "first_audio": Timing(tuple(h.first_s for h, _ in noted)),
        "whole": Timing(tuple(h.total_s for h, _ in noted)),
        "audio_s": round(heard.audio_s, 3),
        "rtf": _rtf([h for h, _ in noted]),
        "stalled_s": round(heard.stalled_s, 3),
        "steps_s": {k: round(v, 3) for k, v in steps_s.items()} | {"rest": round(rest_s, 3)},
        "arrivals_s": [round(when - heard.start_s, 3) for when, _ in heard.arrivals],
    }


def _rtf(heard: Sequence[Heard]) -> dict[str, float]:
    factors = [h.rtf for h in heard]
    return {
        "median": round(quantile(factors, 0.5), 3),
        "p95": round(quantile(factors, 0.95), 3),
        "min": round(min(factors), 3),
    }


def concurrency(
    subject: Subject, sizes: Sequence[int], n_tokens: int = CONCURRENT_S * TOKENS_HZ
) -> dict[str, Any]:
    """Several streams with one known voice at once, and whether each says what it says alone."""
    found: dict[str, Any] = {}
    with running(subject) as (engine, runner):
        listen(engine, subject.request(WARM_TOKENS))
        runner.forget()
        requests = [subject.request(n_tokens, seed=i) for i in range(max(sizes))]
        tell(f"concurrency: {len(requests)} requests, one by one")
        alone = [listen(engine, request) for request in requests]
        alone_tokens = dict(runner.tokens)
        for n in sizes:
            tell(f"concurrency: {n} at once")
            runner.forget()
            together = listen_together(engine, requests[:n])
            equal = [runner.tokens[i] == alone_tokens[i] for i in range(n)]
            found[str(n)] = _crowd(together) | {
                "share_of_equal_tokens": sum(equal) / n,
                "largest_audio_difference": max(
                    _difference(a.audio, b.audio) for a, b in zip(alone, together, strict=False)
                ),
            }
    return found


def _crowd(heard: Sequence[Heard]) -> dict[str, Any]:
    whole_s = max(h.stop_s for h in heard) - heard[0].start_s
    stalls = [h.stalled_s for h in heard]
    first = [h.first_s for h in heard]
    return {
        "audio_s_per_s": round(sum(h.audio_s for h in heard) / whole_s, 3),
        "first_audio": Timing(tuple(first)),
        "first_audio_p99_ms": round(1e3 * quantile(first, 0.99), 1),
        "rtf": _rtf(heard),
        "share_without_stall": sum(s == 0 for s in stalls) / len(stalls),
        "stalled_s_median": round(quantile(stalls, 0.5), 3),
    }


def _difference(a: Audio, b: Audio) -> float:
    """Largest difference of two pieces of audio; infinite where their lengths differ."""
    return float(np.abs(a - b).max()) if len(a) == len(b) else float("inf")
