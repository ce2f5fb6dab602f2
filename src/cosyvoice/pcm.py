"""Samples as bytes: int16 conversion, WAV headers, audio files.

Comes in: float samples of one channel in [-1, 1] (anything NumPy can view), or int16 bytes.
Goes out: int16 arrays, headers, whole files in one of `FORMATS`, written atomically.
Knows neither torch nor models, so that a client can use it alone; soundfile is imported only by
what needs a codec.
"""

import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cosyvoice.errors import BadRequest

RATE_HZ = 24_000  # equals config.SAMPLE_RATE_HZ, which this rank may not import
SAMPLE_BYTES = 2
FULL_SCALE = 32_768  # everywhere
BRIDGE_SCALE = 32_767  # the REST bridge's contract
UNKNOWN_BYTES = 0xFFFF_FFFF  # the usual mark of a WAV whose length is not known yet
HEADER_BYTES = 44

# How soundfile calls what a suffix means; None: written here.
CODECS: dict[str, tuple[str, str] | None] = {
    "wav": None,
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
    "ogg": ("OGG", "VORBIS"),
    "pcm": None,
}
FORMATS = tuple(CODECS)


def to_int16(samples: ArrayLike, *, scale: int = FULL_SCALE) -> NDArray[np.int16]:
    """float [n] -> int16 [n]: scaled, cut off towards zero, and held inside the range."""
    scaled = np.asarray(samples, dtype=np.float32) * np.float32(scale)
    assert not np.isnan(scaled).any(), f"NaN among {scaled.size} samples"
    held: NDArray[np.float32] = np.clip(np.trunc(scaled), -32_768, 32_767)
    return held.astype(np.int16)


def to_float(samples: ArrayLike) -> NDArray[np.float32]:
    """int16 [n] -> float32 [n] in [-1, 1)."""
    return np.asarray(samples, dtype=np.float32) / np.float32(FULL_SCALE)


def pcm_bytes(samples: ArrayLike, *, scale: int = FULL_SCALE) -> bytes:
    """Raw little-endian int16."""
    return to_int16(samples, scale=scale).astype("<i2").tobytes()


def from_pcm_bytes(data: bytes) -> NDArray[np.float32]:
    """Raw little-endian int16 -> float32 [n]."""
    if len(data) % SAMPLE_BYTES:
        raise BadRequest(f"{len(data)} bytes are not whole 16-bit samples; send an even number")
    return to_float(np.frombuffer(data, dtype="<i2"))


def wav_header(n_samples: int, *, rate_hz: int = RATE_HZ) -> bytes:
    """The 44 bytes before `n_samples` int16 samples of one channel."""
    n_bytes = n_samples * SAMPLE_BYTES
    return _riff(HEADER_BYTES - 8 + n_bytes, n_bytes, rate_hz)


def wav_stream_header(*, rate_hz: int = RATE_HZ) -> bytes:
    """The 44 bytes before a stream whose length is not known yet."""
    return _riff(UNKNOWN_BYTES, UNKNOWN_BYTES, rate_hz)


def _riff(riff_bytes: int, data_bytes: int, rate_hz: int) -> bytes:
    # 16: size of the format chunk; 1: plain PCM; 1: channel
    layout = (16, 1, 1, rate_hz, rate_hz * SAMPLE_BYTES, SAMPLE_BYTES, 8 * SAMPLE_BYTES)
    head = struct.pack("<4sI4s4s", b"RIFF", min(riff_bytes, UNKNOWN_BYTES), b"WAVE", b"fmt ")
    data = struct.pack("<4sI", b"data", min(data_bytes, UNKNOWN_BYTES))
    return head + struct.pack("<IHHIIHH", *layout) + data


def wav_bytes(samples: ArrayLike, *, rate_hz: int = RATE_HZ, scale: int = FULL_SCALE) -> bytes:
    """A whole 16-bit mono WAV file."""
    data = pcm_bytes(samples, scale=scale)
    return wav_header(len(data) // SAMPLE_BYTES, rate_hz=rate_hz) + data


def format_of(path: str | os.PathLike[str]) -> str:
    """The format a file name asks for; `BadRequest` where we cannot write it."""
    return checked_format(Path(path).suffix.removeprefix("."))


def checked_format(name: str) -> str:
    """`name` in lower case, if it is one of `FORMATS`."""
    if name.lower() not in CODECS:
        raise BadRequest(f"cannot write audio as {name!r}; choose one of {', '.join(FORMATS)}")
    return name.lower()


def encode(samples: ArrayLike, audio_format: str, *, rate_hz: int = RATE_HZ) -> bytes:
    """A whole file of one of `FORMATS`."""
    name = checked_format(audio_format)
    codec = CODECS[name]
    if codec:
        return _compress(to_int16(samples), codec, rate_hz)
    return pcm_bytes(samples) if name == "pcm" else wav_bytes(samples, rate_hz=rate_hz)


def _compress(samples: NDArray[np.int16], codec: tuple[str, str], rate_hz: int) -> bytes:
    import soundfile

    container, subtype = codec
    out = BytesIO()
    with soundfile.SoundFile(out, "w", rate_hz, 1, format=container, subtype=subtype) as file:
        # libsndfile's Vorbis encoder keeps a block on its stack: a second at a time
        for start in range(0, len(samples), rate_hz):
            file.write(samples[start : start + rate_hz])
    return out.getvalue()


def save(path: str | os.PathLike[str], samples: ArrayLike, *, rate_hz: int = RATE_HZ) -> None:
    """Write an audio file in the format its suffix names: the whole file or nothing."""
    data = encode(samples, format_of(path), rate_hz=rate_hz)
    try:
        write_atomic(path, data)
    except OSError as error:
        reason = error.strerror or error
        raise BadRequest(f"cannot write {path}: {reason}; choose another place") from error


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file `path`: a reader sees the old bytes or the new ones, never a part."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that appears as `path` when the block ends, and not at all when it fails."""
    target = Path(path)
    if target.exists() and not target.is_file():  # a pipe or /dev/stdout is not to be replaced
        with target.open("wb") as file:
            yield file
        return
    hidden = target.with_name(f".{secrets.token_hex(8)}.part")  # tempfile would make it 0600
    try:
        with hidden.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(target)
    finally:
        hidden.unlink(missing_ok=True)
