"""The flow: speech tokens in, mel frames out, by ten Euler steps through the DiT.

In: a voice's part (tokens, mel, embedding), then generated tokens in any pieces. Out: mel [n, 80].
Symbols: P prompt tokens, T frames, M mel bins; 2 frames per token; row 0 of a batch is conditional,
row 1 unconditional (classifier-free guidance). It knows no text, no audio and no request.

The state law: however the tokens are cut, the concatenated mels of `extend` equal those of one
call. Under the block-causal mask every quantity of a completed block is final (spec/flow.md 5),
so a block is evaluated once, as soon as its three look-ahead tokens are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import FRAMES_PER_TOKEN, MAX_FLOW_FRAMES, FlowConfig
from cosyvoice.errors import BadRequest

from .dit import (
    DiT,
    KeptCache,
    NoCache,
    Past,
    Segment,
    StepCache,
    StepModulation,
    block_segments,
    full_segments,
    rotation,
)
from .layers import Projection

LOOKAHEAD_LEFT_TOKENS = 2  # reach of the second look-ahead convolution
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class FlowPrompt:
    """The voice's part of the flow's input; all three may be empty but the embedding."""

    tokens: tuple[int, ...]  # P speech tokens
    mel: Tensor  # [Tm, 80], normally Tm = 2 P
    embedding: Tensor  # [192], not normalised


@dataclass(frozen=True)
class EulerSchedule:
    """Times, step widths and the DiT's modulation at each time; the same for every request."""

    times: Tensor  # [n_steps], float32, accumulated as the solver accumulates them
    widths: Tensor  # [n_steps]
    modulation: StepModulation  # rows are steps

    @property
    def n_steps(self) -> int:
        return len(self.widths)

    def step(self, i: int) -> StepModulation:
        blocks, final = self.modulation
        return StepModulation(blocks[:, i : i + 1], final[i : i + 1])


@dataclass
class FlowState:
    """One utterance on its way through the flow."""

    schedule: EulerSchedule
    noise: Tensor  # [M, 15000]: the initial x, by absolute frame
    ids: list[int]  # prompt tokens and all generated tokens so far
    n_prompt_tokens: int
    prompt_mel: Tensor  # [Tm, M]
    speaker: Tensor  # [M], projected
    chunked: bool  # block-causal and incremental, or full attention at the end
    attention_dtype: torch.dtype
    caches: list[StepCache] = field(default_factory=list)  # one per Euler step
    n_tokens: int = 0  # evaluated

    @property
    def n_frames(self) -> int:
        return self.n_tokens * FRAMES_PER_TOKEN

    def segments(self, n_new: int, block: int) -> list[Segment]:
        if self.chunked:
            return block_segments(self.n_frames, n_new, block)
        return full_segments(self.n_frames, n_new)


def cosine_times(n_steps: int) -> Tensor:
    """1 - cos(pi / 2 * k / n) for k = 0..n, float32 [n + 1]."""
    return 1 - torch.cos(torch.linspace(0, 1, n_steps + 1) * 0.5 * torch.pi)


def euler_times(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Times [n] and widths [n] as the reference's solver accumulates them, in float32."""
    t, width = grid[0], grid[1] - grid[0]
    times, widths = [], []
    for k in range(1, len(grid)):
        times.append(t)
        widths.append(width)
        t = t + width
        if k + 1 < len(grid):
            width = grid[k + 1] - t
    return torch.stack(times), torch.stack(widths)


class LookAhead(nn.Module):
    """Each token's embedding, informed by the three tokens after it."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.n_right = config.lookahead_tokens
        self.conv1 = nn.Conv1d(config.n_mels, config.lookahead_channels, self.n_right + 1)
        self.conv2 = nn.Conv1d(config.lookahead_channels, config.n_mels, LOOKAHEAD_LEFT_TOKENS + 1)

    def forward(self, u: Tensor, *, n_left: int, n_right: int) -> Tensor:
        """u [B, n, M] -> [B, n - n_left - n_right, M].

        The first n_left and last n_right tokens are context only; what is missing of either is
        zero: on the left in the hidden space, on the right in the embeddings.
        """
        z = F.pad(u.transpose(1, 2), (0, self.n_right - n_right))
        z = F.leaky_relu(self.conv1(z), LEAKY_SLOPE)
        z = self.conv2(F.pad(z, (LOOKAHEAD_LEFT_TOKENS - n_left, 0)))
        return z.transpose(1, 2) + u[:, n_left : u.shape[1] - n_right]


class Flow(nn.Module):
    """Conditioning, solver and DiT. Names follow the published `flow.pt`."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.input_embedding = nn.Embedding(config.n_speech_tokens, config.n_mels)
        self.spk_embed_affine_layer = Projection(config.embedding_size, config.n_mels)
        self.pre_lookahead_layer = LookAhead(config)
        self.decoder = nn.ModuleDict({"estimator": DiT(config)})

    @property
    def dit(self) -> DiT:
        dit = self.decoder["estimator"]
        assert isinstance(dit, DiT)
        return dit

    @property
    def device(self) -> torch.device:
        return self.input_embedding.weight.device

    def schedule(self, n_steps: int | None = None) -> EulerSchedule:
        """The cosine schedule; compute it once and share it."""
        times, widths = euler_times(cosine_times(n_steps or self.config.n_steps))
        return EulerSchedule(times, widths, self.dit.modulation(times.to(self.device)))

    def start(
        self, prompt: FlowPrompt, schedule: EulerSchedule, noise: Tensor, *, chunked: bool
    ) -> FlowState:
        """A fresh state. noise: [M, 15000] on the flow's device."""
        state = FlowState(
            schedule=schedule,
            noise=noise,
            ids=list(prompt.tokens),
            n_prompt_tokens=len(prompt.tokens),
            prompt_mel=prompt.mel.to(self.device),
            speaker=self.speaker(prompt.embedding.to(self.device)),
            chunked=chunked,
            # Attention of few queries is slow in 16 bits on a CPU, so its cache is float32 there.
            attention_dtype=self.dtype if self.device.type == "cuda" else torch.float32,
        )
        new_cache = KeptCache if chunked else NoCache
        state.caches = [new_cache() for _ in range(schedule.n_steps)]
        return state

    @property
    def dtype(self) -> torch.dtype:
        return self.input_embedding.weight.dtype

    def extend(self, state: FlowState, tokens: Sequence[int], last: bool) -> Tensor:
        """Mel [n, M] of all frames that became final through `tokens`, prompt left out.

        Raises BadRequest where prompt and speech outgrow the noise buffer (300 s).
        """
        state.ids.extend(tokens)
        stop = self._final_tokens(state, last)
        if stop <= state.n_tokens or len(state.ids) == state.n_prompt_tokens:
            return state.noise.new_zeros(0, self.config.n_mels)
        mu = self.mu(state.ids, state.n_tokens, stop, last=last)
        start_frame = state.n_frames
        x = self.solve(state, mu)
        state.n_tokens = stop
        n_skip = max(0, len(state.prompt_mel) - start_frame)
        return x[n_skip:]

    def _final_tokens(self, state: FlowState, last: bool) -> int:
        """How many tokens, from the start of the prompt, can be evaluated for good."""
        if last:
            return len(state.ids)
        if not state.chunked:
            return state.n_tokens
        block = self.config.block_tokens
        n_known = len(state.ids) - self.config.lookahead_tokens
        return max(state.n_tokens, block * (n_known // block))

    def speaker(self, embedding: Tensor) -> Tensor:
        """Speaker embedding [192] -> [M]: made unit length, then projected."""
        unit = F.normalize(embedding.float(), dim=-1, eps=1e-12)
        return self.spk_embed_affine_layer(unit).float()

    def mu(self, ids: Sequence[int], start: int, stop: int, *, last: bool) -> Tensor:
        """The condition [2 * (stop - start), M] of tokens start..stop; look-ahead from the rest."""
        n_left = min(start, LOOKAHEAD_LEFT_TOKENS)
        n_right = 0 if last else self.config.lookahead_tokens
        around = torch.tensor(ids[start - n_left : stop + n_right], device=self.device)
        u = self.input_embedding(around.clamp(min=0))[None]  # [1, n, M]
        m = self.pre_lookahead_layer(u, n_left=n_left, n_right=n_right)
        return m[0].float().repeat_interleave(FRAMES_PER_TOKEN, dim=0)

    def solve(self, state: FlowState, mu: Tensor, trace: list[Tensor] | None = None) -> Tensor:
        """Integrate the next len(mu) frames: mu [T, M] -> mel [T, M].

        `trace`, where given, collects x after each step (for parity).
        """
        start, stop = state.n_frames, state.n_frames + len(mu)
        if stop > min(MAX_FLOW_FRAMES, state.noise.shape[1]):
            raise BadRequest(
                f"prompt and speech together exceed {MAX_FLOW_FRAMES // 50} s in one sentence: "
                "split the text into shorter sentences"
            )
        x = state.noise[:, start:stop].T.float()  # [T, M]
        given = self._given(state, mu, start, stop)  # [2, T, 3M]
        segments = state.segments(len(mu), self.config.block_frames)
        positions = torch.arange(start, stop, device=mu.device)
        cos, sin = rotation(positions, self.config.head_dim)
        widths = state.schedule.widths.tolist()
        for i, cache in enumerate(state.caches):
            past = Past(cache, segments, cos, sin, state.attention_dtype)
            frames = torch.cat([x.expand(2, -1, -1), given], dim=-1)  # [2, T, 4M]
            v_cond, v_free = self.dit(frames, state.schedule.step(i), past)
            rate = self.config.cfg_rate
            x = x + widths[i] * ((1 + rate) * v_cond - rate * v_free)
            if trace is not None:
                trace.append(x)
        return x

    def _given(self, state: FlowState, mu: Tensor, start: int, stop: int) -> Tensor:
        """[cond; mu; spk] for both rows [2, T, 3M]; the unconditional row is zero."""
        cond = torch.zeros_like(mu)
        known = state.prompt_mel[start:stop]
        cond[: len(known)] = known
        row = torch.cat([cond, mu, state.speaker.expand_as(mu)], dim=-1)
        return torch.stack([row, torch.zeros_like(row)])
