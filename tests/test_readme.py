"""README examples run as they stand.

In: the ```sh and ```python blocks of README.md that have the line `<!-- run -->` right before them.
Each runs alone, in an empty directory that holds what a reader would have there: recordings named
me.wav, voice.wav and words.wav, the repository's tests/, and a model directory (the golden model)
where the published one is expected. Every sound file a block leaves is listened to.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

README = Path(__file__).parent.parent / "README.md"
RUNNABLE = re.compile(r"^<!-- run -->\n+```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECORDINGS = ("me.wav", "voice.wav", "words.wav")
SOUND_SUFFIXES = {".wav", ".flac", ".mp3", ".opus", ".ogg"}
RATE_HZ = {".wav": 24_000, ".flac": 24_000}
PUBLISHED = "pretrained_models/Fun-CosyVoice3-0.5B"


class Block(NamedTuple):
    """One example: its language and its lines."""

    language: str
    text: str

    @property
    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.text]
        return ["bash", "-euo", "pipefail", "-c", self.text]


BLOCKS = [Block(*match) for match in RUNNABLE.findall(README.read_text(encoding="utf-8"))]


@pytest.fixture
def reader_dir(tmp_path: Path, golden_model: Path) -> Path:
    """What a reader would have beside them."""
    sample = Path(str(files("cosyvoice"))) / "assets" / "sample.wav"
    for name in RECORDINGS:
        shutil.copy(sample, tmp_path / name)
    (tmp_path / "tests").symlink_to(README.parent / "tests")
    shutil.copytree(golden_model, tmp_path / PUBLISHED)  # an example may write there
    return tmp_path


def run(block: Block, directory: Path) -> subprocess.CompletedProcess[str]:
    programs = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "COSYVOICE_MODEL_DIR": PUBLISHED,
        "HOME": str(directory),
        "XDG_DATA_HOME": str(directory / ".local"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        block.command, cwd=directory, env=environment, capture_output=True, text=True
    )


def listen(path: Path) -> None:
    samples, rate_hz = soundfile.read(path)
    assert rate_hz == RATE_HZ.get(path.suffix, rate_hz), path.name
    assert len(samples) / rate_hz > 0.1, f"{path.name} is empty"
    assert np.abs(samples).max() > 1e-3, f"{path.name} is silent"


@pytest.mark.parametrize("language", ["sh", "python"])
def test_readme_has_examples_that_run(language: str) -> None:
    assert language in [block.language for block in BLOCKS]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.text.splitlines()[0])
def test_readme_example_runs(block: Block, reader_dir: Path) -> None:
    done = run(block, reader_dir)
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    made = [path for path in reader_dir.iterdir() if path.suffix in SOUND_SUFFIXES]
    for path in made:
        if path.name not in RECORDINGS:
            listen(path)
