"""From a model directory to networks on a device, in a chosen number format.

In: a directory in the published layout, names of a device and a format. Out: `Models`.
The choices are made here, once; nothing below asks for a device or a format again.
"""

from pathlib import Path

import torch

from cosyvoice.config import ModelConfig
from cosyvoice.errors import BadRequest
from cosyvoice.models.attention import (
    EXACT,
    AttentionForm,
    attend_by_products,
    attend_fused,
)
from cosyvoice.models.checkpoint import Loading, load_flow, load_llm, load_vocoder, read_config
from cosyvoice.models.noise import SourceNoise, flow_noise
from cosyvoice.models.packed import Int8Linear, PackedLinear, pack

from .runner import Models

FORMATS = ("fp32", "tf32", "bf16", "fp16", "int8")
GPU_FORMATS = frozenset({"tf32", "fp16"})
# As they are read, else float32. int8 is made from bfloat16, to read half as much.
WEIGHTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
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


def choose_format(name: str, device: torch.device, config: ModelConfig) -> str:
    """The number format of the linear layers; norms, softmax and vocoder stay float32.

    BadRequest where the format does not exist or does not run on the device.
    """
    if name == "auto":
        return _best_format(device, config)
    if name not in FORMATS:
        raise BadRequest(f"unknown dtype {name!r}: use auto, {', '.join(FORMATS)}")
    if name in GPU_FORMATS and device.type == "cpu":
        raise BadRequest(f"{name} needs a GPU: on a CPU use fp32, bf16 or int8")
    if name == "int8" and not (device.type == "cpu" and _has_int8_arithmetic()):
        raise BadRequest("int8 needs an x86 CPU: use auto")
    return name


def _best_format(device: torch.device, config: ModelConfig) -> str:
    if config.llm.hidden_size < SMALL_HIDDEN_SIZE:
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device.type == "cpu" and _has_bf16_arithmetic() else "fp32"


def _has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without it, it is slower than float32."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())


def _has_int8_arithmetic() -> bool:
    return "x86" in torch.backends.quantized.supported_engines


def attention_form(name: str, device: torch.device) -> AttentionForm:
    """How the flow's attention is computed in a format, and the type of its cache."""
    if device.type == "cpu":
        # The error of 16 bits here is a thirtieth of what the weights' format costs already.
        return EXACT if name == "fp32" else AttentionForm(torch.bfloat16, attend_by_products)
    return AttentionForm(WEIGHTS.get(name, torch.float32), attend_fused)


def load_models(
    model_dir: Path, *, device: str = "auto", dtype: str = "auto", use_rl: bool = True
) -> Models:
    """Read the three networks. Raises ModelFilesError and BadRequest."""
    config = read_config(model_dir)
    where = choose_device(device)
    name = choose_format(dtype, where, config)
    if name == "tf32":
        torch.set_float32_matmul_precision("high")
    options = Loading(device=where, dtype=WEIGHTS.get(name, torch.float32), use_rl=use_rl)
    is_packed = where.type == "cpu"
    kind = Int8Linear if name == "int8" else PackedLinear
    llm = load_llm(model_dir, config, options=options)
    if is_packed:  # before the next file is read, so that the peak is one network's
        pack(llm, kind)
    flow = load_flow(model_dir, config, options=options)
    if is_packed:
        pack(flow.dit, kind)
    return Models(
        llm=llm,
        flow=flow,
        vocoder=load_vocoder(model_dir, config, options=options),
        flow_noise=flow_noise(n_mels=config.flow.n_mels).to(where),
        source_noise=SourceNoise.published(config, device=where),
        attention=attention_form(name, where),
        number_format=name,
    )
