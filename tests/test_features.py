"""Waveform features: equal to the recorded reference, to librosa's and Kaldi's definitions."""

import json
from math import ceil, gcd
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice import features
from cosyvoice.audio import load_wav
from cosyvoice.config import FRAME_SAMPLES, N_MELS
from cosyvoice.errors import BadRequest

STAGE = "2_features.safetensors"
GOLDEN = Path(__file__).parent / "golden"
PROMPTS = sorted(path.stem.removeprefix("prompt_") for path in GOLDEN.glob("prompt_*.wav"))


def noise(n_samples: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(1, n_samples, generator=torch.Generator().manual_seed(seed))


def assert_golden(golden: Path, name: str, ours: Tensor) -> None:
    expected = load_file(golden / STAGE)[name]
    row = json.loads((golden / "goldens.json").read_text())["tensors"][f"{STAGE}:{name}"]
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max().item() <= row["tolerance"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("rate_hz", [16000, 24000])
def test_golden_audio(golden: Path, prompt: str, rate_hz: int) -> None:
    samples = load_wav(golden / f"prompt_{prompt}.wav", rate_hz)
    info = json.loads((golden / "goldens.json").read_text())["notes"]["features"]["info"][prompt]
    assert samples.shape == (1, info[f"n{rate_hz // 1000}"])
    assert_golden(golden, f"{prompt}.wav{rate_hz // 1000}k", samples[:, : 3 * rate_hz])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_golden_features(golden: Path, prompt: str) -> None:
    path = golden / f"prompt_{prompt}.wav"
    heard, spoken = load_wav(path, 16000), load_wav(path, 24000)
    assert_golden(golden, f"{prompt}.mel24k", features.mel_spectrogram(spoken).transpose(1, 2))
    assert_golden(golden, f"{prompt}.whisper128", features.whisper_mel(heard))
    assert_golden(golden, f"{prompt}.fbank80", features.kaldi_fbank(heard[0]))
    assert_golden(golden, f"{prompt}.fbank80_cmn", features.speaker_features(heard[0]))


def test_fbank_is_kaldis() -> None:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = 16000
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = N_MELS
    samples = noise(16000 + 77)[0]
    theirs = kaldi_native_fbank.OnlineFbank(options)
    theirs.accept_waveform(16000, samples.tolist())
    theirs.input_finished()
    expected = np.stack([theirs.get_frame(i) for i in range(theirs.num_frames_ready)])
    ours = features.kaldi_fbank(samples)
    assert ours.shape == expected.shape
    assert np.abs(ours.numpy() - expected).max() < 5e-4


@given(source_hz=st.sampled_from([8000, 22050, 32000, 44100, 48000, 44101]), n=st.integers(1, 900))
@settings(deadline=None, max_examples=30)
def test_resampled_length_is_the_ceiling(source_hz: int, n: int) -> None:
    resampled = features.resample(noise(n), source_hz, 16000)
    assert resampled.shape == (1, ceil(n * 16000 / source_hz))


@pytest.mark.parametrize(
    ("source_hz", "target_hz"), [(22050, 16000), (44100, 24000), (8000, 24000)]
)
def test_the_band_is_all_of_the_kernel_that_matters(source_hz: int, target_hz: int) -> None:
    common = gcd(source_hz, target_hz)
    sizes = source_hz // common, target_hz // common
    samples = noise(5000)
    n_out = ceil(5000 * target_hz / source_hz)
    dense, band = (
        features._resample_dense(samples, *sizes),
        features._resample_band(samples, *sizes),
    )
    assert (dense[:, :n_out] - band[:, :n_out]).abs().max() < 1e-6


@pytest.mark.parametrize("source_hz", [22050, 44101, 48000])
def test_a_tone_keeps_its_pitch_and_level(source_hz: int) -> None:
    def tone(rate_hz: int) -> Tensor:
        return torch.sin(2 * torch.pi * 440 * torch.arange(rate_hz // 2) / rate_hz)[None]

    resampled = features.resample(tone(source_hz), source_hz, 24000)[:, :12000]
    inner = slice(500, 11500)
    assert (resampled[:, inner] - tone(24000)[:, inner]).abs().max() < 5e-3


def test_equal_rates_return_the_input() -> None:
    samples = noise(100)
    assert features.resample(samples, 16000, 16000) is samples


@pytest.mark.parametrize("n_samples", [721, 959, 960, 24000])
def test_mel_frames(n_samples: int) -> None:
    mel = features.mel_spectrogram(noise(n_samples))
    assert mel.shape == (1, n_samples // FRAME_SAMPLES, N_MELS)


def test_whisper_range_ends_eight_decades_below_the_loudest() -> None:
    samples = noise(16000)
    samples[:, 4000:12000] = 0.0
    mel = features.whisper_mel(samples)
    assert mel.shape == (1, 128, 100)
    assert (mel.max() - mel.min()).item() == pytest.approx(2.0)


def test_batch_equals_alone() -> None:
    both = torch.cat([noise(24000, 1), 0.01 * noise(24000, 2)])
    for feature in (features.mel_spectrogram, features.whisper_mel):
        alone = torch.cat([feature(both[:1]), feature(both[1:])])
        assert torch.allclose(feature(both), alone, atol=1e-5)


def test_slaney_triangles_have_unit_area() -> None:
    bank = features.slaney_filters(24000, 1920, N_MELS, 12000.0)
    areas = bank.double().sum(dim=1) * 24000 / 1920
    assert bank.shape == (N_MELS, 961)
    assert torch.all((areas[10:] - 1).abs() < 0.1)


def test_filter_banks_of_other_sizes_do_not_collide() -> None:
    wide, narrow = (features.slaney_filters(24000, 1920, n, 12000.0) for n in (80, 40))
    assert (wide.shape[0], narrow.shape[0]) == (80, 40)


def test_features_made_for_inference_serve_training_afterwards() -> None:
    features._hann.cache_clear()
    features.slaney_filters.cache_clear()
    with torch.inference_mode():
        features.mel_spectrogram(noise(2400))
    samples = noise(2400).requires_grad_()
    features.mel_spectrogram(samples).sum().backward()
    assert samples.grad is not None
    assert samples.grad.isfinite().all()


@pytest.mark.parametrize(
    ("feature", "n_min"),
    [
        (features.mel_spectrogram, features.MIN_MEL_SAMPLES),
        (features.whisper_mel, features.MIN_WHISPER_SAMPLES),
        (lambda x: features.kaldi_fbank(x[0]), features.MIN_FBANK_SAMPLES),
    ],
)
def test_too_short_says_how_long(feature, n_min: int) -> None:
    assert feature(noise(n_min)).isfinite().all()
    with pytest.raises(BadRequest, match=f"at least {n_min} "):
        feature(noise(n_min - 1))
