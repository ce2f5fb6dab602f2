"""How many operations the model's work needs, counted from its sizes.

In: sizes, and which frames see which. Out: counts, a multiplication with its addition being two.
Counted is what the mathematics asks for, not what some code happens to do. It measures nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cosyvoice.config import FRAMES_PER_TOKEN, FlowConfig, LLMConfig
from cosyvoice.models.attention import Segment, block_segments, full_segments
from cosyvoice.models.dit import CONV_GROUPS
from cosyvoice.models.flow import LOOKAHEAD_LEFT_TOKENS
from cosyvoice.models.flow_cache import CONV_TAPS

N_ROWS = 2  # conditional and unconditional
N_POSITION_CONVS = 2
OPS = 2  # of one weight and one input: a product and a sum
BYTES_PER_WEIGHT = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Operations:
    """Of the flow, by kind."""

    linear: int = 0
    conv: int = 0
    attention: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(
            self.linear + other.linear,
            self.conv + other.conv,
            self.attention + other.attention,
        )

    @property
    def total(self) -> int:
        return self.linear + self.conv + self.attention


def flow_weights(config: FlowConfig) -> int:
    """Weights of the DiT's linear layers that each frame is multiplied with."""
    width, inner = config.dim, config.dim * config.ff_mult
    block = 4 * width * config.attention_size + 2 * width * inner
    return config.depth * block + 4 * config.n_mels * width + width * config.n_mels


def flow_pass(
    config: FlowConfig, n_frames: int, segments: Sequence[Segment], n_steps: int
) -> Operations:
    """All Euler steps over n_frames new frames that see what the segments say."""
    n_run = N_ROWS * n_steps * n_frames
    n_pairs = sum((stop - start) * n_keys for start, stop, n_keys in segments)
    position = N_POSITION_CONVS * config.dim * (config.dim // CONV_GROUPS) * CONV_TAPS
    return Operations(
        linear=OPS * n_run * flow_weights(config),
        conv=OPS * n_run * position + _look_ahead(config, n_frames),
        # scores, and the sum of the values
        attention=2 * OPS * N_ROWS * n_steps * config.depth * config.attention_size * n_pairs,
    )


def offline_flow(config: FlowConfig, n_frames: int, n_steps: int) -> Operations:
    """Everybody sees everybody; n_frames with the prompt's."""
    return flow_pass(config, n_frames, full_segments(0, n_frames), n_steps)


def chunk_flow(config: FlowConfig, n_past: int, n_new: int, n_steps: int) -> Operations:
    """n_new frames after n_past, under the block-causal mask."""
    return flow_pass(config, n_new, block_segments(n_past, n_new, config.block_frames), n_steps)


def llm_weights(config: LLMConfig) -> int:
    """Weights that one token is multiplied with, and that must be read for it."""
    hidden, kv_size = config.hidden_size, config.n_kv_heads * config.head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv_size
    layer = attention + 3 * hidden * config.intermediate_size
    return config.n_layers * layer + hidden * config.n_speech_rows


def _look_ahead(config: FlowConfig, n_frames: int) -> int:
    n_taps = (config.lookahead_tokens + 1) + (LOOKAHEAD_LEFT_TOKENS + 1)
    n_tokens = n_frames // FRAMES_PER_TOKEN
    return OPS * n_tokens * config.n_mels * config.lookahead_channels * n_taps
