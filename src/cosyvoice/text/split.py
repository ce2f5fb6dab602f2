"""Cut normalised text into segments that are spoken one after the other.

Comes in: text and the enders of its language, with a measure of length (characters for Chinese,
tokens for English). Goes out: segments of about 60 to 80 units that end where a sentence ends;
nothing ever cuts inside a sentence, so a segment can be longer. Knows no tokenizer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

MAX_LENGTH = 80
MIN_LENGTH = 60  # a segment up to this length takes the next sentence, however long
MERGE_LENGTH = 20  # a last segment below this joins the one before it

_CLOSING_QUOTES = '"”'


@dataclass(frozen=True)
class Punctuation:
    """What ends a sentence in a language, and what is put where nothing does."""

    enders: str
    full_stop: str


CHINESE = Punctuation(enders="。？！；：、.?!;", full_stop="。")
ENGLISH = Punctuation(enders=".?!;:", full_stop=".")


def split(text: str, punctuation: Punctuation, *, length: Callable[[str], int] = len) -> list[str]:
    """Cut text into segments; text of nothing but enders gives none."""
    if not text:
        return []
    if text[-1] not in punctuation.enders:
        text += punctuation.full_stop
    return list(_joined(_sentences(text, punctuation.enders), length))


def _sentences(text: str, enders: str) -> list[str]:
    """Text cut after each ender; an ender right after another is dropped, a closing quote kept."""
    sentences: list[str] = []
    start = 0
    for i, character in enumerate(text):
        if character not in enders:
            continue
        if i > start:
            sentences.append(text[start : i + 1])
        start = i + 1
        # Without a sentence before it, the quote stays with the text that follows.
        if sentences and text[i + 1 : i + 2] in tuple(_CLOSING_QUOTES):
            sentences[-1] += text[i + 1]
            start = i + 2
    return sentences


def _joined(sentences: Iterable[str], length: Callable[[str], int]) -> Iterator[str]:
    done = ""  # one segment behind: the last may still take a short tail
    segment = ""
    for sentence in sentences:
        if length(segment + sentence) > MAX_LENGTH and length(segment) > MIN_LENGTH:
            if done:
                yield done
            done, segment = segment, ""
        segment += sentence
    if done and length(segment) < MERGE_LENGTH:
        yield done + segment
    else:
        yield from filter(None, (done, segment))
