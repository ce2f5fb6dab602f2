"""Bytes of samples: conversion, headers, codecs, files that appear whole or not at all."""

import stat
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cosyvoice import config, pcm
from cosyvoice.errors import BadRequest


def tone(seconds: float = 0.5) -> np.ndarray:
    n_samples = round(seconds * pcm.RATE_HZ)
    return (0.4 * np.sin(np.arange(n_samples) * 0.05)).astype(np.float32)


def test_rate_is_the_models_rate() -> None:
    assert pcm.RATE_HZ == config.SAMPLE_RATE_HZ


def test_conversion_cuts_towards_zero() -> None:
    steps = np.array([1.999, -1.999, 0.999, -0.999, 16384.5, -32768.0]) / 32768
    assert pcm.to_int16(steps).tolist() == [1, -1, 0, 0, 16384, -32768]


def test_values_out_of_range_do_not_wrap() -> None:
    loud = [1.0, 1.5, 1e9, np.inf, -1.0, -1.5, -1e9, -np.inf]
    assert pcm.to_int16(loud).tolist() == [32767] * 4 + [-32768] * 4


def test_bridge_scale() -> None:
    assert pcm.to_int16([1.0, -1.0, 0.5], scale=pcm.BRIDGE_SCALE).tolist() == [32767, -32767, 16383]


def test_not_a_number_is_refused() -> None:
    with pytest.raises(AssertionError, match="NaN"):
        pcm.to_int16([0.0, np.nan])


def test_every_int16_survives_the_round_trip() -> None:
    every = np.arange(-32768, 32768).astype(np.int16)
    assert np.array_equal(pcm.to_int16(pcm.to_float(every)), every)
    assert np.array_equal(pcm.from_pcm_bytes(every.tobytes()), pcm.to_float(every))


def test_half_a_sample_is_refused() -> None:
    with pytest.raises(BadRequest, match="even number"):
        pcm.from_pcm_bytes(b"abc")


@pytest.mark.parametrize("n_samples", [0, 1, 12000])
def test_header_is_what_libsndfile_writes(n_samples: int) -> None:
    samples = tone()[:n_samples]
    theirs = BytesIO()
    soundfile.write(theirs, pcm.to_int16(samples), pcm.RATE_HZ, format="WAV", subtype="PCM_16")
    assert pcm.wav_bytes(samples) == theirs.getvalue()


def test_stream_header_has_the_length_of_a_header_and_is_readable() -> None:
    header = pcm.wav_stream_header(rate_hz=16000)
    assert len(header) == len(pcm.wav_header(0)) == pcm.HEADER_BYTES
    samples, rate_hz = soundfile.read(BytesIO(header + pcm.pcm_bytes(tone())), dtype="int16")
    assert rate_hz == 16000
    assert np.array_equal(samples, pcm.to_int16(tone()))


@pytest.mark.parametrize("audio_format", [f for f in pcm.FORMATS if f != "pcm"])
def test_encoded_files_decode_to_the_same_sound(audio_format: str) -> None:
    samples, rate_hz = soundfile.read(BytesIO(pcm.encode(tone(2.3), audio_format)))
    assert rate_hz == pcm.RATE_HZ
    assert samples.ndim == 1
    assert abs(len(samples) - len(tone(2.3))) <= 2400
    n_common = min(len(samples), len(tone(2.3))) - 4800
    error = samples[2400:n_common] - tone(2.3)[2400:n_common]
    assert np.sqrt(np.mean(error**2)) < 0.05


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_lossless_formats_keep_every_sample(audio_format: str) -> None:
    samples, _ = soundfile.read(BytesIO(pcm.encode(tone(), audio_format)), dtype="int16")
    assert np.array_equal(samples, pcm.to_int16(tone()))


def test_pcm_is_bare() -> None:
    assert pcm.encode(tone(), "PCM") == pcm.to_int16(tone()).tobytes()


@pytest.mark.parametrize("audio_format", pcm.FORMATS)
def test_no_samples_encode(audio_format: str) -> None:
    assert isinstance(pcm.encode(np.zeros(0, np.float32), audio_format), bytes)


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.wav.exe"])
def test_unknown_suffix_lists_the_formats(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest, match="wav, flac, mp3, opus, ogg, pcm"):
        pcm.save(tmp_path / name, tone())
    assert list(tmp_path.iterdir()) == []


def test_saved_file_has_ordinary_permissions(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.touch()
    pcm.save(tmp_path / "out.WAV", tone())
    assert (tmp_path / "out.WAV").read_bytes() == pcm.wav_bytes(tone())
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (beside, tmp_path / "out.WAV")]
    assert modes[0] == modes[1]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept.wav"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), pcm.atomic_file(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.wav"]


def test_a_missing_directory_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="choose another place"):
        pcm.save(tmp_path / "nowhere" / "out.wav", tone())
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(BadRequest, match="choose another place"):
        pcm.save(tmp_path / "folder.wav", tone())


def test_a_device_is_written_to_and_not_replaced() -> None:
    pcm.write_atomic("/dev/null", b"gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
