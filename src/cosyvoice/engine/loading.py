"""From a model directory to networks on a device, in a chosen number format.

In: a directory in the published layout, names of a device and a format. Out: `Models`.
The choices are made here, once; nothing below asks for a device or a format again.
"""

from pathlib import Path

import torch

from cosyvoice.config import ModelConfig
from cosyvoice.errors import BadRequest
from cosyvoice.models.checkpoint import Loading, load_flow, load_llm, load_vocoder, read_config
from cosyvoice.models.noise import SourceNoise, flow_noise

from .runner import Models

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL_HIDDEN_SIZE = 512  # models narrower than this gain nothing from 16 bits


def choose_device(name: str = "auto") -> torch.device:
    """cuda where there is one, else cpu; or the one named. BadRequest where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadRequest(f"unknown device {name!r}: use auto, cpu, cuda or mps") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise BadRequest(f"there is no device {name!r} on this machine: use auto or cpu")
    return device


def choose_dtype(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """The format of the linear layers' weights; norms, softmax and vocoder stay float32."""
    if name != "auto":
        if name not in DTYPES:
            raise BadRequest(f"unknown dtype {name!r}: use auto, {', '.join(DTYPES)}")
        if name == "fp16" and device.type == "cpu":
            raise BadRequest("fp16 needs a GPU: on a CPU use fp32 or bf16")
        return DTYPES[name]
    if config.llm.hidden_size < SMALL_HIDDEN_SIZE:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and _has_bf16_arithmetic():
        return torch.bfloat16
    return torch.float32


def _has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without it, it is slower than float32."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())


def load_models(
    model_dir: Path, *, device: str = "auto", dtype: str = "auto", use_rl: bool = True
) -> Models:
    """Read the three networks. Raises ModelFilesError and BadRequest."""
    config = read_config(model_dir)
    where = choose_device(device)
    options = Loading(device=where, dtype=choose_dtype(dtype, where, config), use_rl=use_rl)
    return Models(
        llm=load_llm(model_dir, config, options=options).eval(),
        flow=load_flow(model_dir, config, options=options).eval(),
        vocoder=load_vocoder(model_dir, config, options=options).eval(),
        flow_noise=flow_noise(n_mels=config.flow.n_mels).to(where),
        source_noise=SourceNoise.published(config, device=where),
    )
