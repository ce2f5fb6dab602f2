"""The front end: what a caller asks for -> a request the engine can carry out.

In: an `Order`, text and recordings as they came. Out: a `Request` of ids and tensors. This is the
only place where prompts are assembled, so the prefix and the five modes are decided here and
nowhere else. It knows no engine, no device and no door; many threads may call it at once.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cosyvoice import prompt as prompts
from cosyvoice.audio import Source
from cosyvoice.config import MAX_SPEED, MIN_SPEED, Rules
from cosyvoice.engine.request import Request, Sentence, TextToCome
from cosyvoice.engine.stream import TextSource
from cosyvoice.errors import BadRequest
from cosyvoice.prompt import Prompt
from cosyvoice.text import (
    PREFIX,
    PieceBuffer,
    TextFrontEnd,
    Tokenizer,
    complete_instruction,
    complete_transcript,
    is_speakable,
    require_head,
    split_head,
)
from cosyvoice.voice import Voice, VoiceEncoder
from cosyvoice.voicebook import VoiceBook

log = logging.getLogger(__name__)

Mode = Literal["zero_shot", "cross_lingual", "instruct2", "sft"]
NOTHING_TO_SPEAK = "there is nothing to speak: give a text with letters or digits"
MODES: tuple[Mode, ...] = ("zero_shot", "cross_lingual", "instruct2", "sft")


@dataclass(frozen=True)
class Order:
    """What a caller asks for, as it came.

    text: None means that it will come in pieces, through the stream's `say`.
    voice: a stored voice's name; else `recording` is the voice. Without `mode` it follows from
    what is given. `text_frontend`: normalise and split the text; "reference" as the reference does.
    """

    text: str | None
    seed: int
    voice: str = ""
    recording: Source | None = None
    transcript: str = ""
    instruction: str = ""
    mode: Mode | None = None
    streaming: bool = False
    speed: float = 1.0
    text_frontend: bool | Literal["reference"] = True
    max_tokens: int | None = None  # of speech per sentence, 25 a second; None: the model's rule


class FrontEnd:
    """Tokenizer, normaliser, voice encoder and voices of one model directory."""

    def __init__(
        self, *, tokenizer: Tokenizer, encoder: VoiceEncoder, book: VoiceBook, rules: Rules
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.book = book
        self.spk2info: dict[str, Voice] = {}  # voices of the model directory, and added ones
        self.rules = rules
        self.text = TextFrontEnd.under(rules, tokenizer)
        self._bare_text = TextFrontEnd.under(replace(rules, clean_quotes=False), tokenizer)

    def voice_names(self) -> list[str]:
        """All stored voices: the model directory's first, then the voice book's."""
        return [*self.spk2info, *(n for n in self.book.names() if n not in self.spk2info)]

    def request(self, order: Order) -> Request:
        """Assemble a request; slow where the recording is new. Raises BadRequest, VoiceNotFound."""
        check_speed(order.speed)
        if order.text is not None and not is_speakable(order.text):
            raise BadRequest(NOTHING_TO_SPEAK)
        voice = self._voice(order)
        mode = order.mode or self._mode(order, voice)
        if mode == "sft" and voice.can_clone:
            mode = "zero_shot" if _has_transcript(voice) else "cross_lingual"
        if mode != "sft" and not voice.can_clone:
            raise BadRequest(f"the voice {order.voice!r} is only an embedding: use mode sft")
        request = Request(
            self._prompt(mode, order, voice),
            streaming=order.streaming,
            speed=order.speed,
            seed=order.seed,
            max_tokens=order.max_tokens,
        )
        has_own_head = mode in ("cross_lingual", "sft")
        if order.text is None:
            return self._open(request, has_own_head=has_own_head)
        ids = self._headed(order) if has_own_head else self._bare(order)
        return replace(request, sentences=ids)

    def conversion(
        self, source: Source, recording: Source, *, streaming: bool, speed: float
    ) -> Request:
        """A request that speaks the source's words in the recording's voice; no text involved."""
        check_speed(speed)
        tokens = tuple(self.encoder.tokens(source).tolist())
        prompt = prompts.conversion(self.encoder.encode(recording))
        return Request(prompt, tokens=tokens, streaming=streaming, speed=speed)

    # Voices.

    def _voice(self, order: Order) -> Voice:
        if order.voice:
            stored = self.spk2info.get(order.voice)
            return stored if stored is not None else self.book.get(order.voice)
        if order.recording is None:
            raise BadRequest("whose voice? give a recording or the name of a stored voice")
        return self.encoder.encode(order.recording, order.transcript)

    def _mode(self, order: Order, voice: Voice) -> Mode:
        if order.instruction:
            return "instruct2"
        if order.transcript or _has_transcript(voice):
            return "zero_shot"
        return "cross_lingual" if voice.can_clone else "sft"

    # Prompts.

    def _prompt(self, mode: Mode, order: Order, voice: Voice) -> Prompt:
        if mode == "zero_shot":
            return prompts.zero_shot(voice, self._transcript_ids(order, voice))
        if mode == "cross_lingual":
            return prompts.cross_lingual(voice)
        if mode == "instruct2":
            return prompts.instruct2(voice, self._instruction_ids(order, voice))
        return prompts.sft(voice)

    def _transcript_ids(self, order: Order, voice: Voice) -> Sequence[int]:
        if voice.transcript_ids is not None:
            return self._completed(voice.transcript_ids)
        transcript = voice.transcript or order.transcript
        if not transcript and self.rules.add_prefix:
            raise BadRequest(
                "mode zero_shot needs the words of the recording: give its transcript, "
                "or use mode cross_lingual"
            )
        return self.tokenizer.encode(self._with_prefix(transcript, "prompt_text"))

    def _instruction_ids(self, order: Order, voice: Voice) -> Sequence[int]:
        if order.voice and not self.rules.instruct_saved_voice:
            return self._transcript_ids(order, voice)
        if not order.instruction:
            raise BadRequest("mode instruct2 needs an instruction, such as 'Speak slowly.'")
        if self.rules.add_prefix:
            return self.tokenizer.encode(complete_instruction(order.instruction))
        return self.tokenizer.encode(require_head(order.instruction, "instruct_text"))

    def _completed(self, ids: Sequence[int]) -> Sequence[int]:
        """Stored ids; a prefix missing there is added at use."""
        if self.tokenizer.endofprompt in ids:
            return ids
        if not self.rules.add_prefix:
            raise BadRequest("the stored voice's transcript lacks <|endofprompt|>: add it anew")
        return [*self.tokenizer.encode(PREFIX), *ids]

    def _with_prefix(self, text: str, field: str) -> str:
        return complete_transcript(text) if self.rules.add_prefix else require_head(text, field)

    # Text.

    def _bare(self, order: Order) -> tuple[Sentence, ...]:
        """Sentences of zero_shot and instruct2: the head stands in the prompt."""
        assert order.text is not None
        text = order.text
        if self.rules.cut_heads:
            head, text = split_head(text)
            if head:
                log.warning("the text began with %r, which belongs in the prompt: cut off", head)
        return tuple(
            Sentence(tuple(self.tokenizer.encode(segment)))
            for segment in self._segments(text, order)
        )

    def _headed(self, order: Order) -> tuple[Sentence, ...]:
        """Sentences of cross_lingual and sft: each has the head before it."""
        assert order.text is not None
        if not self.rules.cut_heads:
            text = self._with_prefix(order.text, "tts_text")
            return (Sentence(tuple(self.tokenizer.encode(text))),)
        head, text = split_head(order.text)
        head_ids = self.tokenizer.encode(head or self._with_prefix("", "tts_text"))
        return tuple(
            Sentence((*head_ids, *self.tokenizer.encode(segment)), n_head=len(head_ids))
            for segment in self._segments(text, order)
        )

    def _segments(self, text: str, order: Order) -> list[str]:
        if not order.text_frontend:
            return [text]
        text_front_end = self._bare_text if order.text_frontend == "reference" else self.text
        return [segment for segment in text_front_end.segments(text) if is_speakable(segment)]

    def _open(self, request: Request, *, has_own_head: bool) -> Request:
        """A request whose text is still to come."""
        if not self.rules.clean_interleave:
            if has_own_head:
                raise BadRequest("text in pieces needs a prompt text: use zero_shot or instruct2")
            return replace(request, text=self._to_come(RawPieces(self.tokenizer), request.prompt))
        return replace(request, text=self._to_come(Pieces(self.tokenizer), request.prompt))

    def _to_come(self, source: TextSource, prompt: Prompt) -> TextToCome:
        ids = prompt.llm_text or tuple(self.tokenizer.encode(PREFIX))
        n_head = ids.index(self.tokenizer.endofprompt) + 1
        return TextToCome(source, ids[:n_head], ids[n_head:])


class Pieces:
    """Text in pieces -> ids; a word or a number that may still grow waits for the next piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._buffer = PieceBuffer()
        self._is_speakable = False

    def push(self, piece: str) -> list[int]:
        self._is_speakable = self._is_speakable or is_speakable(piece)
        return self._tokenizer.encode(self._buffer.push(piece))

    def finish(self) -> list[int]:
        if not self._is_speakable:
            raise BadRequest(NOTHING_TO_SPEAK)
        return self._tokenizer.encode(self._buffer.finish())


class RawPieces:
    """The reference's way: each piece is tokenised on its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def push(self, piece: str) -> list[int]:
        return self._tokenizer.encode(piece)

    def finish(self) -> list[int]:
        return []


def check_speed(speed: float) -> None:
    """BadRequest where `speed` is not between 0.25 and 4."""
    if not (math.isfinite(speed) and MIN_SPEED <= speed <= MAX_SPEED):
        raise BadRequest(f"speed must lie between {MIN_SPEED} and {MAX_SPEED:g}, not {speed}")


def _has_transcript(voice: Voice) -> bool:
    return bool(voice.transcript) or voice.transcript_ids is not None
