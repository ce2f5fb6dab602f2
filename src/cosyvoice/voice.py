"""A speaker as the models see one, and the two ONNX models that make it from a recording.

Comes in: a recording (see `audio`), up to 30 s, and what is said in it.
Goes out: a `Voice`: speech tokens, 24 kHz mel, speaker vector, as CPU tensors, not yet cut to
two frames per token. Knows no text rules, no prompt, no language model; stores nothing on disk.

P speech tokens, T mel frames, N Whisper frames, n samples.
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosyvoice.audio import AudioLimits, Recording, Source, check_rate, decode, open_recording
from cosyvoice.config import (
    EMBEDDING_SIZE,
    FRAMES_PER_TOKEN,
    MAX_PROMPT_S,
    N_MELS,
    PROMPT_RATE_HZ,
    SAMPLE_RATE_HZ,
    TOKENS_HZ,
)
from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.features import mel_spectrogram, one_thread, resample, speaker_features, whisper_mel

SPEAKER_FILE = "campplus.onnx"
TOKENIZER_FILE = "speech_tokenizer_v3.onnx"
PROMPT_LIMITS = AudioLimits(max_s=MAX_PROMPT_S)
MIN_PROMPT_S = 1 / TOKENS_HZ  # one token, two mel frames
N_CACHED_VOICES = 64  # of at most half a megabyte
HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Voice:
    """A speaker: what a recording gave, or only a speaker vector."""

    embedding: Tensor  # [192] float32
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))  # [P]
    mel: Tensor = field(default_factory=lambda: torch.zeros(0, N_MELS))  # [T, 80] float32
    transcript: str = ""
    transcript_ids: tuple[int, ...] | None = None  # where a stored voice has lost the words

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.embedding, self.tokens, self.mel)]
        assert self.embedding.shape == (EMBEDDING_SIZE,), f"embedding, tokens, mel: {shapes}"
        assert self.tokens.dim() == 1 and not self.tokens.is_floating_point(), shapes
        assert self.mel.dim() == 2 and self.mel.shape[1] == N_MELS, shapes

    @property
    def can_clone(self) -> bool:
        """Is there a recording behind it, which the flow can continue?"""
        return len(self.tokens) > 0 and len(self.mel) >= FRAMES_PER_TOKEN

    @property
    def is_embedding_only(self) -> bool:
        return not self.can_clone

    def aligned(self) -> "Voice":
        """The same voice cut to exactly two mel frames per token (not for voice conversion)."""
        n_tokens = min(len(self.mel) // FRAMES_PER_TOKEN, len(self.tokens))
        n_frames = n_tokens * FRAMES_PER_TOKEN
        if len(self.tokens) == n_tokens and len(self.mel) == n_frames:
            return self
        return replace(self, tokens=self.tokens[:n_tokens], mel=self.mel[:n_frames])

    @cached_property
    def digest(self) -> str:
        """Names the sound of the voice, transcript aside: equal tensors, equal digest."""
        parts = (self.tokens.int(), self.mel, self.embedding)
        return sha256(b"|".join(part.numpy().tobytes() for part in parts)).hexdigest()


class VoiceEncoder:
    """Recordings to voices; safe to call from many threads."""

    def __init__(self, model_dir: str | os.PathLike[str], *, device: str | torch.device = "cpu"):
        directory = Path(model_dir)
        # The speaker model runs on the CPU always, as in the reference.
        self._speaker = OnnxModel(directory / SPEAKER_FILE, n_inputs=1)
        self._tokenizer = OnnxModel(directory / TOKENIZER_FILE, n_inputs=2, device=device)
        self._voices = VoiceCache(N_CACHED_VOICES)
        self._fingerprint_lock = Lock()
        self._fingerprint = ""

    def encode(self, source: Source | Recording, transcript: str = "") -> Voice:
        """The voice of a recording; the same bytes are encoded once."""
        with one_thread():
            recording = open_recording(source, limits=PROMPT_LIMITS)
            voice = self._voices.get(recording.digest, lambda: self._encode(recording))
        return replace(voice, transcript=transcript) if transcript else voice

    def tokens(self, source: Source | Recording) -> Tensor:
        """Only the speech tokens `[P]`: what voice conversion needs of its source."""
        with one_thread():
            samples, rate_hz = _decode_prompt(open_recording(source, limits=PROMPT_LIMITS))
            return self.tokenize(resample(samples[None], rate_hz, PROMPT_RATE_HZ))

    def tokenize(self, samples: Tensor) -> Tensor:
        """16 kHz samples `[1, n]` -> int32 ids `[P]`, 25 a second."""
        features = whisper_mel(samples).numpy()  # [1, 128, N]
        n_frames = np.array([features.shape[2]], dtype=np.int32)
        ids = self._tokenizer.run(features, n_frames).reshape(-1)
        return torch.from_numpy(ids.astype(np.int32))

    def embed(self, samples: Tensor) -> Tensor:
        """16 kHz samples `[1, n]` -> the raw speaker vector `[192]`."""
        features = speaker_features(samples[0])[None].numpy()  # [1, T, 80]
        vector = self._speaker.run(features).reshape(-1)
        if vector.shape != (EMBEDDING_SIZE,):
            raise ModelFilesError(
                f"{self._speaker.path} gives {vector.size} numbers, not {EMBEDDING_SIZE}; "
                "download it again"
            )
        return torch.from_numpy(vector.astype(np.float32))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over both model files: voices encoded by other models must be made again."""
        with self._fingerprint_lock:
            if not self._fingerprint:
                self._fingerprint = _hash_files(self._speaker.path, self._tokenizer.path)
            return self._fingerprint

    def _encode(self, recording: Recording) -> Voice:
        samples, rate_hz = _decode_prompt(recording)
        heard = resample(samples[None], rate_hz, PROMPT_RATE_HZ)  # [1, n]
        # from the recording's own rate, not from what was heard at 16 kHz
        spoken = resample(samples[None], rate_hz, SAMPLE_RATE_HZ)
        return Voice(
            embedding=self.embed(heard),
            tokens=self.tokenize(heard),
            mel=mel_spectrogram(spoken)[0].contiguous(),
        )


class OnnxModel:
    """One ONNX file: its session is made at the first run, inputs are given by position."""

    def __init__(self, path: Path, *, n_inputs: int, device: str | torch.device = "cpu"):
        self.path = path
        self._n_inputs = n_inputs
        self._device = torch.device(device)
        self._lock = Lock()
        self._session: Any = None

    def run(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """The first output."""
        session = self._load()
        names = [node.name for node in session.get_inputs()]
        try:
            outputs = session.run(None, dict(zip(names, inputs, strict=True)))
        except _onnx_errors() as error:
            raise ModelFilesError(
                f"{self.path} does not accept its input; download it again ({_first_line(error)})"
            ) from error
        return np.asarray(outputs[0])

    def _load(self) -> Any:
        with self._lock:
            if self._session is None:
                self._session = self._open()
            return self._session

    def _open(self) -> Any:
        import onnxruntime

        if not self.path.is_file():
            raise ModelFilesError(
                f"{self.path} is missing; download the model again, or give another"
            )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # errors only: they are raised as well
        try:
            session = onnxruntime.InferenceSession(
                str(self.path), options, providers=self._providers()
            )
        except _onnx_errors() as error:
            raise ModelFilesError(
                f"{self.path} is damaged or no ONNX model; download it again ({_first_line(error)})"
            ) from error
        n_inputs = len(session.get_inputs())
        if n_inputs != self._n_inputs:
            raise ModelFilesError(
                f"{self.path} takes {n_inputs} inputs, not {self._n_inputs}; it is another model, "
                "download it again"
            )
        return session

    def _providers(self) -> list[Any]:
        import onnxruntime

        cpu = "CPUExecutionProvider"
        cuda = "CUDAExecutionProvider"
        if self._device.type != "cuda" or cuda not in onnxruntime.get_available_providers():
            return [cpu]
        return [(cuda, {"device_id": self._device.index or 0}), cpu]


class VoiceCache:
    """The voices encoded last; a voice asked for twice at once is encoded once."""

    def __init__(self, n_max: int):
        self._n_max = n_max
        self._lock = Lock()
        self._voices: OrderedDict[str, Future[Voice]] = OrderedDict()

    def get(self, key: str, encode: Callable[[], Voice]) -> Voice:
        """The voice under `key`, made by `encode` if nobody has or does."""
        while True:
            future, is_ours = self._claim(key)
            if is_ours:
                return self._fill(key, future, encode)
            try:
                return future.result()
            except CancelledError:  # whoever began it failed: find out why ourselves
                continue

    def _claim(self, key: str) -> tuple[Future[Voice], bool]:
        with self._lock:
            known = self._voices.get(key)
            future: Future[Voice] = known or Future()
            self._voices[key] = future
            self._voices.move_to_end(key)
            if len(self._voices) > self._n_max:
                self._voices.popitem(last=False)
            return future, known is None

    def _fill(self, key: str, future: Future[Voice], encode: Callable[[], Voice]) -> Voice:
        try:
            voice = encode()
            future.set_result(voice)
            return voice
        finally:
            if not future.done():
                with self._lock:
                    if self._voices.get(key) is future:
                        del self._voices[key]
                future.cancel()


def _decode_prompt(recording: Recording) -> tuple[Tensor, int]:
    samples, rate_hz = decode(recording, limits=PROMPT_LIMITS)
    check_rate(recording.name, rate_hz)
    seconds = len(samples) / rate_hz
    if seconds < MIN_PROMPT_S:
        raise BadRequest(
            f"{recording.name} lasts {seconds:.3f} s; give at least {MIN_PROMPT_S:g} s, "
            "better some seconds of speech"
        )
    return samples, rate_hz


def _hash_files(*paths: Path) -> str:
    digest = sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while block := file.read(HASH_BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise ModelFilesError(
                f"{path} cannot be read: {error.strerror}; download the model again"
            ) from error
    return digest.hexdigest()


def _onnx_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises; its exceptions share no ancestor but `Exception`."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = (
        "EPFail EngineError Fail InvalidArgument InvalidGraph InvalidProtobuf NoModel NoSuchFile "
        "NotFound NotImplemented RuntimeException"
    )
    return tuple(getattr(state, name) for name in names.split() if hasattr(state, name))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
