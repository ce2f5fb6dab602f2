"""The sample recording that lends a fresh clone its voice: decodable, audible, saying its text."""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cosyvoice.audio import decode
from cosyvoice.config import PROMPT_RATE_HZ

ASSETS = Path(str(files("cosyvoice"))) / "assets"
SAMPLE = ASSETS / "sample.wav"
TRANSCRIPT = ASSETS / "sample.txt"

MIN_S, MAX_S = 3, 10  # what makes a good prompt
QUIET_RMS = 0.02
MAX_EDGE_S = 0.3  # silence before and after the words
WORDS_PER_S = (1.5, 5)  # nobody speaks slower or faster


def test_the_sample_is_a_usable_prompt() -> None:
    samples, rate_hz = decode(SAMPLE)
    assert rate_hz >= PROMPT_RATE_HZ
    assert MIN_S <= len(samples) / rate_hz <= MAX_S
    assert soundfile.info(SAMPLE).channels == 1


def test_the_sample_is_heard_from_beginning_to_end() -> None:
    samples, rate_hz = decode(SAMPLE)
    level = np.abs(samples.numpy())
    assert 0.25 < level.max() < 1, "too faint, or clipped"
    assert np.sqrt(np.mean(level**2)) > QUIET_RMS
    heard = np.flatnonzero(level > QUIET_RMS)
    assert heard[0] / rate_hz < MAX_EDGE_S
    assert (len(level) - heard[-1]) / rate_hz < MAX_EDGE_S


def test_the_transcript_is_one_sentence_of_that_length() -> None:
    lines = TRANSCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and lines[0].endswith(".")
    samples, rate_hz = decode(SAMPLE)
    n_words_per_s = len(lines[0].split()) * rate_hz / len(samples)
    assert WORDS_PER_S[0] < n_words_per_s < WORDS_PER_S[1]


@pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("sox")), reason="needs flite and sox"
)
def test_the_recipe_makes_a_sample_of_the_same_length(tmp_path: Path) -> None:
    recipe = (ASSETS / "README.md").read_text(encoding="utf-8").split("```sh\n")[1].split("```")[0]
    shutil.copy(TRANSCRIPT, tmp_path)
    subprocess.run(["sh", "-e", "-c", recipe], cwd=tmp_path, check=True)
    made, kept = soundfile.info(tmp_path / SAMPLE.name), soundfile.info(SAMPLE)
    assert made.samplerate == kept.samplerate
    # another flite may shape a sound differently; other words would take another time
    assert made.duration == pytest.approx(kept.duration, rel=0.02)
