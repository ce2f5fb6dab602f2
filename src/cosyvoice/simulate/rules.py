"""The scheduling rules that are compared, and hops that grow with what there is.

In: utterances and the time, as the engine's scheduler has them. Out: its steps. A rule is data;
`Ruled` is the engine's scheduler with the order of its choices taken from one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from cosyvoice.config import EngineConfig
from cosyvoice.engine.request import Hops, Utterance
from cosyvoice.engine.scheduler import WRITERS_A_CHUNK, Render, Scheduler, Step, buffered_s

MAX_BLOCKS = 4  # of a chunk that takes all that is there


@dataclass(frozen=True)
class Rule:
    """What is done first. With these defaults: render whatever is ready, the poorest stream first.

    A stream that has begun can wait with `slack_s` of sound left, or, if `slack_passes` is given,
    with as much as so many passes of the flow take.
    """

    name: str
    slack_s: float = inf
    slack_passes: float | None = None
    guard_s: float = 0.0  # with less left, a stream that lacks tokens makes newcomers wait
    unstarted_s: float = 0.0  # what a stream that has not begun counts as having left
    renders_if_few_write: bool = False  # who can wait is rendered before little is written
    prefill_first: bool = False  # before rendering who can wait, who then goes before decoding
    files_last: bool = False  # offline sentences wait until there is nothing to write
    n_together: int = 1
    n_writers: int | None = None  # fewer sentences written at a time than there are slots
    first_hop_tokens: int = 8
    hop_blocks: tuple[int, ...] | None = (1, 2, 4)  # None: all blocks that are there


class Ruled(Scheduler):
    """The engine's scheduler under another rule."""

    def __init__(self, rule: Rule, config: EngineConfig) -> None:
        super().__init__(replace(config, guard_s=rule.guard_s, n_render_together=rule.n_together))
        self._rule = rule

    def _choose(self, now_s: float, n_free_slots: int) -> Step | None:
        streams, files = self._ready(now_s)
        n_free = self._n_free(n_free_slots)
        if self._must_draw(streams, now_s) and (decode := self._decode()):
            return decode
        if streams and self._cannot_wait(streams[0].stream, now_s):
            return self._render(streams)
        if files and not self._rule.files_last:
            return Render((files[0],))
        is_quiet = len(self._writers()) < WRITERS_A_CHUNK * len(streams)
        if self._rule.renders_if_few_write and is_quiet:
            return self._render(streams)
        if streams and self._rule.prefill_first and self._reader(n_free) is None:
            return self._render(streams)
        written = self._write(n_free)
        if written is not None or not (streams or files):
            return written
        return self._render(streams or files[:1])

    def _ready(self, now_s: float) -> tuple[list[Utterance], list[Utterance]]:
        def left_s(utterance: Utterance) -> float:
            if utterance.stream.first_audio_at_s is None:
                return self._rule.unstarted_s
            return buffered_s(utterance.stream, now_s)

        streams, files = super()._ready(now_s)
        return sorted(streams, key=left_s), files

    def _slack_s(self) -> float:
        passes = self._rule.slack_passes
        return self._rule.slack_s if passes is None else passes * self._pass_s

    def _n_free(self, n_free_slots: int) -> int:
        if self._rule.n_writers is None:
            return n_free_slots
        n_writing = sum(u.slot is not None for u in self._utterances)
        return max(0, min(n_free_slots, self._rule.n_writers - n_writing))


@dataclass(frozen=True)
class WhatIsThere(Hops):
    """After the first cut, every chunk takes all whole blocks that are written, up to a limit."""

    n_uncut: Callable[[], int]  # tokens there, those looked ahead at not counted

    def tokens(self, chunk: int) -> int:
        if chunk == 0:
            return super().tokens(chunk)
        n_blocks = self.n_uncut() // self.n_block
        return self.n_block * min(max(n_blocks, 1), MAX_BLOCKS)


def hop_by(rule: Rule, utterance: Utterance) -> None:
    """Give an utterance the hops of a rule."""
    hops = utterance.hops
    rules = replace(
        hops.rules,
        first_hop_tokens=rule.first_hop_tokens,
        later_hop_blocks=rule.hop_blocks or hops.rules.later_hop_blocks,
    )
    utterance.hops = replace(hops, rules=rules)
    if rule.hop_blocks is None:

        def n_uncut() -> int:
            return len(utterance.tokens) - utterance.n_cut - utterance.n_lookahead

        utterance.hops = WhatIsThere(hops.n_prompt_tokens, hops.n_block, rules, n_uncut)
