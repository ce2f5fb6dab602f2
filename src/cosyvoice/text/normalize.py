"""Text as a client wrote it -> text as it is to be spoken, whole or in segments.

Comes in: any string. Goes out: what docs/spec/text.md section 3 makes of it. Text with a special
token of the form `<|...|>` is passed on untouched, hence also prefixed prompts: take their head
off first (`split_head`). May be shared between threads. Knows no voice and no mode.
"""

from typing import Self

import regex

from cosyvoice.config import Rules

from .prompt_text import split_head
from .split import CHINESE, ENGLISH, split
from .spoken import DigitSpeller, Spoken, Wetext
from .tokenizer import Tokenizer, well_formed

_HAN = regex.compile("[\u4e00-\u9fff]")
_ONLY_SIGNS = regex.compile(r"[\p{P}\p{S}]*")
_LETTER_OR_NUMBER = regex.compile(r"[\p{L}\p{N}]")
_CHINESE_SIGNS = str.maketrans({"²": "平方", "³": "立方", ".": "。"})
_BRACKETS = str.maketrans("", "", "（）【】`")


class TextFrontEnd:
    """The reference's `text_normalize`, its bool parameters made into methods."""

    def __init__(self, tokenizer: Tokenizer, spoken: Spoken) -> None:
        self._tokenizer = tokenizer
        self._spoken = spoken
        self._digits = DigitSpeller()

    @classmethod
    def under(cls, rules: Rules, tokenizer: Tokenizer) -> Self:
        """The front end that a set of rules asks for."""
        wetext = Wetext(english_only=rules.english_only, clean_quotes=rules.clean_quotes)
        return cls(tokenizer, wetext)

    def normalize(self, text: str) -> str:
        """The text to be spoken in one piece."""
        text = well_formed(text)
        if _is_verbatim(text):
            return text
        text = text.strip()
        return self._chinese(text) if _HAN.search(text) else self._english(text)

    def segments(self, text: str) -> list[str]:
        """The text to be spoken, cut where sentences end; none where it is only signs."""
        text = well_formed(text)
        if _is_verbatim(text):
            return [text]
        text = text.strip()
        if _HAN.search(text):
            segments = split(self._chinese(text), CHINESE)
        else:
            segments = split(self._english(text), ENGLISH, length=self._n_tokens)
        return [segment for segment in segments if not _ONLY_SIGNS.fullmatch(segment)]

    def _n_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))

    def _chinese(self, text: str) -> str:
        text = drop_blanks(self._spoken.chinese(text).replace("\n", ""))
        text = text.translate(_CHINESE_SIGNS).replace(" - ", "，")
        text = text.translate(_BRACKETS).replace("——", " ")
        kept = text.rstrip("，,、")
        return text if kept == text else kept + "。"

    def _english(self, text: str) -> str:
        return self._digits.spell(self._spoken.english(text))


def drop_blanks(text: str) -> str:
    """Keep a space only between two ASCII characters that are not spaces themselves."""
    # The first character's left neighbour is the last one, as in the reference.
    right = text[1:] + " "
    left = text[-1:] + text
    return "".join(
        character
        for before, character, after in zip(left, text, right, strict=False)
        if character != " " or (_is_ascii_sign(before) and _is_ascii_sign(after))
    )


def is_speakable(text: str) -> bool:
    """Whether there is a letter or a number to say, a prompt's head aside."""
    return _LETTER_OR_NUMBER.search(split_head(text)[1]) is not None


def _is_ascii_sign(character: str) -> bool:
    return character.isascii() and character != " "


def _is_verbatim(text: str) -> bool:
    return not text or ("<|" in text and "|>" in text)
