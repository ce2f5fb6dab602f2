"""The flow: time against its floor, in one pass and chunk by chunk along a long utterance.

In: a subject and its ceilings. Out: figures. The floor is the counted linear operations at the
rate of such products plus the counted attention at the rate of such attention, both measured in
this run. It knows no LLM and no audio.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cosyvoice.config import FRAMES_HZ, FRAMES_PER_TOKEN, TOKENS_HZ
from cosyvoice.models.flow import FlowState

from .ceilings import Ceilings
from .operations import Operations, chunk_flow, offline_flow
from .progress import tell
from .subject import Subject
from .timing import Timing, best_of, seconds_of

OFFLINE_S = (4, 10)
N_EARLY, N_LATE = 4, 40  # chunks compared, counted from one
WHOLE_S = 16
N_AROUND = 1  # chunks on either side that stand in for a disturbed one


@dataclass(frozen=True)
class Chunk:
    """One chunk of a stream: what it cost, and what it had to do."""

    time_s: float
    work: Operations
    n_new: int  # frames
    n_keys: int


def figures(
    subject: Subject, ceilings: Ceilings, n_repeats: int, n_chunks: int = N_LATE + N_AROUND
) -> dict[str, Any]:
    """n_chunks: how far the stream goes, 25 tokens each."""
    with torch.inference_mode():
        offline = {f"{s}s": _offline(subject, ceilings, s, n_repeats) for s in OFFLINE_S}
        prefix = best_of(lambda: _prefix(subject), n=1, n_warm=0, wait=subject.wait)
        tell(f"flow: {n_chunks} chunks of a stream")
        chunks = _stream(subject, n_chunks)
    n_prompt_frames = FRAMES_PER_TOKEN * subject.n_prompt_tokens
    found = {
        "offline": offline,
        "prefix": prefix,
        "stream": _whole(ceilings, chunks[:WHOLE_S], n_prompt_frames),
    }
    if n_chunks > N_LATE:
        found |= _growth(ceilings, chunks)
    return found | {"chunks_ms": [round(1e3 * chunk.time_s, 2) for chunk in chunks]}


def _offline(
    subject: Subject, ceilings: Ceilings, speech_s: float, n_repeats: int
) -> dict[str, Any]:
    tell(f"flow: {speech_s} s offline")
    models, voice = subject.models, subject.voice()
    tokens = subject.tokens(round(speech_s * TOKENS_HZ), seed=1)

    def go() -> None:
        state = models.flow.start(voice, subject.solver, models.flow_noise, chunked=False)
        models.flow.extend(state, tokens, last=True)

    timing = best_of(go, n=n_repeats, n_warm=1, wait=subject.wait)
    n_frames = FRAMES_PER_TOKEN * (subject.n_prompt_tokens + len(tokens))
    work = offline_flow(models.flow.config, n_frames, subject.solver.n_steps)
    floor_s = ceilings.floor_s(work, n_frames, n_frames)
    return {
        "time": timing,
        "floor_ms": _ms(floor_s),
        "to_floor": round(timing.min_s / floor_s, 3),
        "gop": _gop(work),
    }


def _prefix(subject: Subject) -> FlowState:
    models = subject.models
    return models.flow.prefix(subject.voice(), subject.solver, models.flow_noise)


def _stream(subject: Subject, n_chunks: int) -> list[Chunk]:
    """A stream with a known voice, each chunk one block of the mask."""
    flow, config = subject.models.flow, subject.models.flow.config
    state = flow.fork(_prefix(subject))
    n_block, n_prompt = config.block_tokens, subject.n_prompt_tokens
    # The first chunk completes the block the prompt ends in, and brings the look-ahead.
    n_first = n_block - n_prompt % n_block + config.lookahead_tokens
    tokens = subject.tokens(n_first + n_block * (n_chunks - 1), seed=1)
    chunks, given = [], 0
    for i in range(n_chunks):
        stop = n_first + n_block * i
        n_past = state.n_frames
        piece = tokens[given:stop]
        time_s = seconds_of(lambda: flow.extend(state, piece, last=False), subject.wait)  # noqa: B023
        n_new = state.n_frames - n_past
        work = chunk_flow(config, n_past, n_new, subject.solver.n_steps)
        chunks.append(Chunk(time_s, work, n_new, state.n_frames))
        given = stop
    return chunks


def _whole(ceilings: Ceilings, chunks: list[Chunk], n_prompt_frames: int) -> dict[str, Any]:
    """All chunks together."""
    time_s = sum(chunk.time_s for chunk in chunks)
    work = sum((chunk.work for chunk in chunks), start=Operations())
    middle = chunks[len(chunks) // 2]
    floor_s = ceilings.floor_s(work, middle.n_new, middle.n_keys)
    return {
        "audio_s": (chunks[-1].n_keys - n_prompt_frames) / FRAMES_HZ,
        "time_s": round(time_s, 3),
        "floor_s": round(floor_s, 3),
        "to_floor": round(time_s / floor_s, 3),
        "gop": _gop(work),
    }


def _growth(ceilings: Ceilings, chunks: list[Chunk]) -> dict[str, Any]:
    """Chunk 40 against chunk 4: cost and operations."""
    early, late = (_around(chunks, n - 1) for n in (N_EARLY, N_LATE))
    parts: dict[str, Any] = {}
    floors_s = [ceilings.floor_s(c.work, c.n_new, c.n_keys) for c in (early, late)]
    for n, chunk, floor_s in zip((N_EARLY, N_LATE), (early, late), floors_s, strict=True):
        parts[f"chunk_{n}"] = {
            "ms": _ms(chunk.time_s),
            "floor_ms": _ms(floor_s),
            "to_floor": round(chunk.time_s / floor_s, 3),
            "gop": _gop(chunk.work),
        }
    cost = late.time_s / early.time_s
    operations = late.work.total / early.work.total
    return parts | {
        "growth": {
            "cost": round(cost, 3),
            "operations": round(operations, 3),
            # Attention's operations are slower than products, so the floor grows faster.
            "floor": round(floors_s[1] / floors_s[0], 3),
            "cost_to_operations": round(cost / operations, 3),
        }
    }


def _around(chunks: list[Chunk], i: int) -> Chunk:
    """Chunk i with the least time of itself and its neighbours, which cost the same to 1 %."""
    near = Timing(tuple(c.time_s for c in chunks[max(0, i - N_AROUND) : i + N_AROUND + 1]))
    return Chunk(near.min_s, chunks[i].work, chunks[i].n_new, chunks[i].n_keys)


def _gop(work: Operations) -> dict[str, float]:
    found = {"linear": work.linear, "conv": work.conv, "attention": work.attention}
    return {kind: round(n / 1e9, 2) for kind, n in found.items()}


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
