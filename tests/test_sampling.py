"""Sampling: equal to a stable sort, alone as in a batch, distributed right, and as recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cosyvoice.config import LLMConfig, Sampling
from cosyvoice.engine.draws import BLOCK_STEPS, Draws
from cosyvoice.engine.script import NOTHING, Forbidden
from cosyvoice.models.sampling import (
    draw,
    fallback,
    forbidden_ids,
    log_probs,
    nucleus_of,
    recent_ids,
    repeats,
    sample,
)

PARAMS = Sampling()
ALMOST_ONE = 1 - 2.0**-53


def allow_all(logits):
    return torch.zeros_like(logits, dtype=torch.bool)


def random_batch(n_rows: int, n_ids: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n_rows, n_ids, generator=g)
    history = torch.randint(-1, n_ids // 4, (n_rows, PARAMS.window_tokens), generator=g)
    uniforms = torch.rand(n_rows, 2, generator=g, dtype=torch.float64)
    forbidden = torch.rand(n_rows, n_ids, generator=g) < 0.2
    return logits, history, uniforms, forbidden


def spec_ids(probs: torch.Tensor, params: Sampling) -> list[int]:
    """Section 5 read aloud: sort, stable and descending; keep until top_p is reached."""
    values, order = torch.sort(probs, stable=True, descending=True)
    kept, total = [], 0.0
    for p, i in zip(values.tolist(), order.tolist(), strict=True):
        if kept and (total >= params.top_p or len(kept) == params.top_k):
            break
        kept.append(i)
        total += p
    return kept


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.sampled_from([-9.0, -1.0, -0.5, 0.0, 0.5, 2.0, 4.0]), min_size=3),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.999]),
    top_k=st.integers(1, 30),
)
def test_nucleus_is_that_of_a_stable_sort_with_ties(scores, top_p, top_k):
    logp = torch.tensor([scores]).log_softmax(-1)
    params = Sampling(top_p=top_p, top_k=top_k)
    found = nucleus_of(logp, params)
    assert found.ids[found.keep].tolist() == spec_ids(logp.softmax(-1)[0], params)
    assert torch.equal(found.probs, logp.softmax(-1).gather(1, found.ids))


def test_key_order_is_stable_order_over_the_whole_range_of_floats():
    g = torch.Generator().manual_seed(5)
    logp = (40 * torch.randn(64, 701, generator=g)).log_softmax(-1)  # many underflow to zero
    logp[:, ::3] = logp[:, 1:2]
    probs = logp.softmax(-1)
    order = torch.sort(probs, dim=-1, stable=True, descending=True).indices
    assert torch.equal(nucleus_of(logp, Sampling(top_k=701)).ids, order)


def test_a_row_draws_the_same_alone_as_in_a_batch():
    logits, history, uniforms, forbidden = random_batch(32, 300)
    together = sample(logits, history, uniforms=uniforms, forbidden=forbidden, params=PARAMS)
    for b in range(32):
        row = slice(b, b + 1)
        alone = sample(
            logits[row],
            history[row],
            uniforms=uniforms[row],
            forbidden=forbidden[row],
            params=PARAMS,
        )
        assert alone == together[b]


def test_forbidden_ids_are_never_drawn_not_even_after_a_repetition():
    n_ids, n_rows = 40, 2000
    logits, _, uniforms, _ = random_batch(n_rows, n_ids, seed=1)
    logits[:, 30:] += 8
    forbidden = torch.zeros(n_rows, n_ids, dtype=torch.bool)
    forbidden[:, 30:] = True
    history = torch.arange(30).repeat(n_rows, 1)  # everything repeats
    params = Sampling(window_tokens=30, max_share=1 / 30)
    ids = sample(logits, history, uniforms=uniforms, forbidden=forbidden, params=params)
    assert ids.max() < 30


@pytest.mark.parametrize("u", [0.0, 0.5, ALMOST_ONE, 1.0])
def test_weight_zero_is_never_drawn(u):
    weights = torch.tensor([[0, 0, 0.3, 0, 0.7, 0], [0, 1e-30, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1e-8]])
    columns = draw(weights.float(), torch.full((3,), u, dtype=torch.float64))
    assert (weights.gather(1, columns[:, None]) > 0).all()
    last = [4, 1, 5] if u >= ALMOST_ONE else None
    assert last is None or columns.tolist() == last
    assert u > 0 or columns.tolist() == [2, 1, 0]


def test_a_certain_token_that_repeats_is_replaced_by_the_likeliest_rest():
    logits = torch.full((1, 5), -300.0)
    logits[0, 1], logits[0, 3] = 200.0, 0.0  # all but 1 underflow in the first softmax
    history = recent_ids([[1]], PARAMS)
    ids = sample(
        logits,
        history,
        uniforms=torch.tensor([[0.5, ALMOST_ONE]], dtype=torch.float64),
        forbidden=allow_all(logits),
        params=PARAMS,
    )
    assert ids.tolist() == [3]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    seen = expected > 5
    assert counts[expected == 0].sum() == 0
    return float((((counts - expected) ** 2)[seen] / expected[seen]).sum()), int(seen.sum()) - 1


@pytest.mark.parametrize("is_repeated", [False, True])
def test_draws_are_distributed_as_specified(is_repeated):
    n, g = 40_000, torch.Generator().manual_seed(2)
    logits = torch.randn(1, 60, generator=g)
    forbidden = torch.zeros(1, 60, dtype=torch.bool)
    forbidden[0, 50:] = True
    logp = log_probs(logits, forbidden)
    found = nucleus_of(logp, PARAMS)
    first = torch.zeros(60)
    first[found.ids[found.keep]] = found.probs[found.keep] / found.probs[found.keep].sum()
    expected = first
    if is_repeated:  # the top five repeat
        history = recent_ids([found.ids[0, :5].tolist()], PARAMS)
        expected = first.clone()
        for c in found.ids[0, :5].tolist():
            expected[c] -= first[c]
            expected += first[c] * fallback(logp, torch.tensor([c]))[0]
    else:
        history = recent_ids([[]], PARAMS)
    draws = Draws(seed=7, sentence=0)
    ids = sample(
        logits.expand(n, -1),
        history.expand(n, -1),
        uniforms=torch.tensor([draws.at(i) for i in range(n)], dtype=torch.float64),
        forbidden=forbidden.expand(n, -1),
        params=PARAMS,
    )
    value, freedom = chi_square(np.bincount(ids, minlength=60), n * expected.double().numpy())
    assert value < freedom + 4 * (2 * freedom) ** 0.5


def test_spans_forbid_what_the_three_rules_say():
    config = LLMConfig(n_speech_tokens=10, n_speech_rows=20)
    spans = [NOTHING, Forbidden(10, 20), Forbidden(10, 20, config.fill), Forbidden(10, 11)]
    mask = forbidden_ids(torch.tensor(spans), config.n_speech_rows)
    found = [row.nonzero().flatten().tolist() for row in mask]
    assert found == [[], list(range(10, 20)), [10, 11, 12, *range(14, 20)], [10]]


def test_recent_ids_are_the_last_ones_padded():
    params = Sampling(window_tokens=3)
    rows = recent_ids([[], [5], [1, 2, 3, 4]], params)
    assert rows.tolist() == [[-1, -1, -1], [-1, -1, 5], [2, 3, 4]]


# The stream of random numbers.


def test_draws_do_not_depend_on_the_order_of_asking():
    steps = list(range(3 * BLOCK_STEPS))
    forwards = [Draws(1, 2, 3).at(i) for i in steps]
    stream = Draws(1, 2, 3)
    assert [stream.at(i) for i in reversed(steps)] == forwards[::-1]
    assert len(set(forwards)) == len(steps)
    assert all(0 <= u < 1 for pair in forwards for u in pair)


def test_every_part_of_the_key_makes_another_stream():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0), (-2, 0, 0)]
    assert len({Draws(*key).at(0) for key in keys}) == len(keys)


def test_the_stream_is_the_same_next_year():
    assert Draws(seed=1234, sentence=1).at(70) == (0.300965472305767, 0.5335105173955047)


# The recorded cases.

CASES = range(12)


def recorded(golden: Path, i: int):
    tensors = load_file(golden / "4_sampling.safetensors")
    meta = json.loads((golden / "4_sampling.json").read_text())
    about = json.loads((golden / "goldens.json").read_text())["tensors"]
    suffix = f"_{i:02d}"
    names = [n.split(":")[1] for n in about if n.startswith("4_sampling") and suffix in n]
    case = {name.replace(suffix, ""): tensors[name] for name in names}
    bounds = {n.replace(suffix, ""): about[f"4_sampling.safetensors:{n}"] for n in names}
    return case, meta[i], {name: row["tolerance"] for name, row in bounds.items()}


def test_there_are_no_other_cases(golden: Path):
    assert len(json.loads((golden / "4_sampling.json").read_text())) == len(CASES)


@pytest.mark.parametrize("i", CASES)
def test_sampling_as_recorded(golden: Path, i: int):
    case, meta, bound = recorded(golden, i)
    logits = case["logits"][None]
    logp = log_probs(logits, allow_all(logits))
    found = nucleus_of(logp, PARAMS)
    ids, probs = found.ids[found.keep], found.probs[found.keep]
    again = repeats(found.ids, recent_ids([case["history"].tolist()], PARAMS), PARAMS)
    ours = {
        "cand_ids": ids,
        "cand_prob": probs,
        "cand_prob_norm": probs / probs.sum(),
        "logp_sel": logp[0, ids],
        "repeat": again[found.keep],
        "fallback": fallback(logp, ids[meta["fallback_index"]][None])[0],
    }
    assert set(ours) == {name for name, t in bound.items() if t != "input"}
    assert bool(ours["repeat"].any()) == meta["any_trigger"]
    for name, value in ours.items():
        if bound[name] == "exact":
            assert value.tolist() == case[name].tolist(), name
        else:
            torch.testing.assert_close(value, case[name], rtol=0, atol=bound[name])
