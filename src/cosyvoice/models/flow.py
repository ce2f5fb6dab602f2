"""The flow: speech tokens in, mel frames out, by ten Euler steps through the DiT.

In: a voice's part (tokens, mel, embedding), then generated tokens in any pieces. Out: mel [n, 80].
Symbols: P prompt tokens, T frames, M mel bins; 2 frames per token; row 0 of a batch is conditional,
row 1 unconditional (classifier-free guidance). It knows no text, no audio and no request.

The state law: however the tokens are cut, the concatenated mels of `extend` equal those of one
call. Under the block-causal mask every quantity of a finished block is final (docs/spec/flow.md 5),
so a block is evaluated once, as soon as its three look-ahead tokens are known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.config import FRAMES_HZ, FRAMES_PER_TOKEN, MAX_FLOW_FRAMES, FlowConfig
from cosyvoice.errors import BadRequest

from .attention import EXACT, AttentionForm, Segment, block_segments, full_segments, rotation
from .dit import DiT, Lane, Pass, StepModulation
from .flow_cache import KeptCache, NoCache, Slabs
from .layers import Projection

LOOKAHEAD_LEFT_TOKENS = 2  # reach of the second look-ahead convolution
LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class FlowPrompt:
    """The voice's part of the flow's input; all three may be empty but the embedding."""

    tokens: tuple[int, ...]  # P speech tokens
    mel: Tensor  # [Tm, 80], normally Tm = 2 P
    embedding: Tensor  # [192], not normalised

    @cached_property
    def key(self) -> str:
        """Equal for equal prompts."""
        parts = (torch.tensor(self.tokens).int(), self.mel, self.embedding)
        return sha256(b"|".join(part.cpu().numpy().tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Solver:
    """How velocities become a mel; the same for every request.

    Times, step widths, the DiT's modulation at each time, the guidance, the form of attention.
    """

    times: Tensor  # [n_steps], float32, accumulated as the reference accumulates them
    widths: Tensor  # [n_steps]
    modulation: StepModulation  # rows are steps
    cfg_rate: float
    form: AttentionForm = EXACT
    slabs: Slabs = field(default_factory=Slabs)  # where caches take their memory from

    @property
    def n_steps(self) -> int:
        return len(self.widths)

    def step(self, i: int) -> StepModulation:
        """The modulation of step i."""
        blocks, final = self.modulation
        return StepModulation(blocks[:, i : i + 1], final[i : i + 1])


@dataclass
class FlowState:
    """One utterance on its way through the flow.

    A step's cache holds keys and values, 2 * depth * 2 * D numbers a frame. Without it (`NoCache`)
    the step is computed anew from the x it had, 80 numbers a frame: slower, and just as exact.
    """

    solver: Solver
    noise: Tensor  # [M, 15000]: the initial x, by absolute frame
    ids: list[int]  # prompt tokens and all generated tokens so far
    n_prompt_tokens: int
    prompt_mel: Tensor  # [Tm, M]
    speaker: Tensor  # [M], projected
    chunked: bool  # block-causal and incremental, or full attention at the end
    caches: list[KeptCache | NoCache]  # one per Euler step
    past_x: list[list[Tensor]]  # per step, pieces [T, M] of the x it started from
    past_given: list[Tensor] = field(default_factory=list)  # pieces [2, T, 3M]
    n_tokens: int = 0  # evaluated

    @property
    def n_frames(self) -> int:
        return self.n_tokens * FRAMES_PER_TOKEN

    @property
    def n_bytes(self) -> int:
        """Of its own caches; a shared prefix is not counted."""
        return sum(cache.n_bytes for cache in self.kept)

    @property
    def n_prefix_bytes(self) -> int:
        return sum(cache.n_prefix_bytes for cache in self.kept)

    @property
    def kept(self) -> list[KeptCache]:
        return [cache for cache in self.caches if isinstance(cache, KeptCache)]

    def drop_step(self) -> None:
        """Free the cache of one more step, the last one kept; it will be computed anew."""
        for i, cache in reversed(list(enumerate(self.caches))):
            if isinstance(cache, KeptCache):
                self.caches[i] = NoCache()
                cache.free()
                return

    def free(self) -> None:
        """Give the memory of its caches back; the state must not be extended any more."""
        for cache in self.kept:
            cache.free()

    def segments(self, n_past: int, n_new: int, block: int) -> list[Segment]:
        if self.chunked:
            return block_segments(n_past, n_new, block)
        return full_segments(n_past, n_new)


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
        z = F.pad(u.transpose(1, 2), (0, self.n_right - n_right)).to(self.conv1.weight.dtype)
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

    def solver(
        self,
        n_steps: int | None = None,
        *,
        cfg_rate: float | None = None,
        form: AttentionForm = EXACT,
        slabs: Slabs | None = None,
    ) -> Solver:
        """The cosine schedule of the model, or of another length; make it once and share it."""
        times, widths = euler_times(cosine_times(n_steps or self.config.n_steps))
        modulation = self.dit.modulation(times.to(self.device))
        rate = self.config.cfg_rate if cfg_rate is None else cfg_rate
        return Solver(times, widths, modulation, rate, form, slabs or Slabs())

    def start(
        self, prompt: FlowPrompt, solver: Solver, noise: Tensor, *, chunked: bool
    ) -> FlowState:
        """A fresh state. noise: [M, 15000] on the flow's device."""
        return FlowState(
            solver=solver,
            noise=noise,
            ids=list(prompt.tokens),
            n_prompt_tokens=len(prompt.tokens),
            prompt_mel=prompt.mel.to(self.device),
            speaker=self.speaker(prompt.embedding.to(self.device)),
            chunked=chunked,
            caches=[self._cache(solver, chunked=chunked) for _ in range(solver.n_steps)],
            past_x=[[] for _ in range(solver.n_steps)],
        )

    def _cache(self, solver: Solver, *, chunked: bool) -> KeptCache | NoCache:
        if not chunked:
            return NoCache()
        return KeptCache(solver.slabs, self.config.depth, self.config.block_frames)

    def prefix(self, prompt: FlowPrompt, solver: Solver, noise: Tensor) -> FlowState:
        """The state of the voice's own blocks, the same for every stream with this voice.

        Only to be `fork`ed: its caches are shared and read-only.
        """
        state = self.start(prompt, solver, noise, chunked=True)
        self._advance([state], [self._final_tokens(state, last=False)], [False])
        state.caches = [cache.freeze() for cache in state.kept]
        return state

    def fork(self, prefix: FlowState) -> FlowState:
        """A stream that starts after the prefix."""
        return replace(
            prefix,
            ids=list(prefix.ids),
            caches=[cache.fork() for cache in prefix.kept],
            past_x=[list(pieces) for pieces in prefix.past_x],
            past_given=list(prefix.past_given),
        )

    def extend(self, state: FlowState, tokens: Sequence[int], last: bool) -> Tensor:
        """Mel [n, M] of all frames that became final through `tokens`, prompt left out.

        Raises BadRequest where prompt and speech outgrow the noise buffer (300 s).
        """
        return self.extend_all([state], [tokens], [last])[0]

    def extend_all(
        self,
        states: Sequence[FlowState],
        tokens: Sequence[Sequence[int]],
        lasts: Sequence[bool],
    ) -> list[Tensor]:
        """`extend` for several utterances in one pass; each gets what it would get alone."""
        stops = []
        for state, new, last in zip(states, tokens, lasts, strict=True):
            state.ids.extend(new)
            has_speech = len(state.ids) > state.n_prompt_tokens
            stops.append(self._final_tokens(state, last=last) if has_speech else state.n_tokens)
        return self._advance(states, stops, lasts)

    def _advance(
        self, states: Sequence[FlowState], stops: Sequence[int], lasts: Sequence[bool]
    ) -> list[Tensor]:
        """Evaluate each state up to token `stops`; mels without the frames of the prompts."""
        mels = [state.noise.new_zeros(0, self.config.n_mels) for state in states]
        moving = [i for i, state in enumerate(states) if stops[i] > state.n_tokens]
        mus = [self.mu(states[i].ids, states[i].n_tokens, stops[i], last=lasts[i]) for i in moving]
        for i, x in zip(moving, self.solve([states[i] for i in moving], mus), strict=True):
            state = states[i]
            mels[i] = x[max(0, len(state.prompt_mel) - state.n_frames) :]
            state.n_tokens = stops[i]
        return mels

    def _final_tokens(self, state: FlowState, *, last: bool) -> int:
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

    def solve(
        self,
        states: Sequence[FlowState],
        mus: Sequence[Tensor],
        trace: list[Tensor] | None = None,
    ) -> list[Tensor]:
        """Integrate the next frames of each state: mu [T, M] -> mel [T, M].

        `trace`, where given, collects all x [T, M] after each step (for parity).
        """
        if not states:
            return []
        xs = [self._noise(state, len(mu)) for state, mu in zip(states, mus, strict=True)]
        for state, mu in zip(states, mus, strict=True):
            state.past_given.append(self._given(state, mu))
        solver = states[0].solver
        widths = solver.widths.tolist()
        for i in range(solver.n_steps):
            for state, x in zip(states, xs, strict=True):
                state.past_x[i].append(x)
            velocities = self._velocities(states, i)
            xs = [x + widths[i] * v for x, v in zip(xs, velocities, strict=True)]
            if trace is not None:
                trace.append(torch.cat(xs))
        return xs

    def _velocities(self, states: Sequence[FlowState], step: int) -> list[Tensor]:
        """The guided velocities [T, M] of each state's new frames."""
        solver = states[0].solver
        lanes, frames, n_run = [], [], 0
        for state in states:
            inputs = _inputs(state, step)  # [2, T, 4M]
            lanes.append(self._lane(state, state.caches[step], n_run, inputs.shape[1]))
            frames.append(inputs)
            n_run += inputs.shape[1]
        v_cond, v_free = self.dit(
            torch.cat(frames, dim=1), solver.step(step), Pass(lanes, solver.form)
        )
        v = (1 + solver.cfg_rate) * v_cond - solver.cfg_rate * v_free  # [T, M]
        return [
            v[lane.stop - len(state.past_x[step][-1]) : lane.stop]
            for lane, state in zip(lanes, states, strict=True)
        ]

    def _lane(self, state: FlowState, cache: KeptCache | NoCache, start: int, n_run: int) -> Lane:
        n_all = sum(piece.shape[1] for piece in state.past_given)
        n_past = n_all - n_run  # frames that need not be run, because the cache knows them
        positions = torch.arange(n_past, n_all, device=self.device)
        cos, sin = rotation(positions, self.config.head_dim)
        segments = state.segments(n_past, n_run, self.config.block_frames)
        return Lane(start, start + n_run, cache, segments, cos, sin)

    def _noise(self, state: FlowState, n_new: int) -> Tensor:
        start, stop = state.n_frames, state.n_frames + n_new
        if stop > min(MAX_FLOW_FRAMES, state.noise.shape[1]):
            raise BadRequest(
                f"prompt and speech together exceed {MAX_FLOW_FRAMES // FRAMES_HZ} s in one "
                "sentence: split the text into shorter sentences"
            )
        return state.noise[:, start:stop].T.float()  # [T, M]

    def _given(self, state: FlowState, mu: Tensor) -> Tensor:
        """[cond; mu; spk] for both rows [2, T, 3M]; the unconditional row is zero."""
        cond = torch.zeros_like(mu)
        known = state.prompt_mel[state.n_frames : state.n_frames + len(mu)]
        cond[: len(known)] = known
        row = torch.cat([cond, mu, state.speaker.expand_as(mu)], dim=-1)
        return torch.stack([row, torch.zeros_like(row)])


def _inputs(state: FlowState, step: int) -> Tensor:
    """What the DiT is given: the new frames, or all where the step has no cache. [2, T, 4M]."""
    is_kept = isinstance(state.caches[step], KeptCache)
    n_pieces = 1 if is_kept else len(state.past_given)
    x = torch.cat(state.past_x[step][-n_pieces:])  # [T, M]
    given = torch.cat(state.past_given[-n_pieces:], dim=1)  # [2, T, 3M]
    return torch.cat([x.expand(2, -1, -1), given], dim=-1)
