"""What the LLM of one sentence is fed, and what it may answer.

Comes in: ids of text and prompt, and the ids drawn. Goes out: the items to feed before the next
draw (a speech id as it is, a text id t as ~t), what that draw must not give, and the tokens to
speak. Knows no tensor, no probability, no thread and no clock.

A script is asked in a round: while it neither `is_waiting` nor `is_done`, feed `pending`, then
`accept` the id that is `forced`, or one drawn outside `forbidden`.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from cosyvoice.config import OURS, LLMConfig, Rules
from cosyvoice.errors import BadRequest, SpeechError

MIN_TOKENS_PER_TEXT = 2  # docs/spec/llm.md section 4
MAX_TOKENS_PER_TEXT = 20


class Forbidden(NamedTuple):
    """Ids that get no probability: first <= id < stop, but for the spared one."""

    first: int
    stop: int
    spared: int = -1


NOTHING = Forbidden(0, 0)


class Script(Protocol):
    """One sentence's side of the conversation with the LLM."""

    pending: list[int]  # items to feed before the next draw; nothing to feed while waiting
    history: list[int]  # all ids accepted, for the repetition rule; its length counts the draws
    is_done: bool

    @property
    def is_waiting(self) -> bool:
        """More text is needed before there is anything to feed."""
        ...

    @property
    def forced(self) -> int | None:
        """The id to accept without drawing one."""
        ...

    @property
    def forbidden(self) -> Forbidden:
        """What the next draw must not give."""
        ...

    def accept(self, drawn: int) -> int | None:
        """Take an id; the token to speak, where it is one."""
        ...


class TextIn(Script, Protocol):
    """A script whose text arrives while it speaks."""

    def say(self, ids: Iterable[int]) -> None:
        """More text ids."""
        ...

    def end_text(self) -> None:
        """There will be no more."""
        ...


def text_items(ids: Iterable[int]) -> list[int]:
    return [~i for i in ids]


def token_limits(n_text: int, n_counted: int) -> tuple[int, int]:
    """(min_len, max_len) of a text of n_text ids, n_counted of them without its prefix."""
    return MIN_TOKENS_PER_TEXT * n_counted, MAX_TOKENS_PER_TEXT * n_text


def split_head(prompt_text: Sequence[int], separator: int) -> tuple[list[int], list[int]]:
    """(head, rest): the ids up to and including the first <|endofprompt|>, and those after it."""
    if separator not in prompt_text:
        raise BadRequest("the prompt text lacks <|endofprompt|>: put it after the instruction")
    n_head = prompt_text.index(separator) + 1
    return list(prompt_text[:n_head]), list(prompt_text[n_head:])


def plain_items(
    config: LLMConfig,
    text: Sequence[int],
    *,
    prompt_text: Sequence[int] = (),
    prompt_speech: Sequence[int] = (),
) -> list[int]:
    """[sos | prompt text | text | task | prompt speech], the whole input when the text is known."""
    return [
        config.sos,
        *text_items(prompt_text),
        *text_items(text),
        config.task,
        *prompt_speech,
    ]


class Plain:
    """A sentence whose text is known: one prefix, then token after token."""

    is_waiting = False
    forced = None

    def __init__(
        self,
        config: LLMConfig,
        items: Iterable[int],
        *,
        min_len: int,
        max_len: int,
        rules: Rules = OURS,
    ) -> None:
        self.pending = list(items)
        self.history: list[int] = []
        self.is_done = max_len <= 0
        self._n_speech_tokens = config.n_speech_tokens
        self._early = _before_min_len(config, rules)
        self._min_len = min_len
        self._max_len = max_len

    @property
    def forbidden(self) -> Forbidden:
        return self._early if len(self.history) < self._min_len else NOTHING

    def accept(self, drawn: int) -> int | None:
        assert not self.is_done, f"id {drawn} after the end"
        self.history.append(drawn)
        if drawn >= self._n_speech_tokens:
            self.is_done = True
            return None
        self.pending = [drawn]
        self.is_done = len(self.history) >= self._max_len
        return drawn


class Interleaved:
    """Text-in: blocks of five text ids and fifteen speech tokens, as the model was trained.

    What is fed depends on the text and the draws alone, never on how the text was cut or when it
    came. Prompt speech that has found no block when the text ends goes behind the task id, where
    training has it; so a text shorter than a block is fed just as Plain would.
    """

    def __init__(
        self,
        config: LLMConfig,
        head: Iterable[int],
        *,
        rest: Iterable[int] = (),
        prompt_speech: Sequence[int] = (),
    ) -> None:
        self.pending = [config.sos, *text_items(head)]
        self.history: list[int] = []
        self.is_done = False
        self._config = config
        self._text = deque(text_items(rest))
        self._speech = deque(prompt_speech)
        self._next_fill = _first_fill(config, len(prompt_speech))
        # The prompt ends with a whole block, or there is none: text comes first.
        self._wants_text = len(prompt_speech) % config.mix_ratio[1] == 0
        self._is_speaking = False  # pending is to be fed and answered
        self._is_final = False  # all text is fed
        self._has_ended = False
        self._n_said = 0  # text ids that came through `say`
        self._n_spoken = 0

    @property
    def is_waiting(self) -> bool:
        return not self._is_speaking and not self.is_done

    @property
    def forced(self) -> int | None:
        is_full = self._is_speaking and len(self.history) == self._next_fill
        return self._config.fill if is_full and not self._is_final else None

    @property
    def forbidden(self) -> Forbidden:
        if self._is_final:
            return NOTHING
        return Forbidden(
            self._config.n_speech_tokens, self._config.n_speech_rows, self._config.fill
        )

    def say(self, ids: Iterable[int]) -> None:
        assert not self._has_ended, "text after its end"
        items = text_items(ids)
        self._n_said += len(items)
        self._text.extend(items)
        self._go_on()

    def end_text(self) -> None:
        self._has_ended = True
        self.is_done = self.is_done or self._n_said == 0
        self._go_on()

    def accept(self, drawn: int) -> int | None:
        assert self._is_speaking, f"id {drawn} while nothing was asked"
        self.history.append(drawn)
        if drawn >= self._config.n_speech_tokens:
            self._stop_speaking(drawn)
            return None
        self.pending = [drawn]
        self._n_spoken += 1
        # Before the text has ended, three tokens for each of its ids are all that blocks allow.
        if self._is_final and self._n_spoken >= MAX_TOKENS_PER_TEXT * self._n_said:
            self.is_done = True
        return drawn

    def _stop_speaking(self, drawn: int) -> None:
        self._is_speaking = False
        self.pending = []
        if self._is_final:
            self.is_done = True
            return
        assert drawn == self._config.fill, f"id {drawn} was forbidden"
        self._next_fill = len(self.history) + self._config.mix_ratio[1]
        self._wants_text = True
        self._go_on()

    def _go_on(self) -> None:
        """Make the next pending items, once the text for them is there."""
        if self._is_speaking or self.is_done or not self._n_said:
            return
        n_text = self._config.mix_ratio[0]
        _place_prompt(self._config, self.pending, text=self._text, speech=self._speech)
        if not self._speech and not self._wants_text:
            self._is_speaking = True
        elif not self._speech and len(self._text) >= n_text:
            self.pending += _take(self._text, n_text)
            self._is_speaking = True
        elif self._has_ended:
            self.pending += [*self._text, self._config.task, *self._speech]
            self._is_speaking = self._is_final = True


class ReferenceInterleaved:
    """Text-in exactly as the reference does it (docs/spec/llm.md section 7), traps included.

    One block at most for each arriving text id; what was fed before a fill is fed again when the
    text ends; without a prompt it speaks before it has read; leftover prompt speech is lost.
    """

    def __init__(
        self,
        config: LLMConfig,
        head: Iterable[int],
        *,
        rest: Iterable[int] = (),
        prompt_speech: Sequence[int] = (),
    ) -> None:
        self.pending = [config.sos, *text_items(head)]
        self.history: list[int] = []
        self.is_done = False
        self._config = config
        self._arrived: deque[int] = deque()  # text items not looked at yet
        self._text = deque(text_items(rest))
        self._speech = deque(prompt_speech)
        self._next_fill = _first_fill(config, len(prompt_speech))
        self._is_speaking = False
        self._is_final = False
        self._has_ended = False

    @property
    def is_waiting(self) -> bool:
        return not self._is_speaking and not self.is_done

    @property
    def forced(self) -> int | None:
        is_full = self._is_speaking and len(self.history) == self._next_fill
        return self._config.fill if is_full and not self._is_final else None

    @property
    def forbidden(self) -> Forbidden:
        return NOTHING if self._is_final else _only_sos(self._config)

    def say(self, ids: Iterable[int]) -> None:
        assert not self._has_ended, "text after its end"
        self._arrived.extend(text_items(ids))
        self._go_on()

    def end_text(self) -> None:
        self._has_ended = True
        self._go_on()

    def accept(self, drawn: int) -> int | None:
        assert self._is_speaking, f"id {drawn} while nothing was asked"
        self.history.append(drawn)
        if drawn < self._config.n_speech_tokens:
            self.pending = [drawn]
            return drawn
        self._is_speaking = False
        if self._is_final and drawn == self._config.eos:
            self.is_done = True
        elif not self._is_final and drawn == self._config.fill:
            self._next_fill = len(self.history) + self._config.mix_ratio[1]
            self._go_on()
        else:
            self.is_done = True
            raise SpeechError(
                f"the model drew the special id {drawn} in the middle of a text: "
                "try another seed, or leave the reference mode, which forbids it"
            )
        return None

    def _go_on(self) -> None:
        while self._arrived and not self._is_speaking:
            self._text.append(self._arrived.popleft())
            _place_prompt(self._config, self.pending, text=self._text, speech=self._speech)
            self._is_speaking = not self._speech and self._begin_block()
        if self._has_ended and not self._is_speaking and not self.is_done:
            self.pending = [*self.pending, *self._text, self._config.task]
            self._is_speaking = self._is_final = True

    def _begin_block(self) -> bool:
        """Take a block's text if one is due; False where it is not there yet."""
        is_after_fill = bool(self.history)  # speaking ends with a fill only
        if not is_after_fill and len(self.pending) != 1:
            return True
        n_text = self._config.mix_ratio[0]
        if len(self._text) < n_text:
            return False
        kept = [] if is_after_fill else self.pending
        self.pending = kept + _take(self._text, n_text)
        return True


def _before_min_len(config: LLMConfig, rules: Rules) -> Forbidden:
    if rules.forbid_all_stops:
        return Forbidden(config.n_speech_tokens, config.n_speech_rows)
    return _only_sos(config)


def _only_sos(config: LLMConfig) -> Forbidden:
    """What the reference forbids when it means to forbid the end."""
    return Forbidden(config.sos, config.sos + 1)


def _first_fill(config: LLMConfig, n_prompt_speech: int) -> int:
    """After how many tokens the block that the prompt has begun is full."""
    n_block = config.mix_ratio[1]
    return n_block - n_prompt_speech % n_block


def _place_prompt(
    config: LLMConfig, pending: list[int], *, text: deque[int], speech: deque[int]
) -> None:
    """Move whole blocks of text and prompt speech to pending, as far as the text goes."""
    n_text, n_speech = config.mix_ratio
    while speech and len(text) >= n_text:
        pending += _take(text, n_text)
        pending += _take(speech, n_speech)


def _take(items: deque[int], n: int) -> list[int]:
    """Remove and return the first n, or all there are."""
    return [items.popleft() for _ in range(min(n, len(items)))]
