"""`spk2info.pt`: the reference's dictionary of stored speakers, read and written.

Comes in: a file of `torch.save`, never unpickled beyond tensors. Goes out: voices by id.
An entry is a speaker vector alone (for sft) or a whole zero-shot input; of the words it keeps
only the ids. Layout: docs/spec/checkpoint.md section 9. Knows no tokenizer and no model.
"""

import os
import pickle
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice.config import EMBEDDING_SIZE, FRAMES_PER_TOKEN, MAX_FLOW_FRAMES, N_MELS
from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.pcm import write_atomic
from cosyvoice.voice import Voice

# The restricted unpickler has no error of its own for a stream that makes no sense.
UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
MAX_NUMBERS = MAX_FLOW_FRAMES * N_MELS  # a prompt longer than this cannot be used


def read_spk2info(path: str | os.PathLike[str]) -> dict[str, Voice]:
    """The voices of the file by id; keys it does not know are passed over."""
    if not Path(path).is_file():
        raise ModelFilesError(f"there is no file {path}; add a speaker and save it first")
    try:
        entries = torch.load(Path(path), map_location="cpu", weights_only=True)
    except UNPICKLING_ERRORS as error:
        raise ModelFilesError(
            f"{path} is damaged or holds more than tensors; remove it and add the voices again"
        ) from error
    if not isinstance(entries, dict):
        raise ModelFilesError(f"{path} is no dictionary of speakers; remove it")
    return {_checked_id(path, name): _read_entry(path, name, e) for name, e in entries.items()}


def write_spk2info(path: str | os.PathLike[str], voices: Mapping[str, Voice]) -> None:
    """Replace the file by these voices, in the reference's types and shapes."""
    if "" in voices:
        raise BadRequest("a stored voice needs an id that is not empty")
    out = BytesIO()
    torch.save({name: _entry(name, voice) for name, voice in voices.items()}, out)
    write_atomic(path, out.getvalue())


def _entry(name: str, voice: Voice) -> dict[str, Tensor]:
    embedding = voice.embedding[None].float()  # [1, 192]
    if voice.is_embedding_only:
        return {"embedding": embedding}
    if voice.transcript and voice.transcript_ids is None:
        raise BadRequest(f"voice {name!r} has words but no ids; tokenise its transcript first")
    cut = voice.aligned()
    words = torch.tensor([voice.transcript_ids or ()], dtype=torch.int32)  # [1, Np]
    tokens, mel = cut.tokens[None].int(), cut.mel[None].float()  # [1, P], [1, 2P, 80]
    return {
        "prompt_text": words,
        "prompt_text_len": _length(words),
        "llm_prompt_speech_token": tokens,
        "llm_prompt_speech_token_len": _length(tokens),
        "flow_prompt_speech_token": tokens,
        "flow_prompt_speech_token_len": _length(tokens),
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": _length(mel),
        "llm_embedding": embedding,
        "flow_embedding": embedding,
    }


def _length(batch: Tensor) -> Tensor:
    return torch.tensor([batch.shape[1]], dtype=torch.int32)  # [1]


def _checked_id(path: str | os.PathLike[str], name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ModelFilesError(f"{path} has an entry named {name!r}; remove it")
    return name


def _read_entry(path: str | os.PathLike[str], name: str, entry: Any) -> Voice:
    where = f"{path}, speaker {name!r}"
    if not isinstance(entry, dict):
        raise ModelFilesError(f"{where}: not a dictionary; remove the entry")
    if "flow_prompt_speech_token" not in entry:
        return Voice(embedding=_row(where, entry, "embedding", (EMBEDDING_SIZE,)))
    tokens = _row(where, entry, "flow_prompt_speech_token", (None,))
    words = _row(where, entry, "prompt_text", (None,))
    voice = Voice(
        embedding=_row(where, entry, "flow_embedding", (EMBEDDING_SIZE,)),
        tokens=tokens,
        mel=_row(where, entry, "prompt_speech_feat", (None, N_MELS)),
        transcript_ids=tuple(words.tolist()),
    )
    if FRAMES_PER_TOKEN * len(tokens) != len(voice.mel):
        raise ModelFilesError(
            f"{where}: {len(voice.mel)} frames for {len(tokens)} tokens; add the voice again"
        )
    return voice


def _row(where: str, entry: Mapping[Any, Any], key: str, shape: tuple[int | None, ...]) -> Tensor:
    """The one row of `[1, *shape]` under `key`, float32 or (one free size) int32."""
    batch = entry.get(key)
    if not isinstance(batch, Tensor) or not _fits(batch, (1, *shape)):
        raise ModelFilesError(f"{where}: {key!r} is missing or misshapen; add the voice again")
    row = batch[0].detach()
    if shape == (None,):
        if row.dtype not in (torch.int32, torch.int64) or bool((row < 0).any()):
            raise ModelFilesError(f"{where}: {key!r} are no ids; add the voice again")
        return row.to(torch.int32)
    if not row.is_floating_point() or not bool(row.isfinite().all()):
        raise ModelFilesError(f"{where}: {key!r} are no numbers; add the voice again")
    return row.float().contiguous()


def _fits(batch: Tensor, shape: tuple[int | None, ...]) -> bool:
    sizes = tuple(batch.shape)
    is_plain = batch.layout is torch.strided and batch.device.type == "cpu"
    is_small = batch.numel() <= MAX_NUMBERS  # strides of 0 make any size from a small file
    fits = [want in (None, has) for want, has in zip(shape, sizes, strict=False)]
    return is_plain and is_small and len(sizes) == len(shape) and all(fits)
