"""Stage 5: speech tokens to mel: conditioning, the DiT's inside, Euler steps, a whole stream.

In: tokens, prompt and noise. Out: what `Flow` makes of them in its four ways of being called, what
the DiT's submodules say in one call, and the mels the engine renders of a stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cosyvoice.config import FRAMES_PER_TOKEN, REFERENCE
from cosyvoice.engine.request import Request
from cosyvoice.models.attention import block_segments, rotate_first_head, rotation, segment_mask
from cosyvoice.models.flow import FlowPrompt, FlowState, Solver, cosine_times
from cosyvoice.parity.eavesdrop import listening, perform
from cosyvoice.parity.found import Computed, Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject
from cosyvoice.prompt import Prompt

QUERY = "transformer_blocks.{}.attn.to_q"  # what sets call block{}_q
TIME = "time_embed"
ROOT = ""  # the DiT itself
N_ROWS = 2  # of classifier-free guidance


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """Every part for which the set has an input."""
    case = Case.read(part, subject)
    yield Computed("rand_noise", subject.own_flow_noise[None, :, : case.n_noise])
    yield from _conditioning(case)
    yield from _masks(case)
    for kind, chunked in (("dit_full", False), ("dit_streaming", True)):
        if kind in part.groups:
            yield from _one_call(part, case, kind, chunked=chunked)
    for finalize in (True, False):
        for streaming in (False, True):
            yield from _mel(case, finalize=finalize, streaming=streaming)
    if "schedule" in part.groups:
        yield from _stream(part, subject)


@dataclass(frozen=True)
class Case:
    """The common input."""

    subject: Subject
    prompt: FlowPrompt
    tokens: list[int]
    n_noise: int

    @classmethod
    def read(cls, part: Part, subject: Subject) -> "Case":
        n_noise = part.tensor("rand_noise").shape[2]
        return cls(subject, _prompt(part, ""), part.ids("token"), n_noise)

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.tokens, *self.tokens]

    @property
    def n_final(self) -> int:
        """Tokens that are final while more may come."""
        return len(self.ids) - self.subject.config.flow.lookahead_tokens

    def start(self, solver: Solver, *, chunked: bool) -> FlowState:
        noise = self.subject.flow_noise
        return self.subject.flow.start(self.prompt, solver, noise, chunked=chunked)

    def mu(self, *, finalize: bool) -> Tensor:
        """The condition of all that can be evaluated: [T, M]."""
        stop = len(self.ids) if finalize else self.n_final
        return self.subject.flow.mu(self.ids, 0, stop, last=finalize)


def _prompt(part: Part, prefix: str) -> FlowPrompt:
    return FlowPrompt(
        tuple(part.ids(f"{prefix}prompt_token")),
        part.tensor(f"{prefix}prompt_feat")[0],
        part.tensor("embedding")[0],
    )


def _conditioning(case: Case) -> Iterator[Found]:
    flow = case.subject.flow
    yield Computed("spk", flow.speaker(case.prompt.embedding)[None])
    yield Computed("token_emb", flow.input_embedding(torch.tensor(case.ids))[None])
    for name, finalize in (("finalize", True), ("context", False)):
        mu = case.mu(finalize=finalize)[::FRAMES_PER_TOKEN]  # each row stands there twice
        yield Computed(f"pre_lookahead.{name}", mu[None])


def _masks(case: Case) -> Iterator[Found]:
    config = case.subject.config.flow
    segments = block_segments(0, len(case.ids) * FRAMES_PER_TOKEN, config.block_frames)
    yield Computed("streaming_mask", segment_mask(segments)[None])
    yield Computed("t_span", cosine_times(config.n_steps))


def _one_call(part: Part, case: Case, kind: str, *, chunked: bool) -> Iterator[Found]:
    """One step of the solver, at the recorded time, so that x is nothing but noise."""
    dit, wanted = case.subject.flow.dit, part.under(kind)
    queries = {f"block{i}_q": QUERY.format(i) for i in range(len(dit.transformer_blocks))}
    time = torch.tensor([float(part.whole.param(kind, "t"))] * N_ROWS)
    with listening(dit, [*wanted, *queries.values(), ROOT]) as heard:
        solver = Solver(time[:1], torch.ones(1), dit.modulation(time), cfg_rate=0.0)
        case.subject.flow.solve([case.start(solver, chunked=chunked)], [case.mu(finalize=True)])
    yield Computed(f"{kind}.out", heard.outputs.pop(ROOT).transpose(1, 2))  # [2, M, T]
    for path, output in heard.outputs.items():
        # The set has both rows of the time and of the rest only the conditional one.
        yield Computed(f"{kind}.{path}", output if path == TIME else output[:1])
    for name, path in queries.items():
        query = heard.outputs[path][:1]  # [1, T, H * C]
        yield Computed(f"{kind}.{name}", query)
        yield Computed(f"{kind}.{name}_rot", _rotated(case, query))


def _rotated(case: Case, query: Tensor) -> Tensor:
    config = case.subject.config.flow
    cos, sin = rotation(torch.arange(query.shape[1]), config.head_dim)
    heads = query.unflatten(-1, (config.n_heads, -1)).transpose(1, 2)  # [1, H, T, C]
    return rotate_first_head(heads, cos, sin).transpose(1, 2).flatten(-2)


def _mel(case: Case, *, finalize: bool, streaming: bool) -> Iterator[Found]:
    flow, name = case.subject.flow, f"finalize{finalize:d}_streaming{streaming:d}"
    solver = flow.solver()
    steps: list[Tensor] = []
    state = case.start(solver, chunked=streaming)
    [x] = flow.solve([state], [case.mu(finalize=finalize)], steps)  # [T, M]
    mel = x[len(case.prompt.mel) :]
    if finalize:  # then it is what `extend` is for
        mel = flow.extend(case.start(solver, chunked=streaming), case.tokens, last=True)
    yield Computed(f"mel.{name}", mel.T[None])
    yield Computed(f"euler_x.{name}", torch.stack([step.T for step in steps[:-1]]))
    yield Computed(f"euler_t.{name}", solver.times)


def _stream(part: Part, subject: Subject) -> Iterator[Found]:
    prompt = Prompt(_prompt(part, "schedule."))
    request = Request(prompt, tokens=tuple(part.ids("schedule.token")), streaming=True)
    performance = perform(subject.models, request, rules=REFERENCE)
    for i, mel in enumerate(performance.mels):
        yield Computed(f"schedule.mel_{i}", mel, is_piece=True)
