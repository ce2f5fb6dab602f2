"""The scheduler: of all utterances, which one step next.

In: utterances, and the time. Out: a step, as data. It knows no torch and does no work itself.

The rule: render the stream that will fall silent first; else give a free slot to the oldest
waiting sentence; else let everybody with something to say draw a token, together.
"""

from dataclasses import dataclass

from cosyvoice.config import SAMPLE_RATE_HZ

from .request import Utterance
from .stream import Stream


@dataclass(frozen=True)
class Prefill:
    """Feed one utterance several items and draw once."""

    utterance: Utterance


@dataclass(frozen=True)
class Decode:
    """Feed each utterance its one item and draw once for each."""

    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class Render:
    """Turn one utterance's next chunk into audio."""

    utterance: Utterance


Step = Prefill | Decode | Render


def buffered_s(stream: Stream, now_s: float) -> float:
    """Seconds of audio a listener in real time still has; an unstarted stream has none."""
    if stream.first_audio_at_s is None:
        return 0.0
    return stream.n_samples / SAMPLE_RATE_HZ - (now_s - stream.first_audio_at_s)


class Scheduler:
    """Holds all utterances, in the order in which they came."""

    def __init__(self, n_ahead: int) -> None:
        self._n_ahead = n_ahead  # sentences of one request written before they are due
        self._utterances: list[Utterance] = []

    @property
    def utterances(self) -> tuple[Utterance, ...]:
        return tuple(self._utterances)

    def add(self, utterance: Utterance) -> None:
        self._utterances.append(utterance)

    def remove(self, utterance: Utterance) -> None:
        self._utterances.remove(utterance)

    def of(self, stream: Stream) -> list[Utterance]:
        return [u for u in self._utterances if u.stream is stream]

    def next(self, now_s: float, n_free_slots: int) -> Step | None:
        """The next step, or None where everybody waits for text or there is nobody."""
        return self._render(now_s) or self._prefill(n_free_slots) or self._decode()

    def _render(self, now_s: float) -> Render | None:
        ready = [u for u in self._utterances if u.is_due and u.has_chunk]
        if not ready:
            return None
        # Nobody listens to an unfinished file, so it has time.
        return Render(
            min(ready, key=lambda u: (not u.request.streaming, buffered_s(u.stream, now_s)))
        )

    def _prefill(self, n_free_slots: int) -> Prefill | None:
        for utterance in self._utterances:
            if utterance.wants_step and len(utterance.pending) > 1:
                return Prefill(utterance)
        if n_free_slots:
            for utterance in self._utterances:
                if utterance.wants_slot and self._is_near(utterance):
                    return Prefill(utterance)
        return None

    def _is_near(self, utterance: Utterance) -> bool:
        return utterance.index <= utterance.stream.n_heard + self._n_ahead

    def _decode(self) -> Decode | None:
        writers = tuple(u for u in self._utterances if u.wants_step)
        return Decode(writers) if writers else None
