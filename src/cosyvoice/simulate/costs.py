"""What steps cost on a machine.

In: nothing, or a JSON file with measured figures. Out: a frozen dataclass that prices a step.
The two machines here are assumptions, rounded from single measurements; it knows no scheduling.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from cosyvoice.errors import BadRequest


class Span(NamedTuple):
    """One stream's part of a pass of the flow."""

    n_frames: int  # new ones
    n_keys: int  # frames they attend to, themselves included


@dataclass(frozen=True)
class Costs:
    """Seconds; the names say of what."""

    machine: str
    n_slots: int  # sentences decoded together
    prefill_item_s: float
    decode_s: float  # one token of one sentence
    decode_more_s: float  # each further sentence in the same step
    flow_pass_s: float  # whatever is in it
    flow_frame_s: float
    flow_key_s: float  # per frame and key
    vocoder_chunk_s: float
    vocoder_frame_s: float

    def prefill(self, n_items: int) -> float:
        return max(self.decode_s, n_items * self.prefill_item_s)

    def decode(self, n_sentences: int) -> float:
        return self.decode_s + self.decode_more_s * (n_sentences - 1)

    def render(self, spans: Sequence[Span]) -> float:
        """One pass of the flow for all, then each one's vocoder."""
        each = sum(
            n * (self.flow_frame_s + self.vocoder_frame_s + keys * self.flow_key_s)
            for n, keys in spans
        )
        return self.flow_pass_s + self.vocoder_chunk_s * len(spans) + each


# 10 + 1.6 ms a token; flow 0.55 s and vocoder 0.13 s per second of audio with 500 keys.
TWO_CORES = Costs(
    machine="two-core CPU, int8",
    n_slots=8,
    prefill_item_s=0.0025,
    decode_s=0.010,
    decode_more_s=0.0016,
    flow_pass_s=0.05,
    flow_frame_s=0.30 / 50,
    flow_key_s=0.20 / 50 / 500,
    vocoder_chunk_s=0.0,
    vocoder_frame_s=0.13 / 50,
)
# 6 ms a token for up to 32 sentences; flow 25 ms a pass and 4 ms per second of audio.
LARGE_GPU = Costs(
    machine="H100-like GPU",
    n_slots=32,
    prefill_item_s=0.00005,
    decode_s=0.006,
    decode_more_s=0.0,
    flow_pass_s=0.025,
    flow_frame_s=0.004 / 50,
    flow_key_s=0.0,
    vocoder_chunk_s=0.003,
    vocoder_frame_s=0.0,
)


def read_costs(path: Path) -> Costs:
    """Measured costs. Raises BadRequest where a figure is missing, unknown or not a number."""
    wanted = {field.name: field.type for field in fields(Costs)}
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} is no JSON file of step costs: {error}") from error
    if not isinstance(figures, dict) or figures.keys() != wanted.keys():
        raise BadRequest(f"{path}: give one object with exactly {', '.join(wanted)}")
    kinds = {str: str, int: int, float: (int, float)}
    wrong = [
        name
        for name, kind in wanted.items()
        if not isinstance(figures[name], kinds[kind])  # type: ignore[index, arg-type]
    ]
    wrong += [name for name in wanted if name not in ("machine", *wrong) and figures[name] < 0]
    if wrong or figures["n_slots"] < 1:
        raise BadRequest(f"{path}: {', '.join(wrong) or 'n_slots'} must be a number, not below 0")
    return Costs(**figures)
