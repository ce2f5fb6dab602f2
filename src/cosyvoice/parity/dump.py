"""A golden set of our own: one utterance, really sampled, recorded at every stage.

In: a model directory, a recording and its transcript, a text. Out: a directory that `run` accepts,
and beside it the artifacts of the older harness (serving.md, g). The directory appears whole or
not at all. What is recorded is what the stages compute, so there is no second way to compute it.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cosyvoice.audio import Recording, open_recording
from cosyvoice.config import FRAME_SAMPLES, OURS
from cosyvoice.engine.request import Request
from cosyvoice.errors import BadRequest
from cosyvoice.features import whisper_mel
from cosyvoice.frontend import Order
from cosyvoice.pcm import save
from cosyvoice.text import complete_transcript
from cosyvoice.version import __version__

from .eavesdrop import Performance, listening, perform
from .found import Computed, Fact
from .goldens import INDEX, GoldenSet, Part, Spec
from .kinds import RECORDING, kind_of, kinds
from .run import steady, tell_stderr
from .stages import STAGES
from .subject import Subject

EXCITATION = "m_source"
DIT_TIME = 0.3  # at which the DiT's inside is recorded
MAX_VOCODER_FRAMES = 60  # of the mel whose way through the vocoder is recorded
N_SCORES = 8  # score vectors recorded for the sampler
MAX_RMS = 1e-2
"""Root mean square by which waveforms may differ, as in the published sets."""


def dump(
    model_dir: Path, prompt_wav: Path, *, text: str, prompt_text: str, out: Path, seed: int = 0
) -> None:
    """Speak the first sentence of `text` and record everything into the new directory `out`.

    Raises BadRequest where the input cannot be spoken or `out` has something in it.
    """
    recording = open_recording(prompt_wav)
    with _new_directory(Path(out)) as folder, steady():
        prompt_file = f"prompt{Path(prompt_wav).suffix}"
        (folder / prompt_file).write_bytes(recording.data)
        goldens = GoldenSet(folder, specs={}, params=_params(), notes={})
        subject = Subject(Path(model_dir), goldens)
        tell_stderr("sampling")
        take = Take.perform(subject, recording, _order(text, prompt_text, seed))
        goldens.notes |= take.notes(prompt_file)
        _give(goldens, subject, take)
        for stage in STAGES:
            tell_stderr(f"stage {stage.stem}")
            if stage.stem == SAMPLING_STEM:
                _give_scores(goldens)
            _record(goldens, Part(goldens, stage.stem), stage.compute, subject)
        about = {"set": "dump", "model": str(model_dir), "seed": seed, "cosyvoice": __version__}
        _write(goldens, {**about, "torch": torch.__version__})
        _write_artifacts(folder, subject, take)
