"""A model directory in the published layout, with seeded random weights.

In: an empty place on disk, a preset of sizes and a seed. Out: every file that `CosyVoice3` reads:
configuration, three checkpoints, two ONNX stand-ins and a tokenizer. It serves tests, benchmarks of
the full size without a download, and as the start of training; what it says is noise.
The same seed gives the same bytes on every machine. The directory appears whole or not at all.
It does not know how the files are read.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cosyvoice.config import FlowConfig, LLMConfig, ModelConfig, VocoderConfig
from cosyvoice.errors import BadRequest, ModelFilesError

from . import front_end, layout, weights
from .tokenizer import learn

PRESETS = ("nano", "full")
STORAGES = {"fp32": torch.float32, "fp16": torch.float16}
VOCABULARY_STEP = 64  # tables are rounded up to a multiple of this
SPARE_BYTES = 8_000_000  # of the small files, and for the file system


@dataclass(frozen=True)
class Writing:
    """How the files are written."""

    storage: str = "fp32"  # of the checkpoints; fp16 halves them
    force: bool = False  # replace a directory that an earlier call has written
    report: Callable[[str], None] = lambda line: None  # called with a line before each large file


def write_model(
    directory: Path | str, preset: str, *, seed: int = 0, writing: Writing = Writing()
) -> ModelConfig:
    """Write a random model of `preset` sizes to `directory`; its sizes come back."""
    if preset not in PRESETS:
        raise BadRequest(f"no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    if writing.storage not in STORAGES:
        raise BadRequest(f"no storage {writing.storage!r}: choose one of {', '.join(STORAGES)}")
    front_end.require_onnx()
    directory = Path(directory).absolute()
    tokenizer = learn()
    config = preset_config(preset, tokenizer.n_ids)
    building = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    with _explained(directory):
        _check_target(directory, force=writing.force)
        directory.parent.mkdir(parents=True, exist_ok=True)
        _check_space(directory.parent, config, STORAGES[writing.storage])
        building.mkdir()
        try:
            layout.write_small_files(
                building, config, tokenizer, f"--preset {preset} --seed {seed}"
            )
            front_end.write_speaker_model(building / "campplus.onnx", seed)
            front_end.write_speech_tokenizer(building / "speech_tokenizer_v3.onnx", seed)
            _write_weights(building, config, seed, writing)
            _replace(directory, building)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return config


def preset_config(preset: str, n_ids: int) -> ModelConfig:
    """The sizes of a preset; `n_ids` is what the tokenizer and its special tokens need."""
    full = ModelConfig()
    if preset == "full":
        assert n_ids <= full.llm.text_vocab_size, n_ids
        return full
    n_rows = -(-n_ids // VOCABULARY_STEP) * VOCABULARY_STEP
    return ModelConfig(
        llm=LLMConfig(
            hidden_size=64,
            intermediate_size=192,
            n_layers=4,
            n_heads=4,
            n_kv_heads=2,
            text_vocab_size=n_rows,
        ),
        flow=FlowConfig(lookahead_channels=64, dim=64, depth=4, n_heads=2, head_dim=32),
        vocoder=VocoderConfig(base_channels=48, f0_channels=32),
    )


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Whatever the file system refuses becomes one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ModelFilesError(
            f"cannot write {directory}: {reason}; choose another place"
        ) from error


def _check_target(directory: Path, *, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise ModelFilesError(f"{directory} is a file; name a new directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not layout.is_ours(directory):
        raise ModelFilesError(f"{directory} is not empty and was not written by init-model")
    if not force:
        raise ModelFilesError(f"{directory} already holds a random model; --force replaces it")


def _check_space(parent: Path, config: ModelConfig, storage: torch.dtype) -> None:
    n_needed = weights.n_parameters(config) * storage.itemsize + SPARE_BYTES
    n_free = shutil.disk_usage(parent).free
    if n_free < n_needed:
        raise ModelFilesError(
            f"{parent} has {n_free / 1e9:.2f} GB free and the model needs {n_needed / 1e9:.2f} GB: "
            "make room, or choose another place"
        )


def _write_weights(building: Path, config: ModelConfig, seed: int, writing: Writing) -> None:
    """One checkpoint at a time, so that only one is ever in memory."""
    for i, (name, make) in enumerate(weights.MAKERS.items()):
        writing.report(f"writing {name} ({i + 1} of {len(weights.MAKERS)})")
        draw = weights.Draw(f"{seed}/{name}", STORAGES[writing.storage])
        torch.save(make(config, draw), building / name)


def _replace(directory: Path, building: Path) -> None:
    """Put `building` in place of `directory`; the old one goes only when the new one is there."""
    if not directory.exists():
        building.rename(directory)
        return
    old = directory.with_name(f"{building.name}.old")
    directory.rename(old)
    building.rename(directory)
    shutil.rmtree(old)
