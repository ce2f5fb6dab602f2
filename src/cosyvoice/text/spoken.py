"""Written to spoken: numbers, dates, sums and units as words, with wetext's grammars.

Comes in: stripped Chinese or English text of any length. Goes out: the same text with words in
place of figures. wetext loads on first use. Its cost grows faster than the text, so long text is
handed over sentence by sentence. May be shared between threads. Knows no tokens and no segments.
"""

import re
import threading
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

# Text up to here goes through in one piece (a quarter of a second at worst); longer text by
# sentences, and a sentence beyond the second limit is cut at its last blank within it.
MAX_WHOLE_CHARS = 1000
MAX_SENTENCE_CHARS = 200

# A sentence end, beyond doubt: not the point of `Mr.`, `a.m.`, `3.5`, nor the `?` of an address.
_END = r"(?:[。！？；\n]|(?<=\w\w\w\w)[.;:](?=\s)|[!?](?=\s))"
_TO_END = rf".{{0,{MAX_SENTENCE_CHARS - 1}}}?{_END}"
_TO_LIMIT = rf".{{1,{MAX_SENTENCE_CHARS}}}"
_SENTENCE = re.compile(rf"(?:{_TO_END}|{_TO_LIMIT}(?=\s|\Z)|{_TO_LIMIT})\s*", re.DOTALL)

_LETTER = re.compile(r"\w")
_DIGIT = re.compile(r"\d")
_ESCAPED = re.compile(r'\\([\\"])')

MAX_NUMBER_DIGITS = 36  # decillions; inflect has no names beyond


class Spoken(Protocol):
    """Writes out figures in the two languages the model was trained with."""

    def chinese(self, text: str) -> str: ...

    def english(self, text: str) -> str: ...


class Wetext:
    """wetext's text normalisation, all optional flags off.

    `clean_quotes` takes out the backslashes that wetext leaves before `"` and backslashes;
    without it the result is what the reference feeds its model. `english_only=False` leaves the
    language of English text to wetext, which reads a lone number in Chinese.
    """

    def __init__(self, *, english_only: bool = True, clean_quotes: bool = False) -> None:
        self._english = "en" if english_only else "auto"
        self._clean_quotes = clean_quotes
        self._lock = threading.Lock()  # wetext promises nothing about threads

    def chinese(self, text: str) -> str:
        return self._speak(text, "zh")

    def english(self, text: str) -> str:
        return self._speak(text, self._english)

    def _speak(self, text: str, language: str) -> str:
        if len(text) <= MAX_WHOLE_CHARS:
            spoken = self._grammar(text, language)
            if spoken is not None:
                return spoken
        return "".join(self._sentence(sentence, language) for sentence in _sentences(text))

    def _sentence(self, sentence: str, language: str) -> str:
        words = sentence.rstrip()
        blanks = sentence[len(words) :]
        if language != "zh" and blanks:
            blanks = " "  # as wetext leaves between English words
        # A run of signs costs ten times as much as words and stays what it is.
        spoken = self._grammar(words, language) if _LETTER.search(words) else None
        return (words if spoken is None else spoken) + blanks

    def _grammar(self, text: str, language: str) -> str | None:
        """What the grammar makes of the text, or None where it has no reading for it."""
        # Imported here: it reads every grammar it has, in a quarter of a second.
        from wetext import normalize

        try:
            with self._lock:
                spoken = str(normalize(text, lang=language, operator="tn"))
        except AssertionError:  # how wetext says that no path of its grammar fits
            return None
        # Chinese text without a digit comes back as it went in, its own backslashes included.
        if self._clean_quotes and (language != "zh" or _DIGIT.search(text)):
            return _ESCAPED.sub(r"\1", spoken)
        return spoken


def _sentences(text: str) -> list[str]:
    """Text cut into sentences with the blanks that follow them; joined they are the text."""
    return [found.group() for found in _SENTENCE.finditer(text)]


class DigitSpeller:
    """Puts English number words in place of the digits that are left; shared between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # inflect keeps the options of a call on its engine

    def spell(self, text: str) -> str:
        """Replace each run of digits, superscripts included, by its number word."""
        runs = ((digits, "".join(run)) for digits, run in groupby(text, str.isdigit))
        return "".join(self._number(run) if digits else run for digits, run in runs)

    def _number(self, digits: str) -> str:
        if len(digits) > MAX_NUMBER_DIGITS:
            return " ".join(self._words(digit) for digit in digits)
        return self._words(digits)

    def _words(self, digits: str) -> str:
        with self._lock:
            return str(self._engine.number_to_words(digits))

    @cached_property
    def _engine(self) -> Any:
        import inflect  # takes a second, and is needed for rare texts only

        return inflect.engine()
