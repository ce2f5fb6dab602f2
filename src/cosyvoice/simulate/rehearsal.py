"""The rehearsal: the engine's loop with a clock that only steps move.

In: lines to say, a load, a rule, costs. Out: for each line what its listener heard, and when.
Steps are chosen by a real scheduler for real utterances; the runner draws numbered tokens, makes
no sound and takes the time its costs say. It knows no thread and no other clock.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from cosyvoice.config import (
    FRAME_SAMPLES,
    FRAMES_PER_TOKEN,
    OURS,
    SAMPLE_RATE_HZ,
    EngineConfig,
    FlowConfig,
    LLMConfig,
    VocoderConfig,
)
from cosyvoice.engine.draws import Draws
from cosyvoice.engine.request import Chunk, Hops, Request, Utterance
from cosyvoice.engine.scheduler import Decode, Prefill, Render, Scheduler, Step
from cosyvoice.engine.script import Plain, plain_items, token_limits
from cosyvoice.engine.stream import Stream

from .costs import Costs, Span
from .load import TRANSCRIPT_IDS, Line, Load
from .rules import Rule, Ruled, hop_by

N_TOGETHER = 16
FIRST_ID = 3000  # tokens are numbered from here: none of them is silent
LLM, FLOW, VOCODER = LLMConfig(), FlowConfig(), VocoderConfig()


@dataclass(eq=False)
class Heard:
    """One line's audio as its listener got it, who plays it from the first piece on."""

    line: Line
    asked_at_s: float
    pieces: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds of audio)
    tokens: list[tuple[int, int]] = field(default_factory=list)  # (sentence, token) as rendered
    ended_at_s: float | None = None

    @property
    def first_audio_s(self) -> float:
        return self.pieces[0][0] - self.asked_at_s

    @property
    def whole_s(self) -> float:
        assert self.ended_at_s is not None, "the line is not complete"
        return self.ended_at_s - self.asked_at_s

    @property
    def audio_s(self) -> float:
        return sum(seconds for _, seconds in self.pieces)

    @property
    def gaps_s(self) -> list[float]:
        """How long each piece came too late."""
        gaps, plays_until_s = [], self.pieces[0][0]
        for at_s, seconds in self.pieces:
            gaps.append(max(0.0, at_s - plays_until_s))
            plays_until_s = max(plays_until_s, at_s) + seconds
        return gaps


class Silent:
    """Controls of a stream whose listener never says anything."""

    def say(self, stream: Stream, ids: list[int], *, last: bool) -> None: ...

    def cancel(self, stream: Stream) -> None: ...


@dataclass(eq=False)
class Sounding:
    """What a voiceover comes to here."""

    n_mel_frames: int = 0
    n_frames: int = 0  # that have become audio


class Rehearsal:
    """One load under one rule. `perform` once."""

    def __init__(self, lines: list[Line], load: Load, rule: Rule | None, costs: Costs) -> None:
        """Without a rule: the engine's own scheduler and hops, and passes shared by many."""
        self.now_s = 0.0
        self.busy_s = 0.0
        self.n_steps = 0
        self._costs = costs
        self._rule = rule
        config = EngineConfig(n_slots=costs.n_slots, n_render_together=N_TOGETHER)
        self._scheduler = Scheduler(config) if rule is None else Ruled(rule, config)
        self._free_slots = list(range(costs.n_slots))
        self._heard: dict[Stream, Heard] = {}
        at_s = load.arrivals(lines)
        self._coming = [(at_s[i], i, lines[i]) for i in range(len(at_s))]
        heapq.heapify(self._coming)
        self._in_turn = list(enumerate(lines))[len(at_s) :][::-1]  # asked for when one is done

    def perform(self) -> list[Heard]:
        """Until all is said."""
        while True:
            self._admit()
            step = self._scheduler.next(self.now_s, len(self._free_slots))
            if step is not None:
                self._do(step)
            elif self._coming:
                self.now_s = self._coming[0][0]
            else:
                return list(self._heard.values())

    # What comes in.

    def _admit(self) -> None:
        while self._coming and self._coming[0][0] <= self.now_s:
            at_s, i, line = heapq.heappop(self._coming)
            stream = Stream(Silent(), seed=i)
            self._heard[stream] = Heard(line, at_s)
            for index in range(len(line.sentences)):
                self._scheduler.add(self._utterance(line, stream, index))

    def _utterance(self, line: Line, stream: Stream, index: int) -> Utterance:
        n_text, n_tokens = line.sentences[index]
        min_len, max_len = token_limits(n_text, n_text)
        assert min_len <= n_tokens <= max_len, line
        items = plain_items(
            LLM,
            (0,) * n_text,
            prompt_text=(0,) * TRANSCRIPT_IDS,
            prompt_speech=(0,) * line.n_prompt_tokens,
        )
        utterance = Utterance(
            Request(cast(Any, None), streaming=line.streaming),
            stream,
            index,
            Plain(LLM, items, min_len=min_len, max_len=max_len),
            Hops(line.n_prompt_tokens, FLOW.block_tokens, OURS),
            n_lookahead=FLOW.lookahead_tokens,
            draws=Draws(0, index),
            is_warm=True,
            voiceover=Sounding(),
        )
        if self._rule is not None:
            hop_by(self._rule, utterance)
        return utterance

    # What the engine's thread does.

    def _do(self, step: Step) -> None:
        self.n_steps += 1
        match step:
            case Prefill(utterance, n_items):
                self._prefill(utterance, n_items)
            case Decode(utterances):
                self._pass(self._costs.decode(len(utterances)))
                for utterance in utterances:
                    self._draw(utterance)
            case Render(utterances):
                self._render(utterances)

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.busy_s += seconds

    def _prefill(self, utterance: Utterance, n_items: int) -> None:
        if utterance.slot is None:
            utterance.slot = self._free_slots.pop()
        self._pass(self._costs.prefill(n_items))
        if n_items == len(utterance.pending):
            self._draw(utterance)
        else:
            utterance.n_read += n_items

    def _draw(self, utterance: Utterance) -> None:
        assert utterance.slot is not None, "only who holds a slot draws"
        n_drawn = len(utterance.tokens)
        n_tokens = self._heard[utterance.stream].line.sentences[utterance.index][1]
        utterance.accept(FIRST_ID + n_drawn if n_drawn < n_tokens else LLM.eos)
        if utterance.is_written:
            self._free_slots.append(utterance.slot)
            utterance.slot = None

    def _render(self, utterances: Sequence[Utterance]) -> None:
        chunks = [utterance.take_chunk() for utterance in utterances]
        self._pass(self._costs.render([self._extend(u) for u in utterances]))
        for utterance, chunk in zip(utterances, chunks, strict=True):
            self._put(utterance, chunk)
            if chunk.is_last:
                self._finish(utterance)

    def _extend(self, utterance: Utterance) -> Span:
        sounding: Sounding = utterance.voiceover
        n_all = utterance.n_cut * FRAMES_PER_TOKEN
        n_new, sounding.n_mel_frames = n_all - sounding.n_mel_frames, n_all
        return Span(n_new, n_all + utterance.hops.n_prompt_tokens * FRAMES_PER_TOKEN)

    def _put(self, utterance: Utterance, chunk: Chunk) -> None:
        sounding, stream = utterance.voiceover, utterance.stream
        n_held = 0 if chunk.is_last else VOCODER.lookahead_frames
        n_frames = sounding.n_mel_frames - n_held - sounding.n_frames
        heard = self._heard[stream]
        heard.tokens += [(utterance.index, token) for token in chunk.tokens]
        if not n_frames:
            return
        sounding.n_frames += n_frames
        n_samples = n_frames * FRAME_SAMPLES
        if stream.first_audio_at_s is None:
            stream.first_audio_at_s = self.now_s  # before `put` reads another clock
        stream.put(np.broadcast_to(np.float32(0), (n_samples,)))
        heard.pieces.append((self.now_s, n_samples / SAMPLE_RATE_HZ))

    def _finish(self, utterance: Utterance) -> None:
        stream = utterance.stream
        self._scheduler.remove(utterance)
        stream.n_heard += 1
        if self._scheduler.of(stream):
            return
        stream.end()
        self._heard[stream].ended_at_s = self.now_s
        if self._in_turn:
            i, line = self._in_turn.pop()
            heapq.heappush(self._coming, (self.now_s, i, line))
