"""The speech-token language model: a Qwen2-style decoder and the slots of its KV cache.

Comes in: vectors made of items (a speech id as it is, a text id t as ~t) and the slots they extend.
Goes out: hidden states after the final norm, and the logits of the speech vocabulary.
Knows nothing of sentences, sampling or special ids. Activations are float32 between the linears,
each linear computes in the type of its own weight, attention in the type of the cache.

B rows, T new positions, L positions cached, H hidden, A attention heads, G query heads per
key/value head (A / G of those), D head channels.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import LLMConfig
from cosyvoice.errors import BadRequest

from .layers import Joint, Projection

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]

MASK_ALIGNMENT = 8  # CUDA's masked attention kernel wants key counts in multiples of this


def rope_table(config: LLMConfig, n_positions: int, device: torch.device | str) -> Rope:
    """Cosine and sine of every position's angles, in float32 as the reference has them."""
    half = config.head_dim // 2
    channel = torch.arange(half, device=device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (channel / half)  # [D/2]
    position = torch.arange(n_positions, device=device, dtype=torch.float32)
    angle = position[:, None] * frequency  # [n_positions, D/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE in the half convention: channel i turns with channel i + D/2, not with its neighbour."""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)  # [B, heads, T, D]


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed and returned in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        # Spelt out, because on a CPU the fused call takes four times as long for a row.
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()


class SelfAttention(nn.Module):
    """Grouped-query attention; `attend` decides what is seen."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        hidden, kv_size = config.hidden_size, config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        sizes = {"q_proj": hidden, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = Joint({name: Projection(hidden, size) for name, size in sizes.items()})
        self.o_proj = Projection(hidden, hidden, bias=False)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk = rotate(qkv[:, : self.n_heads + self.n_kv_heads], rope)
        q, k = qk[:, : self.n_heads], qk[:, self.n_heads :]  # [B, A, T, D], [B, A/G, T, D]
        y = attend(q, k, qkv[:, self.n_heads + self.n_kv_heads :])  # [B, A, T, D]
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        names = ("gate_proj", "up_proj")
        self.gate_up = Joint({name: Projection(hidden, inner, bias=False) for name in names})
        self.down_proj = Projection(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, H], float32


class SpeechLM(nn.Module):
    """Text and speech tokens in, the next speech token's logits out."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.text_vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.speech_embedding = nn.Embedding(config.n_speech_rows, config.hidden_size)
        self.llm_decoder = Projection(config.hidden_size, config.n_speech_rows, bias=False)

    def embed(self, items: Tensor) -> Tensor:
        """Vectors [..., H] of items [...]: speech ids as they are, text ids t as ~t."""
        speech = self.speech_embedding(items.clamp(min=0))
        text = self.embed_tokens((~items).clamp(min=0))
        return torch.where(items.unsqueeze(-1) < 0, text, speech).float()

    @torch.no_grad()
    def forward(self, x: Tensor, cache: "KVSlots", slots: Sequence[int]) -> Tensor:
        """Append x [B, T, H] to the cache, row b to `slots[b]`; hidden states [B, T, H] come back.

        Rows may have any lengths cached already. Raises BadRequest, with the cache as it was,
        where a slot has no room left.
        """
        step = cache.step(slots, x.shape[1])
        for i, layer in enumerate(self.layers):
            x = layer(x, step.rope, partial(step.attend, cache.k[i], cache.v[i]))
        cache.advance(slots, x.shape[1])
        return self.norm(x)

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden states [B, T, H] of whole sequences, without a cache and differentiable."""
        rope = rope_table(self.config, x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, rope, _attend_causally)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., n_speech_rows] of hidden states [..., H]."""
        return self.llm_decoder(hidden).float()


class KVSlots:
    """The KV cache: one array for keys, one for values, and a length for each slot.

    Slots are taken and released by sentence; a released slot is reused as it is, because nothing
    beyond a slot's length is ever read.
    """

    def __init__(
        self,
        config: LLMConfig,
        n_slots: int,
        max_positions: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (config.n_layers, n_slots, config.n_kv_heads, max_positions, config.head_dim)
        self._on_cpu = torch.device(device).type == "cpu"
        self.k = _zeros(shape, device, dtype)
        self.v = _zeros(shape, device, dtype)
        self.lengths = [0] * n_slots
        self.max_positions = max_positions
        self._rope = rope_table(config, max_positions, device)
        self._free = list(range(n_slots))

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free slot, empty."""
        assert self._free, f"all {len(self.lengths)} slots are taken"
        return heapq.heappop(self._free)  # the lowest, so that slots in use lie side by side

    def release(self, slot: int) -> None:
        """Give a slot back; its positions are forgotten."""
        assert slot not in self._free, f"slot {slot} was released twice"
        self.lengths[slot] = 0
        heapq.heappush(self._free, slot)

    def step(self, slots: Sequence[int], n_new: int) -> "RowStep | PaddedStep":
        """Where the next `n_new` positions of each of these slots go."""
        assert len(set(slots)) == len(slots), f"a slot twice in one batch: {slots}"
        starts = [self.lengths[slot] for slot in slots]
        if max(starts) + n_new > self.max_positions:
            raise BadRequest(
                f"the sentence needs more than {self.max_positions} LLM positions: "
                "shorten the text or the prompt, or raise max_positions"
            )
        device = self.k.device
        offsets = torch.arange(n_new, device=device)
        positions = torch.tensor(starts, device=device)[:, None] + offsets  # [B, T]
        cos, sin = (table[positions].unsqueeze(1) for table in self._rope)  # [B, 1, T, D/2]
        where = torch.tensor(slots, device=device)  # [B]
        lowest = min(slots)
        if list(slots) == list(range(lowest, lowest + len(slots))):  # a view, nothing is copied
            rows: slice | Tensor = slice(lowest, lowest + len(slots))
        else:
            rows = where
        if self._on_cpu and (n_new > 1 or len(slots) == 1 or rows is where):
            return RowStep((cos, sin), where, positions, slots, starts)
        n_keys = self._padded_length(max(starts) + n_new)
        return PaddedStep((cos, sin), where, positions, n_keys, rows)

    def advance(self, slots: Sequence[int], n_new: int) -> None:
        """Count the positions a step has written."""
        for slot in slots:
            self.lengths[slot] += n_new

    def _padded_length(self, n_positions: int) -> int:
        return min(-(-n_positions // MASK_ALIGNMENT) * MASK_ALIGNMENT, self.max_positions)


@dataclass(frozen=True)
class RowStep:
    """Attention row by row over slices of the cache: nothing is copied. For CPUs, long inputs."""

    rope: Rope
    where: Tensor  # [B] slots
    positions: Tensor  # [B, T]
    slots: Sequence[int]
    starts: Sequence[int]

    def attend(self, keys: Tensor, values: Tensor, *qkv: Tensor) -> Tensor:
        """Write k, v [B, A/G, T, D] into a layer's cache; answer q [B, A, T, D] from it."""
        q, k, v = qkv
        _write(keys, k, self)
        _write(values, v, self)
        q = q.to(keys.dtype)
        rows = []
        for b, (slot, start) in enumerate(zip(self.slots, self.starts, strict=True)):
            end = start + q.shape[2]
            rows.append(_attend_row(q[b], keys[slot, :, :end], values[slot, :, :end]))
        return torch.stack(rows)  # [B, A, T, D]


@dataclass(frozen=True)
class PaddedStep:
    """Attention of all rows at once over their slots, padded to the longest."""

    rope: Rope
    where: Tensor  # [B] slots
    positions: Tensor  # [B, T]
    n_keys: int  # the longest row, rounded up
    rows: slice | Tensor  # the slots, as an index: a slice where they lie side by side

    def attend(self, keys: Tensor, values: Tensor, *qkv: Tensor) -> Tensor:
        """As RowStep.attend."""
        q, k, v = qkv
        _write(keys, k, self)
        _write(values, v, self)
        n_groups = q.shape[1] // k.shape[1]
        seen = torch.arange(self.n_keys, device=q.device) <= self.positions[..., None]  # [B, T, L]
        y = F.scaled_dot_product_attention(
            q.to(keys.dtype).unflatten(1, (-1, n_groups)).flatten(2, 3),  # [B, A/G, G*T, D]
            keys[:, :, : self.n_keys][self.rows],
            values[:, :, : self.n_keys][self.rows],
            attn_mask=seen.repeat(1, n_groups, 1).unsqueeze(1),
        )
        return y.unflatten(2, (n_groups, -1)).flatten(1, 2)  # [B, A, T, D]


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Zeros, because rows are padded to one length and 0 * nan is nan.

    On a CPU numpy's are fresh pages of the system, so those nobody touches cost nothing.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    return (
        torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8))
        .view(dtype)
        .view(shape)
    )


def _write(layer: Tensor, new: Tensor, step: RowStep | PaddedStep) -> None:
    """Put new [B, A/G, T, D] into layer [n_slots, A/G, max_positions, D]."""
    layer[step.where[:, None], :, step.positions] = new.transpose(1, 2).to(layer.dtype)


def _attend_row(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One row: q [A, T, D] are the last T of L positions, keys and values [A/G, L, D]."""
    n_new, n_keys = q.shape[1], keys.shape[1]
    if n_new == 1:  # a group's heads become rows of one product: a third faster
        folded = q.view(1, keys.shape[0], -1, q.shape[2])
        y = F.scaled_dot_product_attention(folded, keys[None], values[None])
        return y.reshape(q.shape)
    seen = torch.ones(n_new, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_new)
    return F.scaled_dot_product_attention(
        q[None], keys[None], values[None], attn_mask=seen, enable_gqa=True
    )[0]  # [A, T, D]


def _attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every position sees itself and what stands before it."""
    v = v.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
