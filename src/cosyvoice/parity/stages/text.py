"""Stage 8: texts to what is spoken, whole and in segments.

In: the texts of the document. Out: our normalisation of each, under the rules of its column:
wetext 0.1.8 with English as English, and its backslashes left where it puts them.
"""

from collections.abc import Iterator
from dataclasses import replace

from cosyvoice.config import REFERENCE
from cosyvoice.parity.found import Fact, Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject
from cosyvoice.text import TextFrontEnd

RULES = replace(REFERENCE, english_only=True)


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """Two facts for each text."""
    front_end = TextFrontEnd.under(RULES, subject.tokenizer)
    for i, row in enumerate(part.at("rows")):
        yield Fact(("rows", i, "wetext018"), front_end.segments(row["text"]))
        yield Fact(("rows", i, "wetext018_nosplit"), front_end.normalize(row["text"]))
