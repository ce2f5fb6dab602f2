"""Random tensors of the three checkpoints, under the names and in the form that is published.

In: sizes, and a `Draw` that turns a seed and a name into numbers. Out: one dict per `.pt` file.
The scales keep activations near one, the pitch in a voice's range and the audio audible without
clipping. Names and shapes come from the networks themselves; it knows no file and no directory.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cosyvoice.config import FlowConfig, ModelConfig, VocoderConfig
from cosyvoice.models.attention import ROPE_THETA
from cosyvoice.models.checkpoint import FLOW_UNUSED, LLM_UNUSED, llm_key, ungrouped
from cosyvoice.models.flow import Flow
from cosyvoice.models.llm import SpeechLM
from cosyvoice.models.vocoder import Vocoder

State = dict[str, Tensor]


class Draw:
    """Numbers that depend on the seed and the tensor's name only, the same on every machine.

    Uniform, because torch's normal numbers differ in the last bit between instruction sets.
    """

    def __init__(self, seed: str, dtype: torch.dtype = torch.float32) -> None:
        self.seed = seed
        self.dtype = dtype

    def uniform(self, name: str, shape: Sequence[int], *, std: float, mean: float = 0.0) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        reach = std * math.sqrt(3)
        values = torch.rand(tuple(shape), generator=generator)
        return values.mul_(2 * reach).add_(mean - reach).to(self.dtype)


class Scale(NamedTuple):
    """How the parameters whose whole name matches `pattern` are distributed."""

    pattern: str
    mean: float = 0.0
    std: float = 0.0
    gain: float = 0.0  # std times the root of the inputs each output sums; in place of `std`


# The first that matches holds.
COMMON_SCALES = (Scale(r".*\.bias", std=0.1), Scale(r".*", gain=1.0))
LLM_SCALES = (
    Scale(r".*norm\.weight", mean=1.0, std=0.05),
    Scale(r"(embed_tokens|speech_embedding)\.weight", std=1.0),
    Scale(r".*(o_proj|down_proj)\.weight", gain=0.5),  # the residual stream grows slowly
    Scale(r"llm_decoder\.weight", gain=2.5),  # peaked enough for a nucleus of 25 to matter
    *COMMON_SCALES,
)
FLOW_SCALES = (
    Scale(r"input_embedding\.weight", std=1.0),
    Scale(r"spk_embed_affine_layer\.weight", std=0.5),  # its input has length one
    Scale(r".*(attn_norm|norm_out)\.linear\.weight", gain=0.5),
    Scale(r".*proj_out\.bias", mean=-5.0, std=0.5),  # the level of speech in log-mels
    *COMMON_SCALES,
)
VOCODER_SCALES = (
    Scale(r".*\.alpha", mean=1.0, std=0.25),
    Scale(r"m_source\.l_linear\.weight", std=3.0),  # its inputs are sines of amplitude 0.1
    Scale(r"source_downs\..*weight", gain=2.0),
    Scale(r"conv_pre\.weight", gain=0.3),  # log-mels lie around -5
    Scale(r".*resblocks\..*convs1.*weight", gain=0.7),
    Scale(r".*resblocks\..*convs2.*weight", gain=0.35),
    Scale(r"conv_post\.weight", gain=0.5),
    Scale(r"f0_predictor\.classifier\.weight", gain=120.0),  # about a man's pitch, give or take
    Scale(r"f0_predictor\.classifier\.bias", mean=130.0),
    *COMMON_SCALES,
)
# Log magnitudes of the spectrum where nothing speaks. A bin that a constant column would turn into
# a steady tone (0, 6, 12 kHz and what their window leaks into) must be quiet.
LOUD_BINS_LOG = 1.1
QUIET_BINS_LOG = -4.0
# In the published vocoder every convolution is weight-normalised but source_downs.
NORMALISED = re.compile(
    r"(conv_pre|conv_post|ups|resblocks|source_resblocks|f0_predictor\.condnet)\b.*\.weight"
)


def llm_state(config: ModelConfig, draw: Draw) -> State:
    """`llm.pt`: the unused head is the text table itself and shares its storage."""
    with torch.device("meta"):
        model = SpeechLM(config.llm)
    drawn = _drawn(model, draw, LLM_SCALES)
    state = {llm_key(name): tensor for name, tensor in drawn.items()}
    return state | dict.fromkeys(LLM_UNUSED, drawn["embed_tokens.weight"])


def flow_state(config: ModelConfig, draw: Draw) -> State:
    """`flow.pt`, with the rotary frequencies that readers compute themselves."""
    with torch.device("meta"):
        model = Flow(config.flow)
    frequencies = _rotary_frequencies(config.flow).to(draw.dtype)
    return _drawn(model, draw, FLOW_SCALES) | dict.fromkeys(FLOW_UNUSED, frequencies)


def vocoder_state(config: ModelConfig, draw: Draw) -> State:
    """`hift.pt`, its convolutions as gain and direction."""
    with torch.device("meta"):
        model = Vocoder(config.vocoder)
    drawn = _drawn(model, draw, VOCODER_SCALES)
    drawn["conv_post.bias"][: config.vocoder.n_fft // 2 + 1] = _spectral_level(config.vocoder)
    state: State = {}
    for name, tensor in drawn.items():
        state |= _normalised(name, tensor) if NORMALISED.fullmatch(name) else {name: tensor}
    return state


MAKERS: dict[str, Callable[[ModelConfig, Draw], State]] = {
    "llm.pt": llm_state,
    "flow.pt": flow_state,
    "hift.pt": vocoder_state,
}


def n_parameters(config: ModelConfig) -> int:
    """Of all three networks."""
    with torch.device("meta"):
        models = (SpeechLM(config.llm), Flow(config.flow), Vocoder(config.vocoder))
    return sum(parameter.numel() for model in models for parameter in model.parameters())


def _drawn(model: nn.Module, draw: Draw, scales: Sequence[Scale]) -> State:
    state = {}
    for name, parameter in model.named_parameters():
        scale = next(scale for scale in scales if re.fullmatch(scale.pattern, name))
        fan_in = math.prod(parameter.shape[1:])
        std = scale.gain / math.sqrt(fan_in) if scale.gain else scale.std
        state[name] = draw.uniform(ungrouped(name), parameter.shape, std=std, mean=scale.mean)
    return state


def _normalised(name: str, weight: Tensor) -> State:
    """Gain [n, 1, 1] and direction, whose product is `weight` again."""
    gain = torch.linalg.vector_norm(weight.float(), dim=(1, 2), keepdim=True)
    prefix = name.removesuffix("weight") + "parametrizations.weight."
    return {f"{prefix}original0": gain.to(weight.dtype), f"{prefix}original1": weight}


def _spectral_level(config: VocoderConfig) -> Tensor:
    """Log magnitude of each bin, [n_fft / 2 + 1]."""
    n_period = config.n_fft // config.hop_samples  # bins from one steady tone to the next
    bins = torch.arange(config.n_fft // 2 + 1)
    return torch.where(bins % n_period == n_period // 2, LOUD_BINS_LOG, QUIET_BINS_LOG)


def _rotary_frequencies(config: FlowConfig) -> Tensor:
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return ROPE_THETA**-exponents  # [C / 2]
