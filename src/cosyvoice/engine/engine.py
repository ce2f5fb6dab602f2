"""The engine: the one thread that owns the device.

In: requests, more text, cancellations, from any thread. Out: streams. The loop is: take what
callers said, ask the scheduler for a step, let the runner do it, hand over what came of it.
It knows no HTTP, no text rules and no tensor.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from cosyvoice.config import MAX_TOKENS, EngineConfig, LLMConfig
from cosyvoice.errors import BadRequest, Cancelled, ModelFilesError, Overloaded

from .draws import Draws
from .request import Chunk, Hops, Request, Sentence, TextToCome, Utterance
from .scheduler import Decode, Prefill, Render, Scheduler, Step, Warm
from .script import (
    Interleaved,
    Plain,
    ReferenceInterleaved,
    Script,
    TextIn,
    plain_items,
    token_limits,
)
from .stream import Audio, Stream


class Steps(Protocol):
    """What the engine needs of a runner; the tests have one of twenty lines."""

    llm_config: LLMConfig
    n_block_tokens: int
    n_lookahead_tokens: int

    def begin(self) -> None:
        """Called once, on the engine's thread, before any step."""
        ...

    @property
    def n_free_slots(self) -> int:
        """Slots of the LLM's cache nobody holds."""
        ...

    def write(self, utterances: tuple[Utterance, ...]) -> list[int]:
        """Feed each utterance its pending items and draw one id for each."""
        ...

    def read(self, utterance: Utterance, n_items: int) -> None:
        """Feed an utterance its first pending items, without a draw."""
        ...

    def render(self, utterances: Sequence[Utterance], chunks: Sequence[Chunk]) -> list[Audio]:
        """Audio [n] of each utterance's next chunk."""
        ...

    def warm(self, utterance: Utterance) -> None:
        """Make ready what the utterance needs of its voice."""
        ...

    def release_slot(self, utterance: Utterance) -> None:
        """Give the utterance's slot back, if it holds one."""
        ...

    def release(self, utterance: Utterance) -> None:
        """Free everything the utterance holds."""
        ...


@dataclass(frozen=True)
class Command:
    """What a caller said, to be carried out on the engine's thread."""

    stream: Stream | None
    carry_out: Callable[[], None]


class Engine:
    """Starts its thread when made; `close` stops it and fails what is unfinished."""

    def __init__(self, runner: Steps, config: EngineConfig) -> None:
        self.config = config
        self._runner = runner
        self._scheduler = Scheduler(config)
        self._waiting: set[Stream] = set()  # of whose requests nothing has begun
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._is_open = True
        self._door = threading.Lock()  # nothing is submitted while the engine closes
        self._thread = threading.Thread(target=self._run, name="cosyvoice-engine", daemon=True)
        self._thread.start()

    # Any thread.

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises BadRequest where it cannot fit the model and Overloaded where too many wait.
        """
        source = request.text.source if request.text is not None else None
        stream = Stream(self, seed=request.seed, text=source)
        utterances = self._utterances(request, stream)
        with self._door:
            if not self._is_open:
                raise Cancelled("the engine is closed: start a new one")
            if len(self._waiting) >= self.config.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests wait already: try again later")
            self._waiting.add(stream)
            self._commands.put(Command(stream, lambda: self._add(utterances)))
        return stream

    def say(self, stream: Stream, ids: list[int], *, last: bool) -> None:
        """More text for a text-in request."""
        self._commands.put(Command(stream, lambda: self._tell(stream, ids, last=last)))

    def cancel(self, stream: Stream) -> None:
        """Stop a stream's work before the next step."""
        self._commands.put(Command(stream, lambda: self._drop(stream, None)))

    def close(self) -> None:
        """Stop the thread after the step it is in; unfinished streams raise Cancelled."""
        with self._door:
            self._is_open = False
        self._commands.put(Command(None, lambda: None))  # wakes the thread
        if threading.current_thread() is not self._thread:  # a finaliser runs anywhere
            self._thread.join()

    @property
    def is_idle(self) -> bool:
        """Nothing in flight and nothing held."""
        return (
            not self._waiting
            and not self._scheduler.utterances
            and self._commands.empty()
            and self._runner.n_free_slots == self.config.n_slots
        )

    def _utterances(self, request: Request, stream: Stream) -> list[Utterance]:
        self._check_tokens(request)
        scripts = self._scripts(request)
        if not scripts:
            raise BadRequest("there is nothing to speak: give a text with letters or digits")
        hops = Hops(len(request.prompt.flow.tokens), self._runner.n_block_tokens, self.config.rules)
        return [
            Utterance(
                request,
                stream,
                i,
                script,
                hops,
                n_lookahead=self._runner.n_lookahead_tokens,
                draws=Draws(request.seed, i),
                tokens=list(request.tokens or ()),
            )
            for i, script in enumerate(scripts)
        ]

    def _check_tokens(self, request: Request) -> None:
        """Speech tokens of a voice or a source may come from files of another model."""
        n_known = self._runner.llm_config.n_speech_tokens
        highest = max((*request.prompt.flow.tokens, *(request.tokens or ())), default=0)
        if highest >= n_known:
            raise ModelFilesError(
                f"the voice has the speech token {highest}, the model knows {n_known}: encode the "
                "voice again with the speech tokenizer that belongs to this model"
            )

    def _scripts(self, request: Request) -> Sequence[Script | None]:
        if request.tokens is not None:
            return [None]
        if request.text is not None:
            return [self._text_in(request, request.text)]
        return [self._plain(request, sentence) for sentence in request.sentences]

    def _plain(self, request: Request, sentence: Sentence) -> Plain:
        """The script of one sentence, its speech limited to what cache and flow have room for."""
        config, prompt = self._runner.llm_config, request.prompt
        items = plain_items(
            config, sentence.ids, prompt_text=prompt.llm_text, prompt_speech=prompt.llm_speech
        )
        n_ids = len(sentence.ids)
        n_head = sentence.n_head if self.config.rules.count_after_separator else 0
        min_len, max_len = token_limits(n_ids, n_ids - n_head)
        n_room = min(self.config.max_positions - len(items), MAX_TOKENS - len(prompt.flow.tokens))
        if n_room <= min_len:
            raise BadRequest(
                f"a sentence of {n_ids} text tokens is too long: end sentences with a full stop, "
                "or shorten the text or the recording"
            )
        max_len = min(max_len, n_room, request.max_tokens or max_len)
        return Plain(
            config, items, min_len=min(min_len, max_len), max_len=max_len, rules=self.config.rules
        )

    def _text_in(self, request: Request, text: TextToCome) -> Script:
        variant = Interleaved if self.config.rules.clean_interleave else ReferenceInterleaved
        return variant(
            self._runner.llm_config,
            text.head,
            rest=text.rest,
            prompt_speech=request.prompt.llm_speech,
        )

    # The engine's thread.

    def _run(self) -> None:
        error: BaseException = Cancelled("the engine was closed before the audio was complete")
        try:
            self._runner.begin()
            while self._is_open:
                step = self._scheduler.next(time.monotonic(), self._runner.n_free_slots)
                if step is not None:
                    self._do(step)
                self._listen(wait=step is None)
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._end_all(error)

    def _end_all(self, error: BaseException) -> None:
        """Nobody may wait for audio that nobody makes."""
        with self._door:
            self._is_open = False
        self._listen(wait=False)
        for utterance in self._scheduler.utterances:
            self._drop(utterance.stream, error)

    def _listen(self, *, wait: bool) -> None:
        """Carry out what callers said; with nothing to do, wait until one says something."""
        try:
            command = self._commands.get(block=wait)
            while True:
                try:
                    command.carry_out()
                except Exception as error:  # noqa: BLE001 - one stream's failure is not the engine's
                    if command.stream is not None:
                        self._drop(command.stream, error)
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _do(self, step: Step) -> None:
        try:
            match step:
                case Render(utterances):
                    self._render(utterances)
                case Prefill(utterance, n_items):
                    self._prefill(utterance, n_items)
                case Decode(utterances):
                    self._write(utterances)
                case Warm(utterance):
                    utterance.is_warm = True
                    self._runner.warm(utterance)
        except Exception as error:  # noqa: BLE001 - one request's failure is not the engine's
            self._fail(step, error)

    def _prefill(self, utterance: Utterance, n_items: int) -> None:
        self._waiting.discard(utterance.stream)
        if n_items == len(utterance.pending):
            self._write((utterance,))
        else:
            self._runner.read(utterance, n_items)
            utterance.n_read += n_items

    def _write(self, utterances: tuple[Utterance, ...]) -> None:
        for utterance, drawn in zip(utterances, self._runner.write(utterances), strict=True):
            try:
                utterance.accept(drawn)
            except Exception as error:  # noqa: BLE001 - the others' draws are good
                self._drop(utterance.stream, error)
            if utterance.is_written:
                self._runner.release_slot(utterance)

    def _render(self, utterances: Sequence[Utterance]) -> None:
        chunks = [utterance.take_chunk() for utterance in utterances]
        audio = self._runner.render(utterances, chunks)
        for utterance, chunk, samples in zip(utterances, chunks, audio, strict=True):
            self._waiting.discard(utterance.stream)
            if len(samples):
                utterance.stream.put(samples)
            if chunk.is_last:
                self._finish(utterance)

    def _finish(self, utterance: Utterance) -> None:
        self._release(utterance)
        utterance.stream.n_heard += 1
        if not self._scheduler.of(utterance.stream):
            utterance.stream.end()

    def _fail(self, step: Step, error: Exception) -> None:
        """A failing step fails the request it is for; those who shared it try again alone."""
        if isinstance(step, Decode) and len(step.utterances) > 1:
            for utterance in step.utterances:
                self._do(Decode((utterance,)))
            return
        utterances = (step.utterance,) if isinstance(step, Prefill | Warm) else step.utterances
        for utterance in utterances:
            self._drop(utterance.stream, error)

    def _add(self, utterances: list[Utterance]) -> None:
        for utterance in utterances:
            self._scheduler.add(utterance)
        if utterances[0].stream.is_closed:  # closed between submit and here
            self._drop(utterances[0].stream, None)

    def _tell(self, stream: Stream, ids: list[int], *, last: bool) -> None:
        for utterance in self._scheduler.of(stream):
            script = cast(TextIn, utterance.script)  # `say` exists on text-in streams only
            script.say(ids)
            if last:
                script.end_text()
            if script.is_done and not utterance.tokens:
                self._drop(stream, BadRequest("no text came: say something before the end"))

    def _drop(self, stream: Stream, error: BaseException | None) -> None:
        """Free everything a stream holds and end it."""
        self._waiting.discard(stream)
        for utterance in self._scheduler.of(stream):
            self._release(utterance)
        stream.end(error)

    def _release(self, utterance: Utterance) -> None:
        """The one place where an utterance gives back what it holds."""
        self._runner.release(utterance)
        self._scheduler.remove(utterance)
