"""The flow: equal to the reference's tensors, and whole whatever the cuts."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice.config import FlowConfig
from cosyvoice.errors import BadRequest
from cosyvoice.models.attention import (
    Attend,
    attend_by_products,
    attend_fused,
    block_segments,
    segment_mask,
)
from cosyvoice.models.flow import Flow, FlowPrompt, FlowState

TINY = FlowConfig(n_speech_tokens=40, lookahead_channels=8, dim=32, depth=2, n_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def tiny() -> Flow:
    torch.manual_seed(0)
    flow = Flow(TINY).eval()
    for parameter in flow.parameters():  # default initialisers leave the gates almost shut
        torch.nn.init.normal_(parameter, std=0.15)
    return flow


def start(flow: Flow, n_prompt: int, *, chunked: bool, seed: int = 0) -> FlowState:
    draw = torch.Generator().manual_seed(seed)
    prompt = FlowPrompt(
        tokens=tuple(torch.randint(0, 40, (n_prompt,), generator=draw).tolist()),
        mel=torch.randn(2 * n_prompt, 80, generator=draw),
        embedding=torch.randn(192, generator=draw),
    )
    noise = torch.randn(80, 600, generator=draw)
    return flow.start(prompt, flow.solver(), noise, chunked=chunked)


def speak(flow: Flow, state: FlowState, pieces: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        mels = [flow.extend(state, piece, i + 1 == len(pieces)) for i, piece in enumerate(pieces)]
    return torch.cat(mels)


def cut(tokens: list[int], rng: random.Random) -> list[list[int]]:
    marks = sorted(rng.randint(0, len(tokens)) for _ in range(rng.randint(0, 6)))
    edges = [0, *marks, len(tokens)]
    return [tokens[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("n_prompt", [0, 1, 13, 25, 30])
def test_any_cut_gives_the_mel_of_one_call(tiny: Flow, n_prompt: int, chunked: bool) -> None:
    rng = random.Random(n_prompt)
    tokens = [rng.randrange(40) for _ in range(83)]
    whole = speak(tiny, start(tiny, n_prompt, chunked=chunked), [tokens])
    assert whole.shape == (2 * len(tokens), 80)
    for _ in range(4):
        pieces = speak(tiny, start(tiny, n_prompt, chunked=chunked), cut(tokens, rng))
        assert (pieces - whole).abs().max() < 1e-4


def test_chunked_frames_do_not_depend_on_later_tokens(tiny: Flow) -> None:
    tokens = list(range(40)) * 2
    early = speak(tiny, start(tiny, 10, chunked=True), [tokens[:43], []])
    late = speak(tiny, start(tiny, 10, chunked=True), [tokens[:40], tokens[40:]])
    assert (early[:80] - late[:80]).abs().max() < 1e-4


def test_chunks_come_as_soon_as_their_look_ahead_is_known(tiny: Flow) -> None:
    state = start(tiny, 10, chunked=True)
    with torch.inference_mode():
        assert len(tiny.extend(state, [1] * 17, last=False)) == 0
        assert len(tiny.extend(state, [1], last=False)) == 30
        assert len(tiny.extend(state, [1] * 25, last=False)) == 50
        assert len(tiny.extend(state, [], last=True)) == 6


def test_prompt_mel_of_odd_length_is_cut_by_its_own_length(tiny: Flow) -> None:
    prompt = FlowPrompt(tuple(range(10)), torch.randn(21, 80), torch.randn(192))
    noise = torch.randn(80, 600)
    state = tiny.start(prompt, tiny.solver(), noise, chunked=False)
    assert speak(tiny, state, [[1] * 9]).shape == (2 * 19 - 21, 80)


def test_no_token_at_all_is_silence_not_a_crash(tiny: Flow) -> None:
    assert speak(tiny, start(tiny, 10, chunked=True), [[]]).shape == (0, 80)


def test_longer_than_the_noise_buffer_is_refused(tiny: Flow) -> None:
    with pytest.raises(BadRequest, match="split the text"):
        speak(tiny, start(tiny, 10, chunked=True), [[1] * 300])


def test_batch_rows_do_not_mix(tiny: Flow) -> None:
    """Two utterances interleaved on one network are each what they are alone."""
    tokens = list(range(40))
    alone = [speak(tiny, start(tiny, 5, chunked=True, seed=s), [tokens]) for s in (1, 2)]
    states = [start(tiny, 5, chunked=True, seed=s) for s in (1, 2)]
    mels: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        for at in range(0, 40, 10):
            for row, state in enumerate(states):
                mels[row].append(tiny.extend(state, tokens[at : at + 10], at == 30))
    for row in range(2):
        assert (torch.cat(mels[row]) - alone[row]).abs().max() < 1e-4


def test_training_reaches_every_parameter(tiny: Flow) -> None:
    state = start(tiny, 5, chunked=False)
    tiny.extend(state, list(range(40)), last=True).square().mean().backward()
    untouched = [name for name, p in tiny.named_parameters() if p.grad is None]
    tiny.zero_grad()
    assert not untouched


def test_mask_is_the_goldens(golden: Path) -> None:
    mask = load_file(golden / "5_flow.safetensors")["streaming_mask"][0]
    assert torch.equal(segment_mask(block_segments(0, len(mask), 50)), mask)


@pytest.fixture(scope="module")
def golden_flow(golden: Path) -> Flow:
    config = FlowConfig(lookahead_channels=40, dim=64, depth=2, n_heads=2, head_dim=32)
    flow = Flow(config).eval()
    state = torch.load(golden / "model/flow.pt", weights_only=True)
    state.pop("decoder.estimator.rotary_embed.inv_freq")
    flow.load_state_dict(state)
    return flow


@pytest.mark.parametrize("streaming", [0, 1])
def test_mel_is_the_goldens(golden: Path, golden_flow: Flow, streaming: int) -> None:
    want = load_file(golden / "5_flow.safetensors")
    prompt = FlowPrompt(
        tuple(want["prompt_token"][0].tolist()), want["prompt_feat"][0], want["embedding"][0]
    )
    solver = golden_flow.solver()
    state = golden_flow.start(prompt, solver, want["rand_noise"][0], chunked=bool(streaming))
    mel = speak(golden_flow, state, [want["token"][0].tolist()])
    assert (mel.T[None] - want[f"mel.finalize1_streaming{streaming}"]).abs().max() < 2e-4


# States that share, batch and forget.


def prompt_of(n_prompt: int, seed: int = 0) -> FlowPrompt:
    draw = torch.Generator().manual_seed(seed)
    return FlowPrompt(
        tokens=tuple(torch.randint(0, 40, (n_prompt,), generator=draw).tolist()),
        mel=torch.randn(2 * n_prompt, 80, generator=draw),
        embedding=torch.randn(192, generator=draw),
    )


@pytest.mark.parametrize("n_prompt", [0, 10, 27, 28, 60])
def test_a_shared_prefix_changes_nothing(tiny: Flow, n_prompt: int) -> None:
    prompt, noise, solver = prompt_of(n_prompt), torch.randn(80, 600), tiny.solver()
    tokens = [[i % 40 for i in range(63)], [(7 * i) % 40 for i in range(50)]]
    with torch.inference_mode():
        prefix = tiny.prefix(prompt, solver, noise)
        assert prefix.n_tokens == max(0, (n_prompt - 3) // 25 * 25)
        forks = [tiny.fork(prefix), tiny.fork(prefix)]
    for fork, pieces in zip(forks, tokens, strict=True):  # one after the other, from one prefix
        alone = speak(tiny, tiny.start(prompt, solver, noise, chunked=True), [pieces])
        assert (speak(tiny, fork, [pieces[:31], pieces[31:]]) - alone).abs().max() < 1e-4
    assert prefix.n_tokens == max(0, (n_prompt - 3) // 25 * 25)
    assert prefix.n_bytes == 0  # it grew nothing of its own


def test_one_pass_for_several_streams_gives_each_its_own(tiny: Flow) -> None:
    sizes = [(0, 63), (10, 41), (30, 90)]
    tokens = [[(i * (row + 1)) % 40 for i in range(n)] for row, (_, n) in enumerate(sizes)]
    alone = [
        speak(tiny, start(tiny, n_prompt, chunked=row != 1, seed=row), [tokens[row]])
        for row, (n_prompt, _) in enumerate(sizes)
    ]
    states = [start(tiny, n, chunked=row != 1, seed=row) for row, (n, _) in enumerate(sizes)]
    solver = tiny.solver()
    for state in states:
        state.solver = solver
    with torch.inference_mode():
        first = tiny.extend_all(states, [t[:35] for t in tokens], [False] * 3)
        last = tiny.extend_all(states, [t[35:] for t in tokens], [True] * 3)
    for row in range(3):
        assert (torch.cat([first[row], last[row]]) - alone[row]).abs().max() < 1e-4


@pytest.mark.parametrize("n_dropped", [1, 4, 10])
def test_steps_computed_anew_give_the_same_mel(tiny: Flow, n_dropped: int) -> None:
    tokens = [[i % 40 for i in range(n)] for n in (43, 25, 25, 17)]
    whole = speak(tiny, start(tiny, 10, chunked=True), tokens)
    state = start(tiny, 10, chunked=True)
    mels = []
    with torch.inference_mode():
        for i, piece in enumerate(tokens):
            mels.append(tiny.extend(state, piece, last=i == 3))
            if i == 1:
                n_bytes = state.n_bytes
                for _ in range(n_dropped):
                    state.drop_step()
                assert state.n_bytes == pytest.approx(n_bytes * (1 - n_dropped / 10))
    assert (torch.cat(mels) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("attend", [attend_fused, attend_by_products])
def test_forms_of_attention_agree_and_take_parts(attend: Attend) -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 8)
    want = ((q @ k.mT / 8**0.5).softmax(-1)) @ v
    for cut in (0, 4):
        keys = [k] if not cut else [k[:, :, :cut], k[:, :, cut:]]
        values = [v] if not cut else [v[:, :, :cut], v[:, :, cut:]]
        torch.testing.assert_close(attend(q, keys, values), want)


def test_fewer_steps_and_no_guidance_are_another_mel(tiny: Flow) -> None:
    tokens, prompt, noise = list(range(30)), prompt_of(5), torch.randn(80, 600)
    usual, quick, free = (
        speak(tiny, tiny.start(prompt, solver, noise, chunked=True), [tokens])
        for solver in (tiny.solver(), tiny.solver(5), tiny.solver(cfg_rate=0.0))
    )
    assert usual.shape == quick.shape == free.shape
    assert not torch.allclose(usual, quick)
    assert not torch.allclose(usual, free)
