"""The scheduler: of all utterances, which one step next.

In: utterances, and the time. Out: a step, as data. It knows no torch and does no work itself.

The rule: render what cannot wait (new streams, and those with less sound left than two passes of
the flow take), the poorest first and others along with them, but let no newcomer silence a stream
that lacks tokens; else a file; else what could wait, if few write; else give a free slot to the
oldest waiting sentence; else let everybody draw a token. docs/scheduling.md compares it.
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


@dataclass(frozen=True)
class Warm:
    """Make ready what an utterance will need of its voice, while its text is awaited."""

    utterance: Utterance


Step = Prefill | Decode | Render | Warm

PASS_DECAY = 0.9  # a slow pass is forgotten by a tenth with each one after it
WRITERS_A_CHUNK = 2  # with fewer, drawing is not worth more than rendering


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
        self._pass_began_s: float | None = None
        self._pass_s = 0.0  # the slowest of late
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
        """The next step, or None where everybody waits for text or there is nobody.

        To be asked as soon as the step before is done: so a pass of the flow is timed.
        """
        self._time_pass(now_s)
        step = self._choose(now_s, n_free_slots)
        self._pass_began_s = now_s if isinstance(step, Render) else None
        return step

    def _time_pass(self, now_s: float) -> None:
        if self._pass_began_s is not None:
            self._pass_s = max(now_s - self._pass_began_s, PASS_DECAY * self._pass_s)

    def _choose(self, now_s: float, n_free_slots: int) -> Step | None:
        streams, files = self._ready(now_s)
        if self._must_draw(streams, now_s) and (decode := self._decode()):
            return decode
        if streams and self._cannot_wait(streams[0].stream, now_s):
            return self._render(streams)
        # Nobody listens to an unfinished file, so it has time, but not for ever.
        if files:
            return Render((files[0],))
        if len(self._writers()) < WRITERS_A_CHUNK * len(streams):
            return self._render(streams)
        return self._write(n_free_slots) or self._warm()

    def _warm(self) -> Warm | None:
        cold = (u for u in self._utterances if u.request.streaming and not u.is_warm)
        return next((Warm(utterance) for utterance in cold), None)

    def _ready(self, now_s: float) -> tuple[list[Utterance], list[Utterance]]:
        """Who has a chunk: streams, the poorest first, and files, the oldest first."""
        ready = [u for u in self._utterances if u.is_due and u.has_chunk]
        streams = [u for u in ready if u.request.streaming]
        streams.sort(key=lambda u: buffered_s(u.stream, now_s))
        return streams, [u for u in ready if not u.request.streaming]

    def _render(self, streams: list[Utterance]) -> Render:
        return Render(tuple(streams[: self._config.n_render_together]))

    def _cannot_wait(self, stream: Stream, now_s: float) -> bool:
        return stream.first_audio_at_s is None or buffered_s(stream, now_s) < self._slack_s()

    def _slack_s(self) -> float:
        return self._config.slack_passes * self._pass_s

    def _must_draw(self, streams: list[Utterance], now_s: float) -> bool:
        """Some stream is about to fall silent for want of tokens; only newcomers would delay it."""
        if streams and streams[0].stream.first_audio_at_s is not None:
            return False
        return any(self._runs_short(u, now_s) for u in self._utterances)

    def _runs_short(self, utterance: Utterance, now_s: float) -> bool:
        if utterance.stream.first_audio_at_s is None or not utterance.request.streaming:
            return False
        lacks_tokens = utterance.is_due and utterance.wants_step and not utterance.has_chunk
        # One that is silent already is past saving: newcomers need not suffer as well.
        return lacks_tokens and 0 <= buffered_s(utterance.stream, now_s) < self._config.guard_s

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
        # In the order of their slots, which the cache then reads as one block.
        writers = sorted(self._writers(), key=lambda u: u.slot or 0)
        return Decode(tuple(writers)) if writers else None

    def _writers(self) -> list[Utterance]:
        return [u for u in self._utterances if u.wants_step and len(u.pending) == 1]
