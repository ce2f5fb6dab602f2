"""Stage 1: strings to ids.

In: the strings of the document. Out: their ids, their tokens by name, the special tokens.
"""

import json
from collections.abc import Iterator

import torch

from cosyvoice.parity.found import Computed, Fact, Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject
from cosyvoice.text.tokenizer import FOLDER


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """One tensor and two facts for each string, then the special tokens."""
    tokenizer = subject.tokenizer
    names = _names(subject)
    for i, string in enumerate(part.at("strings")):
        ids = tokenizer.encode(string["text"])
        yield Computed(f"ids_{i:02d}", torch.tensor(ids, dtype=torch.int32), is_piece=True)
        yield Fact(("strings", i, "ids"), ids)
        yield Fact(("strings", i, "tokens"), [names[j] for j in ids])
    yield Fact(("added_token_ids",), tokenizer.specials)
    yield Fact(("endofprompt_id",), tokenizer.endofprompt)
    yield Fact(("n_tokens",), len(tokenizer))


def _names(subject: Subject) -> dict[int, str]:
    """How the vocabulary writes each id."""
    file = subject.model_dir / FOLDER / "vocab.json"
    vocabulary = json.loads(file.read_text(encoding="utf-8"))
    specials = subject.tokenizer.specials
    return {i: name for name, i in {**vocabulary, **specials}.items()}
