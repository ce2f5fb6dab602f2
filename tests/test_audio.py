"""Recordings: what decodes, and that everything else is refused in one line that names it."""

import struct
import tempfile
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cosyvoice import pcm
from cosyvoice.audio import AudioLimits, decode, load_wav, open_recording
from cosyvoice.errors import BadRequest


def tone(seconds: float = 0.5, rate_hz: int = 24000, level: float = 0.4) -> np.ndarray:
    return (level * np.sin(np.arange(round(seconds * rate_hz)) * 0.05)).astype(np.float32)


def audio_file(
    samples: np.ndarray, rate_hz: int = 24000, kind: str = "WAV", subtype: str = "FLOAT"
) -> bytes:
    out = BytesIO()
    soundfile.write(out, samples, rate_hz, format=kind, subtype=subtype)
    return out.getvalue()


def patched(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + struct.pack("<I", value) + data[offset + 4 :]


def test_every_kind_of_source_gives_the_same_samples(tmp_path: Path) -> None:
    data = audio_file(tone())
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    with path.open("rb") as opened, tempfile.SpooledTemporaryFile() as upload:
        upload.write(data)
        for source in (data, path, str(path), BytesIO(data), opened, upload):
            for _ in range(2):  # a file object may be read again
                samples, rate_hz = decode(source)
                assert rate_hz == 24000
                assert torch.equal(samples, torch.from_numpy(tone()))


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
     ("AIFF", "PCM_24"), ("WAV", "ULAW"), ("RF64", "PCM_16")],
)  # fmt: skip
def test_other_formats(kind: str, subtype: str) -> None:
    samples, rate_hz = decode(audio_file(tone(2.0), kind=kind, subtype=subtype))
    assert (rate_hz, samples.dtype, samples.dim()) == (24000, torch.float32, 1)
    assert abs(len(samples) - 48000) < 2400


def test_channels_are_averaged() -> None:
    stereo = np.stack([tone(), -0.5 * tone()], axis=1)
    samples, _ = decode(audio_file(stereo))
    assert torch.equal(samples, torch.from_numpy(stereo.mean(axis=1)))


def test_the_older_tensor_comes_back_unchanged() -> None:
    heard = torch.from_numpy(tone(rate_hz=16000))[None]
    for source in (heard, heard[0]):
        samples, rate_hz = decode(source)
        assert rate_hz == 16000
        assert torch.equal(samples, heard[0])
    assert open_recording(heard).digest == open_recording(heard.clone()).digest


def test_a_stream_of_ours_saved_by_a_client_is_a_recording() -> None:
    samples, _ = decode(pcm.wav_stream_header() + pcm.pcm_bytes(tone()))
    assert len(samples) == len(tone())


def test_load_wav_minimum_rate() -> None:
    low = audio_file(tone(rate_hz=8000), 8000)
    assert load_wav(low, 8000).shape == (1, 4000)  # already there: nothing is upsampled
    with pytest.raises(BadRequest, match="8000 Hz; give a recording of at least 16000 Hz"):
        load_wav(low, 16000)
    assert load_wav(audio_file(tone(rate_hz=16000), 16000), 24000).shape == (1, 12000)


WAV = audio_file(tone(), subtype="PCM_16")
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"this is not audio at all, but a letter\n" * 40, "cannot be decoded"),
    "header only": (WAV[:44], "announces 24000 bytes"),
    "part of a header": (WAV[:20], "cannot be decoded"),
    "claims hours": (patched(WAV, 40, 0x7FFF_FFFF), "announces 2147483647 bytes"),
    "claims everything": (patched(WAV, 40, 0xFFFF_FFFF), "announces 4294967295 bytes"),
    "cut short": (WAV[:9000], "announces 24000 bytes"),
    "cut FLAC": (audio_file(tone(2.0), kind="FLAC", subtype="PCM_16")[:3000], "cannot be decoded"),
    "no samples": (audio_file(tone(0), subtype="PCM_16"), "contains no audio"),
    "rate zero": (patched(WAV, 24, 0), "cannot be decoded"),
    "negative rate": (patched(WAV, 24, 0xFFFF_FFFF), "cannot be decoded"),
    "enormous rate": (patched(WAV, 24, 2_000_000_000), "give at most 192000 Hz"),
    "nan": (audio_file(np.full(9000, np.nan, np.float32)), "not numbers"),
    "one inf": (audio_file(np.append(tone(), np.float32(np.inf))), "not numbers"),
    "inf on both sides": (
        audio_file(np.tile(np.array([np.inf, -np.inf], np.float32), (9000, 1))),
        "not numbers",
    ),
    "too large to add": (audio_file(np.full((9000, 2), 3e38, np.float32)), "scale it"),
    "opposite channels": (audio_file(np.outer(tone(), [1, -1])), "is silent"),
    "silence": (audio_file(np.zeros(9000, np.float32)), "is silent"),
    "int16 scale": (audio_file(30000 * tone()), "scale it"),
    "many channels": (audio_file(np.tile(tone()[:, None], (1, 9))), "9 channels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    data, reason = BAD[case]
    path = tmp_path / "prompt.wav"
    path.write_bytes(data)
    for source, name in ((path, "prompt.wav"), (data, "the recording")):
        with pytest.raises(BadRequest) as caught:
            decode(source)
        message = str(caught.value)
        assert reason in message
        assert name in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: d / "absent.wav", "there is no file"),
        (lambda d: d, "is not a file"),
        (lambda d: d / "a\nb.wav", "a\\?b.wav"),
        (lambda d: "nul\0.wav", "no file|cannot read"),
        (lambda d: d / ("x" * 300), "no file|cannot read"),
        (lambda d: StringIO("text"), "opened as text"),
        (lambda d: 7, "no recording"),
        (lambda d: torch.zeros(1, 2, 3), "no recording"),
        (lambda d: torch.zeros(1, 9000, dtype=torch.int16), "no recording"),
        (lambda d: torch.zeros(1, 0), "no recording"),
        (lambda d: torch.zeros(1, 9000), "is silent"),
        (lambda d: torch.full((1, 9000), float("nan")), "not numbers"),
    ],
)
def test_what_is_no_file_is_refused(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    with pytest.raises(BadRequest, match=reason) as caught:
        decode(make(tmp_path))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_limits_hold_before_decoding() -> None:
    data = audio_file(tone(3.0), kind="FLAC", subtype="PCM_16")
    with pytest.raises(BadRequest, match=r"lasts 3.0 s; give a recording of at most 2 s"):
        decode(data, limits=AudioLimits(max_s=2))
    with pytest.raises(BadRequest, match="larger than"):
        decode(data, limits=AudioLimits(max_bytes=100))
    with pytest.raises(BadRequest, match="larger than"):
        decode(BytesIO(data), limits=AudioLimits(max_bytes=100))
    with pytest.raises(BadRequest, match="24000 Hz; give at most 22050 Hz"):
        decode(data, limits=AudioLimits(max_rate_hz=22050))
    assert len(decode(data, limits=AudioLimits(max_s=3))[0]) == 72000
