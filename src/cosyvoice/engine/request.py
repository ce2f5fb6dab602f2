"""What is asked of the engine, and one sentence of it in flight.

In: text ids and a prompt, both made elsewhere. Out: plain Python state the scheduler reads and the
runner fills. It knows no torch, no batch and no text rules.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cosyvoice.config import MAX_TOKENS, TOKENS_HZ, Rules
from cosyvoice.errors import BadRequest

from .draws import Draws
from .script import Script
from .silence import SilentFilter
from .stream import Stream, TextSource

if TYPE_CHECKING:
    from cosyvoice.prompt import Prompt


@dataclass(frozen=True)
class Sentence:
    """Text ids the LLM is to speak."""

    ids: tuple[int, ...]
    n_head: int = 0  # leading ids that belong to the prefix, not to the text


@dataclass(frozen=True)
class Request:
    """One thing to say. Exactly one of sentences, tokens and text tells what.

    sentences: spoken one after the other. tokens: speech tokens at hand (voice conversion).
    text: more to come, through the stream's `say`.
    """

    prompt: "Prompt"
    sentences: tuple[Sentence, ...] = ()
    tokens: tuple[int, ...] | None = None
    text: "TextToCome | None" = None
    streaming: bool = False
    speed: float = 1.0
    seed: int = 0
    max_tokens: int | None = None  # per sentence, where the caller wants less than the rules allow


@dataclass(frozen=True)
class TextToCome:
    """How text in pieces becomes ids, and what the LLM is fed before it."""

    source: TextSource
    head: tuple[int, ...]  # up to and including <|endofprompt|>
    rest: tuple[int, ...] = ()  # the recording's transcript, which the text continues


@dataclass(frozen=True)
class Hops:
    """After how many tokens a stream is cut; a pure function of the chunk's index.

    Cuts lie on the flow's block boundaries, counted from the start of the prompt. Ours: the first
    boundary with at least `n_first` new tokens, then 25, 50, 100. The reference's: 25 and what the
    prompt lacks to a boundary, then 50, 100.
    """

    n_prompt_tokens: int
    n_block: int
    rules: Rules

    def tokens(self, chunk: int) -> int:
        """Length of chunk number `chunk`, in tokens."""
        if chunk == 0:
            least = self.n_prompt_tokens + self.rules.first_hop_tokens
            return -(-least // self.n_block) * self.n_block - self.n_prompt_tokens
        blocks = self.rules.later_hop_blocks
        return self.n_block * blocks[min(chunk, len(blocks)) - 1]


@dataclass(frozen=True)
class Chunk:
    """What the flow is given next."""

    tokens: tuple[int, ...]
    is_last: bool


@dataclass(eq=False)
class Utterance:
    """One sentence in flight; the runner's states hang on it and are freed with it."""

    request: Request
    stream: Stream
    index: int  # of the sentence within its request
    script: Script | None  # None: the tokens are given
    hops: Hops
    n_lookahead: int  # tokens the flow wants to see beyond a cut
    draws: Draws
    silence: SilentFilter = field(default_factory=SilentFilter)
    tokens: list[int] = field(default_factory=list)  # that go to the flow
    n_fed: int = 0  # of them handed to the flow
    n_cut: int = 0  # of them covered by chunks so far
    n_chunks: int = 0
    slot: int | None = None  # of the LLM's cache
    n_read: int = 0  # of the script's pending items that the LLM has been fed already
    is_warm: bool = False  # its voiceover has been begun
    voiceover: Any = None  # the runner's states of flow and vocoder

    @property
    def is_written(self) -> bool:
        """The LLM has nothing to add."""
        return self.script is None or self.script.is_done

    @property
    def is_due(self) -> bool:
        """Its turn to be heard: all sentences before it are."""
        return self.index == self.stream.n_heard

    @property
    def pending(self) -> list[int]:
        """Items the LLM is fed next; none while text is awaited."""
        if self.script is None or self.script.is_waiting:
            return []
        return self.script.pending[self.n_read :] if self.n_read else self.script.pending

    @property
    def wants_slot(self) -> bool:
        return self.slot is None and not self.is_written and bool(self.pending)

    @property
    def wants_step(self) -> bool:
        """Holds a slot and something to feed."""
        return self.slot is not None and not self.is_written and bool(self.pending)

    @property
    def has_chunk(self) -> bool:
        """There is something to render now."""
        return self.is_written or (
            self.request.streaming
            and len(self.tokens) - self.n_cut >= self.hops.tokens(self.n_chunks) + self.n_lookahead
        )

    def take_chunk(self) -> Chunk:
        """The next chunk for the flow: whole hops while the LLM writes, all that is left after."""
        n_hop = self.hops.tokens(self.n_chunks)
        is_last = not self.request.streaming or (
            self.is_written and len(self.tokens) - self.n_cut < n_hop + self.n_lookahead
        )
        stop = len(self.tokens) if is_last else self.n_cut + n_hop + self.n_lookahead
        chunk = Chunk(tuple(self.tokens[self.n_fed : stop]), is_last)
        self.n_fed = stop
        self.n_cut = stop if is_last else stop - self.n_lookahead
        self.n_chunks += 1
        return chunk

    def accept(self, drawn: int) -> None:
        """Take the id the LLM drew (or was made to say)."""
        assert self.script is not None, "an utterance of given tokens draws none"
        self.n_read = 0
        token = self.script.accept(drawn)
        if token is not None and self.silence.keep(token):
            self._check_room()
            self.tokens.append(token)

    def _check_room(self) -> None:
        """The fixed noise of flow and vocoder lasts for 300 s; text-in could outgrow it."""
        n_tokens = len(self.tokens) + 1
        n_flow_tokens = self.hops.n_prompt_tokens + n_tokens
        if n_flow_tokens > MAX_TOKENS or n_tokens / self.request.speed > MAX_TOKENS:
            raise BadRequest(
                f"one sentence may last {MAX_TOKENS // TOKENS_HZ} s: end sentences, or begin a new "
                "request"
            )
