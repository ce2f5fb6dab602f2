"""Named voices in a directory: two files each, `<name>.safetensors` and `<name>.json`.

Comes in: a name, a recording, what is said in it and who agreed to its use.
Goes out: the `Voice` of that name, or the `VoiceCard` that describes it. The recording is kept as
it came, so that a voice encoded by other ONNX models is encoded again when it is next used.
Knows no request and no prompt. Files appear whole or not at all; nothing is unpickled.
"""

import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from platformdirs import user_data_dir
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cosyvoice.audio import Recording, Source, decode, open_recording
from cosyvoice.config import EMBEDDING_SIZE, N_MELS
from cosyvoice.errors import BadRequest, ModelFilesError, VoiceNotFound
from cosyvoice.pcm import write_atomic
from cosyvoice.voice import PROMPT_LIMITS, Voice, VoiceEncoder

VERSION = 1
MAX_NAME_CHARS = 64
MAX_NAME_BYTES = 200  # file systems allow 255, suffix included
MAX_NAMES_IN_ERROR = 20
TENSOR_KINDS = (torch.float32, torch.int32, torch.float32)  # of embedding, tokens, mel
TENSOR_SHAPES = ((EMBEDDING_SIZE,), (1, 2), (N_MELS,))  # embedding; both ranks; a mel frame
CARD_TEXTS = ("transcript", "consent", "created", "onnx_hash", "recording_hash")
NAME = re.compile(r"[\w\-](?:[\w\-. ]*[\w\-])?")  # \w: letters and digits of every script, _

logger = logging.getLogger(__name__)


def default_voice_dir() -> Path:
    """Where voices are kept unless told otherwise: the user's data directory."""
    return Path(user_data_dir("cosyvoice", appauthor=False)) / "voices"


def checked_name(name: str) -> str:
    """`name` as it is stored; `BadRequest` where it could not be a file name everywhere."""
    name = unicodedata.normalize("NFC", name.strip())
    fits = len(name) <= MAX_NAME_CHARS and len(name.encode(errors="replace")) <= MAX_NAME_BYTES
    if not (fits and NAME.fullmatch(name)):
        raise BadRequest(
            f"{name[:MAX_NAME_CHARS]!r} cannot name a voice; use up to {MAX_NAME_CHARS} letters, "
            "digits, '-', '_', and inside also '.' or spaces"
        )
    return name


@dataclass(frozen=True)
class VoiceCard:
    """What the book says about a voice; all of its `.json` file but the name."""

    name: str
    transcript: str
    consent: str  # who agreed to the use of this voice, in the words of whoever added it
    created: str  # ISO 8601, UTC
    onnx_hash: str  # the encoder's fingerprint
    recording_hash: str  # SHA-256 of the recording's bytes
    seconds: float
    rate_hz: int
    version: int = VERSION

    def to_json(self) -> bytes:
        content = asdict(self)
        del content["name"]  # the file's name says it, and renaming changes only that
        return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


class VoiceBook:
    """The voices of one directory."""

    def __init__(self, directory: str | os.PathLike[str], encoder: VoiceEncoder):
        self.directory = Path(directory)
        self._encoder = encoder
        self._writing = Lock()

    def names(self) -> list[str]:
        """All names in order, those of damaged voices too; reads no file."""
        if not self.directory.is_dir():
            return []
        stems = (entry.name.removesuffix(".json") for entry in self.directory.glob("*.json"))
        return sorted(stem for stem in stems if NAME.fullmatch(stem))

    def get(self, name: str) -> Voice:
        """The voice of that name, encoded again if other ONNX models made it."""
        card = self.describe(name)
        if card.onnx_hash != self._encoder.fingerprint:
            return self._encode_again(card)
        parts = _read_tensors(self._tensor_path(card.name), ("embedding", "tokens", "mel"))
        return _voice(self._tensor_path(card.name), parts, card.transcript)

    def describe(self, name: str) -> VoiceCard:
        """What is known about a voice, without its tensors."""
        name = checked_name(name)
        path = self._card_path(name)
        try:
            return _parse_card(path, name, path.read_bytes())
        except FileNotFoundError:
            raise VoiceNotFound(f"there is no voice {name!r}; {_offer(self.names())}") from None
        except OSError as error:
            raise ModelFilesError(f"{path} cannot be read: {error.strerror}") from error

    def recording(self, name: str) -> Recording:
        """The recording a voice was made from, as it came."""
        card = self.describe(name)
        path = self._tensor_path(card.name)
        stored = _read_tensors(path, ("recording",))["recording"]
        recording = Recording(f"the recording of {card.name!r}", stored.numpy().tobytes())
        if recording.digest != card.recording_hash:
            raise ModelFilesError(f"{path} is damaged; remove the voice and add it again")
        return recording

    def add(
        self, name: str, source: Source | Recording, transcript: str = "", *, consent: str = ""
    ) -> VoiceCard:
        """Store a new voice; `BadRequest` where the name is taken."""
        name = checked_name(name)
        self._require_free(name)
        recording = open_recording(source, limits=PROMPT_LIMITS)
        voice = self._encoder.encode(recording, transcript)
        samples, rate_hz = decode(recording, limits=PROMPT_LIMITS)
        card = VoiceCard(
            name=name,
            transcript=transcript,
            consent=consent,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            onnx_hash=self._encoder.fingerprint,
            recording_hash=recording.digest,
            seconds=round(len(samples) / rate_hz, 3),
            rate_hz=rate_hz,
        )
        with self._writing:
            self._require_free(name)  # another thread may have been faster
            try:
                self._write(card, voice, recording)
            except OSError as error:
                reason = error.strerror or error
                raise ModelFilesError(
                    f"cannot store a voice in {self.directory}: {reason}; choose another directory"
                ) from error
        return card

    def remove(self, name: str) -> None:
        """Forget a voice, whether or not its files are sound."""
        name = checked_name(name)
        with self._writing:
            self._require(name)
            self._card_path(name).unlink(missing_ok=True)  # first: it is what makes a voice
            self._tensor_path(name).unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        """Give a voice another, free name."""
        old, new = checked_name(old), checked_name(new)
        with self._writing:
            self._require(old)
            self._require_free(new)
            if not self._tensor_path(old).is_file():
                raise ModelFilesError(
                    f"{self._tensor_path(old)} is missing; remove the voice and add it again"
                )
            # copied, not moved: whenever this stops, one of the two names is complete
            shutil.copyfile(self._tensor_path(old), self._tensor_path(new))
            write_atomic(self._card_path(new), self._card_path(old).read_bytes())
            self._card_path(old).unlink()
            self._tensor_path(old).unlink()

    def _encode_again(self, card: VoiceCard) -> Voice:
        recording = self.recording(card.name)
        voice = self._encoder.encode(recording, card.transcript)
        try:
            with self._writing:
                self._write(replace(card, onnx_hash=self._encoder.fingerprint), voice, recording)
        except OSError as error:  # a read-only directory still serves, only more slowly
            logger.warning("voice %s cannot be stored again: %s", card.name, error)
        return voice

    def _write(self, card: VoiceCard, voice: Voice, recording: Recording) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        stored = {
            "recording": torch.from_numpy(np.frombuffer(recording.data, dtype=np.uint8).copy()),
            "tokens": voice.tokens,
            "mel": voice.mel,
            "embedding": voice.embedding,
        }
        write_atomic(self._tensor_path(card.name), save(stored))
        write_atomic(self._card_path(card.name), card.to_json())

    def _require(self, name: str) -> None:
        if not self._card_path(name).exists():
            raise VoiceNotFound(f"there is no voice {name!r}; {_offer(self.names())}")

    def _require_free(self, name: str) -> None:
        if self._card_path(name).exists():
            raise BadRequest(f"there is a voice {name!r} already; remove it or take another name")

    def _card_path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def _tensor_path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def _offer(names: list[str]) -> str:
    if not names:
        return "there are none yet, add one with `cosyvoice voices add`"
    more = f" and {len(names) - MAX_NAMES_IN_ERROR} more" if len(names) > MAX_NAMES_IN_ERROR else ""
    return f"there are: {', '.join(names[:MAX_NAMES_IN_ERROR])}{more}"


def _parse_card(path: Path, name: str, content: bytes) -> VoiceCard:
    try:
        data = json.loads(content)
        texts = {key: data[key] for key in CARD_TEXTS}
        seconds, rate_hz, version = float(data["seconds"]), int(data["rate_hz"]), data["version"]
        is_sound = all(isinstance(text, str) for text in texts.values())
    except (ValueError, LookupError, TypeError):  # no JSON, keys missing, values of other types
        is_sound = False
    if not is_sound:
        raise ModelFilesError(f"{path} is damaged; remove the voice and add it again")
    if version != VERSION:
        raise ModelFilesError(
            f"{path} has format {version!r}, not {VERSION}; update cosyvoice or add the voice again"
        )
    return VoiceCard(name=name, **texts, seconds=seconds, rate_hz=rate_hz)


def _read_tensors(path: Path, keys: Iterable[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # cloned: a view of the mapped file would crash us when the file is cut
            return {key: file.get_tensor(key).clone() for key in keys}
    except (SafetensorError, OSError) as error:
        raise ModelFilesError(
            f"{path} is missing or damaged; remove the voice and add it again"
        ) from error


def _voice(path: Path, parts: dict[str, Tensor], transcript: str) -> Voice:
    embedding, tokens, mel = parts["embedding"], parts["tokens"], parts["mel"]
    kinds = (embedding.dtype, tokens.dtype, mel.dtype)
    shapes = (embedding.shape, (tokens.dim(), mel.dim()), mel.shape[1:])
    if kinds != TENSOR_KINDS or shapes != TENSOR_SHAPES:
        raise ModelFilesError(
            f"{path} holds tensors of other shapes; remove the voice and add it again"
        )
    return Voice(embedding=embedding, tokens=tokens, mel=mel, transcript=transcript)
