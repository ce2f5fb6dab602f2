"""Weights from a model directory into the three networks.

In: a directory in the published layout and its ModelConfig. Out: SpeechLM, Flow, Vocoder, ready to
run. A network is built without storage (device "meta") and each parameter becomes a tensor of the
file: float32 stays memory-mapped, anything else is converted tensor by tensor, so loading peaks at
one tensor above the result. The convention this needs: SpeechLM and Flow hold parameters and no
buffers; tables they derive from the configuration are computed on use.
Files are not trusted: nothing in them is executed, and whatever is wrong with one is a
ModelFilesError naming the file and the key. A mapped file must not be rewritten while in use
(`init-model` and `download` replace, never rewrite). It knows no tokenizer and no ONNX model.
"""

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cosyvoice.config import ModelConfig
from cosyvoice.errors import ModelFilesError

from .flow import Flow
from .llm import SpeechLM
from .model_config import read_config
from .vocoder import Vocoder
from .weight_norm import DIRECTION_SUFFIXES, GAIN_SUFFIXES, fold_weight_norm

__all__ = [
    "FLOW_UNUSED",
    "LLM_UNUSED",
    "Loading",
    "llm_file",
    "llm_key",
    "load_flow",
    "load_llm",
    "load_vocoder",
    "read_config",
    "resolve_model_dir",
]

MODEL_DIR_VARIABLE = "COSYVOICE_MODEL_DIR"
LOCAL_MODEL_DIR = Path("pretrained_models/Fun-CosyVoice3-0.5B")
BUNDLED_MODEL_DIR = Path(__file__).parents[1] / "assets" / "nano"
PUBLISHED_HUB_ID = "FunAudioLLM/Fun-CosyVoice3-0.5B-2512"

TRAINER_ENTRIES = frozenset({"epoch", "step"})
LLM_PREFIX = "llm.model.model."
LLM_OWN_TABLES = ("speech_embedding.", "llm_decoder.")  # not part of Qwen2
LLM_JOINTS = ("qkv.", "gate_up.")  # our grouping of projections, which the file does not know
LLM_UNUSED = frozenset({"llm.model.lm_head.weight"})
FLOW_UNUSED = frozenset({"decoder.estimator.rotary_embed.inv_freq"})

ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"
LFS_START = b"version https://git-lfs"

# What torch's restricted unpickler raises on damaged or hostile bytes, besides its own error.
UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Loading:
    """Where the weights go, and in which precision."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32  # of LLM and flow; norms stay float32, and the vocoder
    use_rl: bool = True  # prefer llm.rl.pt where there is one


def resolve_model_dir(given: Path | str | None = None) -> tuple[Path, str]:
    """The model directory to use, and a line that says which one it is and why."""
    named = given or os.environ.get(MODEL_DIR_VARIABLE)
    if named:
        origin = "as given" if given else f"from {MODEL_DIR_VARIABLE}"
        return _existing(Path(named)), f"model: {named} ({origin})"
    if LOCAL_MODEL_DIR.is_dir():
        return LOCAL_MODEL_DIR, f"model: {LOCAL_MODEL_DIR}"
    return _existing(BUNDLED_MODEL_DIR), (
        "model: the bundled one, whose weights are RANDOM: it makes noise, not words; for speech "
        f"get {PUBLISHED_HUB_ID} and pass its directory as --model-dir"
    )


def _existing(model_dir: Path) -> Path:
    if model_dir.is_dir():
        return model_dir
    problem = "is not a directory" if model_dir.exists() else "does not exist"
    raise ModelFilesError(
        f"model directory {model_dir} {problem}: get the published model from its "
        f"hub ({PUBLISHED_HUB_ID}) or make a random one with `cosyvoice init-model -o {model_dir}`"
    )


def load_llm(model_dir: Path, config: ModelConfig, *, options: Loading = Loading()) -> SpeechLM:
    """The speech-token language model, from `llm.rl.pt` or `llm.pt`."""
    with torch.device("meta"):
        model = SpeechLM(config.llm)
    file = llm_file(model_dir, use_rl=options.use_rl)
    tensors = _tensors(file, LLM_UNUSED)
    return _filled(model, _Source(file, tensors, llm_key), options)


def llm_file(model_dir: Path, *, use_rl: bool) -> Path:
    """The reinforcement-tuned weights where there are any and they are wanted."""
    tuned = model_dir / "llm.rl.pt"
    return tuned if use_rl and tuned.exists() else model_dir / "llm.pt"


def load_flow(model_dir: Path, config: ModelConfig, *, options: Loading = Loading()) -> Flow:
    """The flow, from `flow.pt`."""
    with torch.device("meta"):
        model = Flow(config.flow)
    file = model_dir / "flow.pt"
    return _filled(model, _Source(file, _tensors(file, FLOW_UNUSED), str), options)


def load_vocoder(model_dir: Path, config: ModelConfig, *, options: Loading = Loading()) -> Vocoder:
    """The vocoder, from `hift.pt`; float32 whatever `options` say, its F0 predictor float64."""
    # Built for real, since its window tables are buffers; no draw of the caller's is used up.
    with torch.random.fork_rng(devices=[]):
        model = Vocoder(config.vocoder)
    file = model_dir / "hift.pt"
    stored = _tensors(file, frozenset())
    _check_weight_norm(file, stored)
    # Cast before folding: half precision would lose the norms.
    tensors = fold_weight_norm({key: value.float() for key, value in stored.items()})
    return _filled(model, _Source(file, tensors, str), Loading(device=options.device))


@dataclass(frozen=True)
class _Source:
    """The tensors of a file, and how a parameter of the network is called there."""

    file: Path
    tensors: Mapping[str, Tensor]
    key_of: Callable[[str], str]

    def error(self, key: str, problem: str) -> ModelFilesError:
        """For a file that is whole but does not fit the configuration."""
        return ModelFilesError(
            f"{self.file}: {key} {problem}: use the cosyvoice3.yaml that belongs to this file, or "
            "download the model again"
        )


def _broken(file: Path, problem: str) -> ModelFilesError:
    return ModelFilesError(f"{file}: {problem}; download the model again")


def llm_key(name: str) -> str:
    """What a parameter of SpeechLM is called in `llm.pt`."""
    name = ungrouped(name)
    return name if name.startswith(LLM_OWN_TABLES) else LLM_PREFIX + name


def ungrouped(name: str) -> str:
    """The parameter's name without our grouping of projections."""
    for joint in LLM_JOINTS:
        name = name.replace(joint, "")
    return name


def _filled(model: Network, source: _Source, options: Loading) -> Network:
    """`model` with its parameters replaced by the tensors of the file, for inference."""
    wanted = {source.key_of(name): (name, p) for name, p in model.named_parameters()}
    _check_keys(source, {key: parameter for key, (_, parameter) in wanted.items()})
    # One tensor that stays mapped keeps the whole file in memory, so all of them do or none.
    stays_mapped = options.dtype == torch.float32
    state = {}
    for key, (name, parameter) in wanted.items():
        dtype = _wanted_dtype(name, parameter, options.dtype)
        tensor = source.tensors[key].to(options.device, dtype, copy=not stays_mapped)
        state[name] = tensor.contiguous()
    model.load_state_dict(state, assign=True)
    model.to(options.device)  # buffers; the parameters are there
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"{type(model).__name__} holds buffers that no file fills: {left}"
    return model.requires_grad_(requires_grad=False).eval()


def _wanted_dtype(name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Norm weights stay float32, and what the network itself holds in float64 stays float64."""
    is_norm = parameter.ndim == 1 and name.removesuffix(".weight").endswith("norm")
    return parameter.dtype if is_norm or parameter.dtype == torch.float64 else dtype


def _check_keys(source: _Source, wanted: Mapping[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in source.tensors]
    if missing:
        raise source.error(missing[0], f"is missing{_and_more(missing)}")
    unexpected = [key for key in source.tensors if key not in wanted]
    if unexpected:
        raise source.error(unexpected[0], f"does not belong there{_and_more(unexpected)}")
    for key, parameter in wanted.items():
        found, expected = tuple(source.tensors[key].shape), tuple(parameter.shape)
        if found != expected:
            raise source.error(key, f"has the shape {found}, cosyvoice3.yaml implies {expected}")


def _and_more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _check_weight_norm(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A weight-normalised pair is a gain [n, 1, 1] and a direction [n, n_in, k]."""
    for key, tensor in tensors.items():
        if key.endswith(DIRECTION_SUFFIXES) and tensor.ndim != 3:
            raise _broken(file, f"{key} has {tensor.ndim} dimensions, not 3")
        if key.endswith(GAIN_SUFFIXES) and (tensor.ndim != 3 or tensor.shape[1:] != (1, 1)):
            raise _broken(file, f"{key} has the shape {tuple(tensor.shape)}, not (n, 1, 1)")


def _tensors(file: Path, unused: frozenset[str]) -> dict[str, Tensor]:
    """The tensors of a `.pt` file but the `unused` ones, each dense and of a floating type."""
    contents = _contents(file)
    if not isinstance(contents, Mapping):
        raise _broken(file, f"holds a {type(contents).__name__}, not a dictionary of tensors")
    ignored = TRAINER_ENTRIES | unused
    tensors = {key: value for key, value in contents.items() if key not in ignored}
    for key, value in tensors.items():
        problem = _defect(key, value)
        if problem:
            raise _broken(file, f"{str(key)[:200]} {problem}")
    return tensors


def _defect(key: Any, value: Any) -> str | None:
    if not isinstance(key, str):
        return "is not a name"
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
        return "is not a plain dense tensor"
    if not value.is_floating_point():
        return f"is of the type {value.dtype}, not a floating one"
    return None


def _contents(file: Path) -> Any:
    """What `torch.save` wrote, mapped into memory where the format allows it."""
    is_zip = _starts_as_zip(file)
    if is_zip:
        _check_archive(file)
    try:
        with warnings.catch_warnings():  # of odd pickle protocols: it reads them or it raises
            warnings.simplefilter("ignore")
            return torch.load(file, mmap=is_zip, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _broken(file, "holds something else than tensors and was not read") from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise _broken(file, f"is damaged ({type(error).__name__}: {reason})") from error


def _starts_as_zip(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_START))
    except FileNotFoundError as error:
        raise _broken(file, "is missing") from error
    except OSError as error:
        raise ModelFilesError(f"{file} cannot be read: {error.strerror}") from error
    if not start:
        raise _broken(file, "is empty")
    if start == LFS_START:
        raise ModelFilesError(f"{file} is only a Git LFS pointer: run `git lfs pull` there")
    if not start.startswith((ZIP_START, PICKLE_START)):
        raise _broken(file, "is not a PyTorch file")
    return start.startswith(ZIP_START)


def _check_archive(file: Path) -> None:
    """Refuse what `torch.save` never writes: compressed, overlapping or scripted entries."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _broken(file, f"is truncated or damaged ({error})") from error
    n_bytes = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise _broken(file, "is compressed")
    if n_bytes > file.stat().st_size:
        raise _broken(file, "is damaged (its parts are larger than the whole)")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise _broken(file, "is a TorchScript program, not a dictionary of tensors")
