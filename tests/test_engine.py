"""The engine with a runner of twenty lines: order, batching, cancelling, failing, closing."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cosyvoice.config import FRAME_SAMPLES, OURS, REFERENCE, EngineConfig, LLMConfig
from cosyvoice.engine.draws import Draws
from cosyvoice.engine.engine import Engine
from cosyvoice.engine.request import Chunk, Hops, Request, Sentence, TextToCome, Utterance
from cosyvoice.engine.scheduler import Decode, Prefill, Render, Scheduler
from cosyvoice.engine.script import Plain
from cosyvoice.engine.stream import Audio, Stream
from cosyvoice.errors import BadRequest, Cancelled, ModelFilesError, Overloaded

N_SLOTS = 3


@dataclass
class FakeRunner:
    """Draws the token 100 + the sentence's first text id; renders a token as 960 such numbers."""

    llm_config: LLMConfig = LLMConfig()
    n_block_tokens: int = 25
    n_lookahead_tokens: int = 3
    n_free_slots: int = N_SLOTS
    batches: list[int] = field(default_factory=list)
    renders: list[int] = field(default_factory=list)
    n_warmed: int = 0
    n_begun: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    poison: int = -1

    def write(self, utterances: tuple[Utterance, ...]) -> list[int]:
        self.gate.wait(10)
        self.batches.append(len(utterances))
        for u in utterances:
            self._seat(u)
        names = [
            u.request.sentences[u.index].ids[0] if u.request.sentences else 7 for u in utterances
        ]
        if self.poison in names:
            raise RuntimeError("the device caught fire")
        return [100 + name for name in names]

    def begin(self) -> None:
        self.n_begun += 1

    def read(self, utterance: Utterance, n_items: int) -> None:
        self._seat(utterance)

    def render(self, utterances: Sequence[Utterance], chunks: Sequence[Chunk]) -> list[Audio]:
        self.renders.append(len(chunks))
        return [np.repeat(np.array(c.tokens, np.float32), 2 * FRAME_SAMPLES) for c in chunks]

    def warm(self, utterance: Utterance) -> None:
        self.n_warmed += 1

    def _seat(self, utterance: Utterance) -> None:
        if utterance.slot is None:
            utterance.slot, self.n_free_slots = 0, self.n_free_slots - 1

    def release_slot(self, utterance: Utterance) -> None:
        if utterance.slot is not None:
            utterance.slot, self.n_free_slots = None, self.n_free_slots + 1

    def release(self, utterance: Utterance) -> None:
        self.release_slot(utterance)


PROMPT: Any = SimpleNamespace(
    llm_text=(1, 2), llm_speech=(3,), flow=SimpleNamespace(tokens=tuple(range(10)))
)


def request(*names: int, streaming: bool = False, n_tokens: int = 40) -> Request:
    sentences = tuple(Sentence((name,) * 20) for name in names)
    return Request(PROMPT, sentences, streaming=streaming, max_tokens=n_tokens)


@pytest.fixture
def runner() -> FakeRunner:
    runner = FakeRunner()
    runner.gate.set()
    return runner


@pytest.fixture
def engine(runner: FakeRunner) -> Iterator[Engine]:
    engine = Engine(runner, EngineConfig(n_slots=N_SLOTS, max_waiting=4))
    yield engine
    runner.gate.set()
    engine.close()


def until_idle(engine: Engine) -> bool:
    for _ in range(500):
        if engine.is_idle:
            return True
        time.sleep(0.01)
    return False


def tokens_of(audio: Audio) -> list[int]:
    return [int(x) for x in audio[:: 2 * FRAME_SAMPLES]]


def test_sentences_are_heard_in_order(engine: Engine) -> None:
    chunks = list(engine.submit(request(1, 2, 3, 4, 5)))
    assert [tokens_of(chunk)[0] for chunk in chunks] == [101, 102, 103, 104, 105]
    assert all(len(tokens_of(chunk)) == 40 for chunk in chunks)
    assert until_idle(engine)


def test_streams_come_in_chunks_at_block_boundaries(engine: Engine) -> None:
    chunks = list(engine.submit(request(1, streaming=True, n_tokens=120)))
    # 10 prompt tokens: the first cut is after 15, with 3 tokens of look-ahead on top.
    assert [len(tokens_of(chunk)) for chunk in chunks] == [18, 25, 50, 27]


def test_requests_are_decoded_together(engine: Engine, runner: FakeRunner) -> None:
    runner.gate.clear()
    streams = [engine.submit(request(name)) for name in (1, 2, 3)]
    runner.gate.set()
    assert [tokens_of(next(iter(stream)))[0] for stream in streams] == [101, 102, 103]
    assert max(runner.batches) == N_SLOTS


def test_next_sentence_is_written_before_this_one_is_heard(
    engine: Engine, runner: FakeRunner
) -> None:
    list(engine.submit(request(1, 2, 3)))
    assert max(runner.batches) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_cancel_frees_everything(engine: Engine, runner: FakeRunner, streaming: bool) -> None:
    for n_taken in range(3):
        stream = engine.submit(request(1, 2, 3, streaming=streaming, n_tokens=200))
        for _ in range(n_taken):
            next(stream)
        stream.close()
        stream.close()
        assert until_idle(engine)
        assert list(stream) == []
    assert runner.n_free_slots == N_SLOTS


def test_cancel_before_the_first_step_frees_everything(engine: Engine, runner: FakeRunner) -> None:
    runner.gate.clear()
    streams = [engine.submit(request(1)) for _ in range(4)]
    for stream in streams:
        stream.close()
    runner.gate.set()
    assert until_idle(engine)


def test_a_failing_request_fails_alone(engine: Engine, runner: FakeRunner) -> None:
    runner.poison = 2
    runner.gate.clear()
    streams = {name: engine.submit(request(name)) for name in (1, 2, 3)}
    runner.gate.set()
    with pytest.raises(RuntimeError, match="caught fire"):
        list(streams[2])
    assert tokens_of(next(streams[1])) == [101] * 40
    assert tokens_of(next(streams[3])) == [103] * 40
    assert until_idle(engine)


def test_error_is_raised_again_for_who_asks_again(engine: Engine, runner: FakeRunner) -> None:
    runner.poison = 1
    stream = engine.submit(request(1))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            next(stream)


def test_closing_the_engine_fails_what_is_unfinished(runner: FakeRunner) -> None:
    engine = Engine(runner, EngineConfig(n_slots=N_SLOTS))
    runner.gate.clear()
    stream = engine.submit(request(1))
    closing = threading.Thread(target=engine.close)
    closing.start()
    runner.gate.set()
    closing.join()
    with pytest.raises(Cancelled):
        list(stream)
    with pytest.raises(Cancelled, match="closed"):
        engine.submit(request(1))


def test_too_many_waiting_is_overloaded(engine: Engine, runner: FakeRunner) -> None:
    runner.gate.clear()
    streams = []
    with pytest.raises(Overloaded, match="try again"):
        for _ in range(50):
            streams.append(engine.submit(request(1)))
            time.sleep(0.001)
    runner.gate.set()
    assert all(len(list(stream)) == 1 for stream in streams)


def test_sentence_too_long_for_the_cache_is_refused(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="too long"):
        engine.submit(Request(PROMPT, (Sentence((1,) * 3000),)))


def test_nothing_to_speak_is_refused(engine: Engine) -> None:
    with pytest.raises(BadRequest, match="nothing to speak"):
        engine.submit(Request(PROMPT, ()))


def test_given_tokens_need_no_llm(engine: Engine, runner: FakeRunner) -> None:
    audio = next(engine.submit(Request(PROMPT, tokens=(5, 6, 7))))
    assert tokens_of(audio) == [5, 6, 7]
    assert runner.batches == []


def test_async_iteration_gives_the_same(engine: Engine) -> None:
    async def listen() -> list[int]:
        return [len(tokens_of(a)) async for a in engine.submit(request(1, streaming=True))]

    assert asyncio.run(listen()) == [18, 22]


def test_async_listener_that_leaves_frees_everything(engine: Engine) -> None:
    async def listen() -> None:
        with engine.submit(request(1, streaming=True, n_tokens=300)) as stream:
            async for _ in stream:
                return

    asyncio.run(listen())
    assert until_idle(engine)


class Letters:
    """A text source: one id a letter."""

    def push(self, piece: str) -> list[int]:
        return [ord(c) for c in piece]

    def finish(self) -> list[int]:
        return []


def test_text_in_speaks_before_the_text_is_complete(engine: Engine, runner: FakeRunner) -> None:
    stream = engine.submit(Request(PROMPT, text=TextToCome(Letters(), (1, 2)), streaming=True))
    stream.say("abcdefghijklmnopqrstuvwxyz")
    first = next(stream)
    assert len(tokens_of(first)) == 18
    stream.close()
    with pytest.raises(Cancelled):
        stream.say("more")
    assert until_idle(engine)


def test_a_voice_is_made_ready_while_its_text_is_awaited(
    engine: Engine, runner: FakeRunner
) -> None:
    stream = engine.submit(Request(PROMPT, text=TextToCome(Letters(), (1, 2)), streaming=True))
    for _ in range(500):
        if runner.n_warmed:
            break
        time.sleep(0.01)
    assert runner.n_warmed == 1
    assert not runner.batches  # no word of the text yet
    stream.close()
    assert until_idle(engine)


def test_saying_more_after_the_end_harms_nobody(engine: Engine) -> None:
    stream = engine.submit(Request(PROMPT, text=TextToCome(Letters(), (1, 2)), streaming=True))
    stream.say("abcdef")
    stream.end_text()
    stream.end_text()
    with pytest.raises(BadRequest, match="has ended"):
        stream.say("more")
    stream.close()
    assert len(list(engine.submit(request(1)))) == 1


def test_a_command_that_fails_fails_its_stream_alone(engine: Engine) -> None:
    stream = engine.submit(Request(PROMPT, text=TextToCome(Letters(), (1, 2)), streaming=True))
    stream.say("abc")
    engine.say(stream, [1], last=True)
    engine.say(stream, [1], last=False)  # what no Stream does
    with pytest.raises(AssertionError, match="after its end"):
        list(stream)
    assert len(list(engine.submit(request(1)))) == 1
    assert until_idle(engine)


def test_a_broken_engine_leaves_nobody_waiting(
    runner: FakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(runner, EngineConfig(n_slots=N_SLOTS))
    runner.gate.clear()
    streams = [engine.submit(request(name)) for name in (1, 2)]
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._scheduler, "next", lambda *_: 1 // 0)
    runner.gate.set()
    for stream in streams:
        with pytest.raises(ZeroDivisionError):
            list(stream)
    with pytest.raises(Cancelled):
        engine.submit(request(1))


def test_tokens_of_another_model_are_refused(engine: Engine) -> None:
    with pytest.raises(ModelFilesError, match="6561"):
        engine.submit(Request(PROMPT, tokens=(5, 6561)))


def test_text_in_without_text_is_refused(engine: Engine) -> None:
    stream = engine.submit(Request(PROMPT, text=TextToCome(Letters(), (1, 2))))
    stream.end_text()
    with pytest.raises(BadRequest, match="no text came"):
        list(stream)
    assert until_idle(engine)


# The scheduler and the hops alone.


class Deaf:
    """Controls that nobody listens to."""

    def say(self, stream: Stream, ids: list[int], *, last: bool) -> None: ...

    def cancel(self, stream: Stream) -> None: ...


def utterance(stream: Stream, *, index: int = 0, streaming: bool = True) -> Utterance:
    script = Plain(LLMConfig(), [6561, ~1], min_len=2, max_len=100)
    asked = Request(PROMPT, streaming=streaming)
    return Utterance(asked, stream, index, script, Hops(10, 25, OURS), 3, Draws(0, index))


def test_oldest_waiting_gets_the_free_slot_and_writers_go_together() -> None:
    scheduler = Scheduler(EngineConfig(n_ahead=1))
    first, second = (utterance(Stream(Deaf(), seed=0)) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    assert scheduler.next(0, 1) == Prefill(first, 2)
    first.slot = 0
    first.accept(5)
    assert scheduler.next(0, 1) == Prefill(second, 2)
    second.slot = 1
    second.accept(5)
    assert scheduler.next(0, 0) == Decode((first, second))


def heard(stream: Stream, *, seconds: int, at_s: float) -> None:
    """So much audio was put, the first of it at this time."""
    stream.put(np.zeros(24_000 * seconds, np.float32))
    stream.first_audio_at_s = at_s


def ready(*, seconds: int = 0, streaming: bool = True) -> Utterance:
    """All its tokens are there; its listener got so much audio at 10 s, or none yet."""
    u = utterance(Stream(Deaf(), seed=0), streaming=streaming)
    u.tokens = [1] * 60
    u.script.is_done = True  # type: ignore[union-attr]
    if seconds:
        heard(u.stream, seconds=seconds, at_s=10.0)
    return u


def writing(*, n_tokens: int = 0) -> Utterance:
    """Holds a slot and draws token after token."""
    u = utterance(Stream(Deaf(), seed=0))
    u.slot = 0
    u.accept(5)
    u.tokens = [1] * n_tokens
    return u


def scheduler_of(*utterances: Utterance, n_together: int = 1) -> Scheduler:
    scheduler = Scheduler(EngineConfig(n_render_together=n_together))
    for u in utterances:
        scheduler.add(u)
    return scheduler


def test_the_stream_that_will_fall_silent_first_is_rendered() -> None:
    rich, poor = ready(seconds=3), ready(seconds=1)
    scheduler = scheduler_of(rich, poor)
    assert scheduler.next(10.5, 0) == Render((poor,))
    scheduler.remove(poor)
    assert scheduler.next(10.5, 0) == Render((rich,))


def test_streams_are_rendered_together_up_to_the_limit_but_files_alone() -> None:
    rich, poor, new, file = (
        *(ready(seconds=3), ready(seconds=1), ready()),
        ready(streaming=False),
    )
    assert scheduler_of(rich, file, poor, new, n_together=2).next(10.5, 0) == Render((new, poor))
    assert scheduler_of(rich, file, poor, new, n_together=9).next(10.5, 0) == Render(
        (new, poor, rich)
    )
    assert scheduler_of(file, writing()).next(10.5, 0) == Render((file,))


def test_a_stream_with_sound_left_waits_while_many_write() -> None:
    rich, writers = ready(seconds=3), [writing() for _ in range(2)]
    assert scheduler_of(rich, *writers).next(10.5, 0) == Decode(tuple(writers))
    assert scheduler_of(rich, writers[0]).next(10.5, 0) == Render((rich,))
    poor = ready(seconds=3)
    assert scheduler_of(poor, *writers).next(13.5, 0) == Render((poor,))


def test_slow_passes_leave_streams_less_time_to_wait() -> None:
    rich, new, writers = ready(seconds=3), ready(), [writing() for _ in range(4)]
    scheduler = scheduler_of(rich, new, *writers)
    assert scheduler.next(10.0, 0) == Render((new,))
    scheduler.remove(new)
    # That pass took 1.4 s; two like it are longer than the 1.6 s that are left.
    assert scheduler.next(11.4, 0) == Render((rich,))


def test_no_newcomer_silences_a_stream_that_lacks_tokens() -> None:
    new, begun = ready(), writing(n_tokens=3)
    heard(begun.stream, seconds=1, at_s=10.0)
    scheduler = scheduler_of(new, begun)
    assert scheduler.next(10.5, 0) == Render((new,))
    assert scheduler.next(10.9, 0) == Decode((begun,))
    assert scheduler.next(11.1, 0) == Render((new,))  # it is silent already


def test_sentences_far_ahead_wait() -> None:
    scheduler = Scheduler(EngineConfig(n_ahead=1))
    stream = Stream(Deaf(), seed=0)
    ahead = [utterance(stream, index=i) for i in range(3)]
    for u in ahead:
        scheduler.add(u)
    for u in ahead[:2]:
        assert scheduler.next(0, 9) == Prefill(u, 2)
        u.slot = 0
        u.accept(5)
    assert scheduler.next(0, 9) == Decode((ahead[0], ahead[1]))
    stream.n_heard = 1
    assert scheduler.next(0, 9) == Prefill(ahead[2], 2)


@pytest.mark.parametrize("n_prompt", [0, 1, 8, 17, 25, 31, 87])
def test_hops_end_on_block_boundaries(n_prompt: int) -> None:
    ours, reference = (Hops(n_prompt, 25, rules) for rules in (OURS, REFERENCE))
    assert 8 <= ours.tokens(0) < 33
    assert 25 <= reference.tokens(0) < 50
    for hops in (ours, reference):
        assert (n_prompt + hops.tokens(0)) % 25 == 0
    assert [ours.tokens(i) for i in (1, 2, 3, 4)] == [25, 50, 100, 100]
    assert [reference.tokens(i) for i in (1, 2, 3)] == [50, 100, 100]
