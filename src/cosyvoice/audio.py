"""Recordings to samples: whatever libsndfile decodes, bounded and checked first.

Comes in: a path, a file object, the bytes of a file, or the older 16 kHz tensor `[1, n]`.
Goes out: a `Recording` (its bytes, as they came) and float32 samples `[n]` with their rate.
Anything that is not a usable recording is a `BadRequest` of one line that names it and says what
to do. Knows no voice and no model; nothing is decoded before its size, length and rate are known.
"""

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor

from cosyvoice.config import PROMPT_RATE_HZ
from cosyvoice.errors import BadRequest
from cosyvoice.features import resample
from cosyvoice.pcm import UNKNOWN_BYTES

Source = str | os.PathLike[str] | bytes | BinaryIO | Tensor

SILENCE_PEAK = 10 / 32_768  # ten steps of 16 bits: dither and hum, no voice
LOUDEST_PEAK = 64.0  # float files a little above 1 are common, int16 scale is a mistake
COMPLETE_SHARE = 0.9  # of the announced frames; an MP3 may only estimate them
SUFFIXES = "WAV, FLAC, MP3, OGG or Opus"


@dataclass(frozen=True)
class AudioLimits:
    """What a recording may be at most, decided from its header."""

    max_bytes: int = 64 << 20
    max_s: float = 600.0
    max_rate_hz: int = 192_000
    max_channels: int = 8


ANY_LENGTH = AudioLimits()


@dataclass(frozen=True)
class Recording:
    """The bytes of an audio file and the name its errors carry."""

    name: str
    data: bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes."""
        return sha256(self.data).hexdigest()


def open_recording(source: Source | Recording, *, limits: AudioLimits = ANY_LENGTH) -> Recording:
    """The bytes of `source`, at most `limits.max_bytes` of them."""
    if isinstance(source, Recording):
        return source
    if isinstance(source, Tensor):
        return Recording("the 16 kHz samples", _tensor_file(source))
    name, data = _read(source, limits.max_bytes)
    if not data:
        raise BadRequest(f"{name} is empty; give a recording ({SUFFIXES})")
    if len(data) > limits.max_bytes:
        raise BadRequest(
            f"{name} is larger than {limits.max_bytes >> 20} MiB; give a shorter recording"
        )
    return Recording(name, data)


def decode(source: Source | Recording, *, limits: AudioLimits = ANY_LENGTH) -> tuple[Tensor, int]:
    """Samples `[n]` in [-1, 1], channels averaged, and their rate in Hz."""
    recording = open_recording(source, limits=limits)
    name = recording.name
    _check_wav_length(name, recording.data)
    try:
        with soundfile.SoundFile(_SeekableBytes(recording.data)) as file:
            _check_header(name, file, limits)
            samples = file.read(dtype="float32", always_2d=True)  # [n, channels]
            n_announced, rate_hz = file.frames, file.samplerate
    except soundfile.SoundFileError as error:
        raise BadRequest(
            f"{name} cannot be decoded; give a whole recording ({SUFFIXES})"
        ) from error
    if len(samples) < COMPLETE_SHARE * n_announced:
        raise BadRequest(f"{name} is cut short; save or upload it again")
    _check_numbers(name, samples)
    mono = samples.mean(axis=1)
    if np.abs(mono).max() < SILENCE_PEAK:
        raise BadRequest(f"{name} is silent; give a recording of speech")
    return torch.from_numpy(mono), rate_hz


def load_wav(
    source: Source | Recording,
    target_hz: int,
    min_hz: int = PROMPT_RATE_HZ,
    *,
    limits: AudioLimits = ANY_LENGTH,
) -> Tensor:
    """Samples `[1, n]` at `target_hz`, resampled straight from the recording's own rate."""
    recording = open_recording(source, limits=limits)
    samples, rate_hz = decode(recording, limits=limits)
    if rate_hz != target_hz:
        check_rate(recording.name, rate_hz, min_hz=min_hz)
    return resample(samples[None], rate_hz, target_hz)


def check_rate(name: str, rate_hz: int, *, min_hz: int = PROMPT_RATE_HZ) -> None:
    """Refuse to invent the treble a low rate has lost."""
    if rate_hz < min_hz:
        raise BadRequest(
            f"{name} is sampled at {rate_hz} Hz; give a recording of at least {min_hz} Hz"
        )


def _read(source: str | os.PathLike[str] | bytes | BinaryIO, max_bytes: int) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return "the recording", bytes(source)
    if isinstance(source, str | os.PathLike):
        return _read_path(Path(source), max_bytes)
    if not hasattr(source, "read"):
        raise BadRequest(f"a {type(source).__name__} is no recording; give a path, file or bytes")
    if source.seekable():
        source.seek(0)  # the caller may have read it before
    data = source.read(max_bytes + 1)
    if not isinstance(data, bytes):
        raise BadRequest("the recording was opened as text; open it with mode 'rb'")
    name = getattr(source, "name", None)
    return _printable(name) if isinstance(name, str) else "the recording", data


def _read_path(path: Path, max_bytes: int) -> tuple[str, bytes]:
    name = _printable(str(path))
    try:
        if not path.exists():
            raise BadRequest(f"there is no file {name}; check the path of the recording")
        if not path.is_file():  # a pipe would block, a directory has no bytes
            raise BadRequest(f"{name} is not a file; give the path of a recording")
        with path.open("rb") as file:
            return name, file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise BadRequest(f"cannot read {name}: {reason}; give another recording") from error


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name)


def _tensor_file(samples: Tensor) -> bytes:
    """The older argument, 16 kHz samples `[1, n]`, as a file, so that one path serves all."""
    mono = samples.detach().cpu().squeeze(0) if samples.dim() == 2 else samples.detach().cpu()
    if mono.dim() != 1 or not mono.is_floating_point() or not len(mono):
        raise BadRequest(
            f"a tensor {list(samples.shape)} of {samples.dtype} is no recording; "
            "give 16 kHz float samples [1, n], or the file itself"
        )
    out = BytesIO()
    # AU: float samples and no time stamp, so equal samples make equal bytes
    soundfile.write(out, mono.float().numpy(), PROMPT_RATE_HZ, format="AU", subtype="FLOAT")
    return out.getvalue()


def _check_wav_length(name: str, data: bytes) -> None:
    """libsndfile mends a lying length in silence; half a recording is not what was meant."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    riff_bytes = struct.unpack_from("<I", data, 4)[0]
    start = 12
    while start + 8 <= len(data):
        kind, n_bytes = struct.unpack_from("<4sI", data, start)
        start += 8
        if kind == b"data":
            is_stream = riff_bytes == n_bytes == UNKNOWN_BYTES  # written before its end was known
            if n_bytes > len(data) - start and not is_stream:
                raise BadRequest(
                    f"{name} announces {n_bytes} bytes of audio and has {len(data) - start}; "
                    "save or upload it again"
                )
            return
        start += n_bytes + n_bytes % 2


def _check_header(name: str, file: soundfile.SoundFile, limits: AudioLimits) -> None:
    if not 0 < file.samplerate <= limits.max_rate_hz:
        raise BadRequest(
            f"{name} is sampled at {file.samplerate} Hz; give at most {limits.max_rate_hz} Hz"
        )
    if file.channels > limits.max_channels:
        raise BadRequest(f"{name} has {file.channels} channels; give mono or stereo")
    if file.frames > limits.max_s * file.samplerate:
        seconds = file.frames / file.samplerate
        raise BadRequest(
            f"{name} lasts {seconds:.1f} s; give a recording of at most {limits.max_s:g} s"
        )


def _check_numbers(name: str, samples: np.ndarray) -> None:
    if not len(samples):
        raise BadRequest(f"{name} contains no audio; give a recording of speech")
    if not np.isfinite(samples).all():
        raise BadRequest(f"{name} contains samples that are not numbers; export it again")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST_PEAK:
        raise BadRequest(f"{name} has samples up to {peak:.3g}; scale it to -1..1")


class _SeekableBytes(BytesIO):
    """libsndfile seeks before the start of a damaged file, and no exception can reach it there."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()
