"""The scheduler: of all utterances, which one step next.

In: utterances, and the time. Out: a step, as data. It knows no torch and does no work itself.

The rule: render the stream that will fall silent first; else give a free slot to the oldest
waiting sentence; else let everybody with something to say draw a token, together.
"""

from dataclasses import dataclass

from cosyvoice.config import SAMPLE_RATE_HZ, EngineConfig

from .request import Utterance
from .stream import Stream


@dataclass(frozen=True)
class Prefill:
    """Feed one utterance its next items, and draw once if these are all that is pending."""

    utterance: Utterance
    n_items: int


@dataclass(frozen=True)
class Decode:
    """Feed each utterance its one item and draw once for each."""

    utterances: tuple[Utterance, ...]


@dataclass(frozen=True)
class Render:
    """Turn each utterance's next chunk into audio."""

    utterances: tuple[Utterance, ...]


Step = Prefill | Decode | Render


def buffered_s(stream: Stream, now_s: float) -> float:
    """Seconds of audio a listener in real time still has; an unstarted stream has none."""
    if stream.first_audio_at_s is None:
        return 0.0
    return stream.n_samples / SAMPLE_RATE_HZ - (now_s - stream.first_audio_at_s)


class Scheduler:
    """Holds all utterances, in the order in which they came."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._utterances: list[Utterance] = []
        self._has_just_read = False  # the last step fed a part of a long input

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
        return self._render(now_s) or self._write(n_free_slots)

    def _render(self, now_s: float) -> Render | None:
        ready = [u for u in self._utterances if u.is_due and u.has_chunk]
        if not ready:
            return None
        # Nobody listens to an unfinished file, so it has time.
        ready.sort(key=lambda u: (not u.request.streaming, buffered_s(u.stream, now_s)))
        n_together = self._config.n_render_together if ready[0].request.streaming else 1
        alike = [u for u in ready if u.request.streaming == ready[0].request.streaming]
        return Render(tuple(alike[:n_together]))

    def _write(self, n_free_slots: int) -> Prefill | Decode | None:
        """Long inputs are fed in parts, and between the parts everybody draws a token."""
        reader, decode = self._reader(n_free_slots), self._decode()
        if reader is None or (self._has_just_read and decode is not None):
            self._has_just_read = False
            return decode
        n_items = min(len(reader.pending), self._config.n_prefill_items)
        self._has_just_read = n_items < len(reader.pending)
        return Prefill(reader, n_items)

    def _reader(self, n_free_slots: int) -> Utterance | None:
        """Who is to be fed more than one item: one that has begun, else the oldest waiting."""
        for utterance in self._utterances:
            if utterance.wants_step and len(utterance.pending) > 1:
                return utterance
        if n_free_slots:
            for utterance in self._utterances:
                if utterance.wants_slot and self._is_near(utterance):
                    return utterance
        return None

    def _is_near(self, utterance: Utterance) -> bool:
        return utterance.index <= utterance.stream.n_heard + self._config.n_ahead

    def _decode(self) -> Decode | None:
        writers = [u for u in self._utterances if u.wants_step and len(u.pending) == 1]
        # In the order of their slots, which the cache then reads as one block.
        writers.sort(key=lambda u: u.slot or 0)
        return Decode(tuple(writers)) if writers else None
