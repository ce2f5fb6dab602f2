"""The stages of synthesis, each computed by the classes that synthesis itself uses.

Comes in: a part of a golden set (its inputs) and the model under test. Goes out: what we make of
those inputs, one find at a time. A stage reads no expected value and knows no tolerance.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cosyvoice.parity.found import Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject

from . import features, flow, llm, sampling, speech, text, tokenizer, vocoder


@dataclass(frozen=True)
class Stage:
    """Which files it is about, and how it is computed."""

    number: int
    stem: str
    compute: Callable[[Part, Subject], Iterator[Found]]


STAGES = (
    Stage(1, "1_tokenizer", tokenizer.compute),
    Stage(2, "2_features", features.compute),
    Stage(3, "3_llm", llm.compute),
    Stage(4, "4_sampling", sampling.compute),
    Stage(5, "5_flow", flow.compute),
    Stage(6, "6_hift", vocoder.compute),
    Stage(7, "7_e2e", speech.compute),
    Stage(8, "8_text", text.compute),
)
