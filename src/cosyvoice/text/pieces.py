"""Text that arrives in pieces, cut wherever its sender pleased, for a tokenizer that reads words.

Comes in: pieces. Goes out: text that may be tokenised now; what could still grow (a word, a
number, a special token, or the blank before one) waits for the next piece. Joined, the outputs
are the inputs. Knows no ids; the text is not normalised.
"""

import regex

from .special_tokens import ADDED_TOKENS

# More than that is no word, and waiting for its end would let a client fill our memory.
MAX_HELD_CHARS = 100

# Scripts written without blanks pass at once: any cut through them is as good as another.
_RUN_ON = r"\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\uac00-\ud7a3"
_LETTER = rf"(?![{_RUN_ON}])[\p{{L}}\p{{M}}\p{{N}}]"
_BLANKS = regex.compile(r"\s*\Z")
_UNFINISHED = regex.compile(rf"\s*(?:{_LETTER}(?:{_LETTER}|['’-](?!['’-]))*)?\Z")


class PieceBuffer:
    """Holds back the end of a text that the next piece may change."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece; return what is complete by now, often nothing."""
        text = self._held + piece
        cut = _settled(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Return what was held back: nothing more will come."""
        text, self._held = self._held, ""
        return text


def _settled(text: str) -> int:
    """Where the part begins that must wait; the length of the text where none must."""
    first = max(0, len(text) - MAX_HELD_CHARS)
    opener = max(text.rfind("<", first), text.rfind("[", first))
    if opener >= 0 and _begins_special(text[opener:]):
        waiting = _BLANKS.search(text, first, opener)
    else:
        waiting = _UNFINISHED.search(text, first)
    assert waiting, f"both patterns match at the end of {text!r}"
    too_long = waiting.start() == first > 0
    return int(waiting.end() if too_long else waiting.start())


def _begins_special(text: str) -> bool:
    return any(token.startswith(text) and token != text for token in ADDED_TOKENS)
