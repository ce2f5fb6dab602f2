"""The LLM: batched equals alone, pieces equal the whole, slots are private, and as recorded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.config import LLMConfig
from cosyvoice.engine.script import ReferenceInterleaved, plain_items, split_head
from cosyvoice.errors import BadRequest
from cosyvoice.models.checkpoint import load_llm
from cosyvoice.models.llm import KVSlots, PaddedStep, SpeechLM
from cosyvoice.models.model_config import read_config

CONFIG = LLMConfig(
    hidden_size=48,
    intermediate_size=80,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    text_vocab_size=50,
    n_speech_tokens=40,
    n_speech_rows=60,
)
CLOSE = {"rtol": 0, "atol": 1e-5}


class PaddedSlots(KVSlots):
    """The cache as a GPU has it, on the CPU."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.k.zero_()
        self.v.zero_()
        self._on_cpu = False


def poisoned(config: LLMConfig, n_slots: int, max_positions: int) -> KVSlots:
    """Slots whose memory is worth nothing before it is written."""
    slots = KVSlots(config, n_slots, max_positions, device="cpu", dtype=torch.float32)
    slots.k.fill_(torch.nan)
    slots.v.fill_(torch.nan)
    return slots


def padded(config: LLMConfig, n_slots: int, max_positions: int) -> KVSlots:
    return PaddedSlots(config, n_slots, max_positions, device="cpu", dtype=torch.float32)


def slots(config: LLMConfig, n_slots: int, max_positions: int) -> KVSlots:
    """As the engine makes them on a CPU."""
    return KVSlots(config, n_slots, max_positions, device="cpu", dtype=torch.float32)


MAKERS = [poisoned, padded]


@pytest.fixture(scope="module")
def lm() -> SpeechLM:
    torch.manual_seed(0)
    return SpeechLM(CONFIG).eval()


def vectors(n_rows: int, n: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, n, CONFIG.hidden_size, generator=g)


def alone(lm: SpeechLM, x: torch.Tensor) -> torch.Tensor:
    """Hidden states of one sequence [T, H] in a cache of its own."""
    cache = poisoned(CONFIG, 1, x.shape[0])
    return lm(x[None], cache, [cache.take()])[0]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("sizes", [[1] * 30, [29, 1], [7, 1, 1, 13, 8], [30]])
def test_pieces_equal_the_whole(lm: SpeechLM, maker, sizes):
    x = vectors(1, 30)
    cache = maker(CONFIG, 2, 30)
    slot = cache.take()
    pieces = [lm(piece, cache, [slot]) for piece in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1)[0], alone(lm, x[0]), **CLOSE)


@pytest.mark.parametrize("maker", [slots, padded])
def test_batched_equals_alone_whatever_the_rows_hold_already(lm: SpeechLM, maker):
    n_before, n_after = [5, 19, 1, 11], 6
    rows = [vectors(1, n + n_after, seed=n) for n in n_before]
    cache = maker(CONFIG, 5, 40)
    slots = [cache.take() for _ in rows]
    for x, n, slot in zip(rows, n_before, slots, strict=True):
        lm(x[:, :n], cache, [slot])
    found = []
    for i in range(n_after):
        x = torch.cat([row[:, n + i : n + i + 1] for row, n in zip(rows, n_before, strict=True)])
        found.append(lm(x, cache, slots))
    found = torch.cat(found, 1)  # [B, n_after, H]
    for row, n, ours in zip(rows, n_before, found, strict=True):
        expected = alone(lm, row[0])[n:]
        torch.testing.assert_close(ours, expected, **CLOSE)
        assert torch.equal(lm.logits(ours).argmax(-1), lm.logits(expected).argmax(-1))


@pytest.mark.parametrize("maker", MAKERS)
def test_several_positions_of_several_rows_at_once(lm: SpeechLM, maker):
    first, second = vectors(1, 9, seed=3), vectors(1, 13, seed=4)
    cache = maker(CONFIG, 2, 16)
    a, b = cache.take(), cache.take()
    lm(first[:, :4], cache, [a])
    lm(second[:, :8], cache, [b])
    found = lm(torch.cat([second[:, 8:], first[:, 4:]]), cache, [b, a])
    torch.testing.assert_close(found[0], alone(lm, second[0])[8:], **CLOSE)
    torch.testing.assert_close(found[1], alone(lm, first[0])[4:], **CLOSE)
    assert [cache.lengths[a], cache.lengths[b]] == [9, 13]


@pytest.mark.parametrize("maker", MAKERS)
def test_a_released_slot_leaves_no_trace(lm: SpeechLM, maker):
    x = vectors(1, 10)
    cache = maker(CONFIG, 1, 32)
    lm(vectors(1, 32, seed=9), cache, [cache.take()])
    cache.release(0)
    assert cache.n_free == 1
    slot = cache.take()
    assert cache.lengths[slot] == 0
    torch.testing.assert_close(lm(x, cache, [slot])[0], alone(lm, x[0]), **CLOSE)


def test_other_slots_are_not_touched(lm: SpeechLM):
    cache = poisoned(CONFIG, 3, 8)
    slots = [cache.take() for _ in range(3)]
    lm(vectors(1, 8), cache, [slots[1]])
    for slot in (slots[0], slots[2]):
        assert cache.k[:, slot].isnan().all()
        assert cache.v[:, slot].isnan().all()


def test_a_full_slot_is_refused_and_the_cache_stays_as_it_was(lm: SpeechLM):
    cache = poisoned(CONFIG, 2, 8)
    slots = [cache.take(), cache.take()]
    lm(vectors(1, 8), cache, slots[:1])
    with pytest.raises(BadRequest, match="max_positions"):
        lm(vectors(2, 1), cache, slots)
    assert [cache.lengths[slot] for slot in slots] == [8, 0]


def test_slots_are_taken_and_given_back(lm: SpeechLM):
    cache = poisoned(CONFIG, 3, 4)
    taken = {cache.take() for _ in range(3)}
    assert taken == {0, 1, 2}
    assert cache.n_free == 0
    cache.release(1)
    assert cache.take() == 1
    with pytest.raises(AssertionError, match="taken"):
        cache.take()


def test_the_path_for_training_is_the_same_network(lm: SpeechLM):
    x = vectors(2, 12).requires_grad_()
    found = lm.hidden(x)
    for row, expected in zip(found, x.detach(), strict=True):
        torch.testing.assert_close(row, alone(lm, expected), **CLOSE)
    (gradient,) = torch.autograd.grad(found[:, 5].square().sum(), x)
    assert gradient[:, :6].abs().amax(-1).min() > 0
    assert gradient[:, 6:].abs().max() == 0


def test_items_are_rows_of_two_tables(lm: SpeechLM):
    found = lm.embed(torch.tensor([0, ~0, 59, ~49]))
    speech, text = lm.speech_embedding.weight, lm.embed_tokens.weight
    assert torch.equal(found, torch.stack([speech[0], text[0], speech[59], text[49]]))


def test_low_precision_linears_keep_float32_between_them():
    torch.manual_seed(0)
    exact, rough = SpeechLM(CONFIG), SpeechLM(CONFIG)
    rough.load_state_dict(exact.state_dict())
    for name, module in rough.named_modules():
        if not name.endswith("norm"):
            module.to(torch.bfloat16) if not list(module.children()) else None
    x = vectors(1, 20)
    found = rough(x, cache := poisoned(CONFIG, 1, 32), [cache.take()])
    assert found.dtype == torch.float32
    assert rough.logits(found).dtype == torch.float32
    error = (found[0] - alone(exact, x[0])).norm() / found.norm()
    assert 0 < error < 0.02


def test_parameters_are_named_as_in_the_checkpoint_and_need_no_memory():
    with torch.device("meta"):
        names = set(SpeechLM(LLMConfig()).state_dict())
    layer = {
        f"layers.0.{name}"
        for name in (
            *(f"self_attn.qkv.{p}_proj.{w}" for p in "qkv" for w in ("weight", "bias")),
            "self_attn.o_proj.weight",
            *(f"mlp.gate_up.{p}_proj.weight" for p in ("gate", "up")),
            "mlp.down_proj.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        )
    }
    assert {name for name in names if name.startswith("layers.0.")} == layer
    assert {name for name in names if not name.startswith("layers.")} == {
        "embed_tokens.weight",
        "norm.weight",
        "speech_embedding.weight",
        "llm_decoder.weight",
    }


def test_padding_covers_the_longest_row(lm: SpeechLM):
    cache = padded(CONFIG, 2, 20)
    slots = [cache.take(), cache.take()]
    lm(vectors(1, 9), cache, slots[:1])
    step = cache.step(slots, 1)
    assert isinstance(step, PaddedStep)
    assert step.n_keys == 16


# The recorded runs.


@pytest.fixture(scope="module")
def golden_lm(golden_model: Path) -> SpeechLM:
    return load_llm(golden_model, read_config(golden_model))


@pytest.fixture(scope="module")
def run(golden: Path) -> dict:
    """Tensors by name, tolerances by name under `bounds`, the JSON beside them under `json`."""
    rows = json.loads((golden / "goldens.json").read_text())["tensors"]
    prefix = "3_llm.safetensors:"
    return {
        **load_file(golden / "3_llm.safetensors"),
        "bounds": {
            name.removeprefix(prefix): row["tolerance"]
            for name, row in rows.items()
            if name.startswith(prefix)
        },
        "json": json.loads((golden / "3_llm.json").read_text()),
    }


def golden_slots(lm: SpeechLM) -> KVSlots:
    return KVSlots(lm.config, 1, 512, device="cpu", dtype=torch.float32)


def check(run: dict, name: str, found: torch.Tensor) -> None:
    bound = run["bounds"][name]
    torch.testing.assert_close(found, run[name], rtol=0, atol=bound)


def logp(lm: SpeechLM, hidden: torch.Tensor) -> torch.Tensor:
    return lm.logits(hidden).log_softmax(-1)


@pytest.mark.parametrize("name", ["uni", "uni_noprompt"])
def test_a_known_text_as_recorded(golden_lm: SpeechLM, run: dict, name: str):
    text, prompt_text, prompt_speech, forced = (
        run[f"{name}.{key}"].flatten().tolist()
        for key in ("text", "prompt_text", "prompt_speech_token", "forced")
    )
    items = plain_items(
        golden_lm.config, text, prompt_text=prompt_text, prompt_speech=prompt_speech
    )
    x = golden_lm.embed(torch.tensor([items]))
    check(run, f"{name}.lm_input", x)
    cache = golden_slots(golden_lm)
    slot = cache.take()
    prefill = golden_lm(x, cache, [slot])
    check(run, f"{name}.prefill_hidden", prefill)
    steps = [prefill[0, -1:]]
    for token in forced:
        steps.append(golden_lm(golden_lm.embed(torch.tensor([[token]])), cache, [slot])[0])
    check(run, f"{name}.step_hidden", torch.cat(steps))
    check(run, f"{name}.logp", logp(golden_lm, torch.cat(steps)))


@pytest.mark.parametrize(
    "name", ["bistream", "bistream_earlyfill", "bistream_noprompt", "bistream_short"]
)
def test_text_in_as_recorded(golden_lm: SpeechLM, run: dict, name: str):
    text, prompt_text, prompt_speech = (
        run[f"{name}.{key}"].flatten().tolist()
        for key in ("text", "prompt_text", "prompt_speech_token")
    )
    separator = int(run["bistream_noprompt.prompt_text"][0, -1])  # nothing follows it there
    head, rest = split_head(prompt_text, separator)
    script = ReferenceInterleaved(golden_lm.config, head, rest=rest, prompt_speech=prompt_speech)
    script.say(text)
    script.end_text()
    drawn, cache = list(run["json"]["cases"][name]["sampled"]), golden_slots(golden_lm)
    slot, inputs, hidden = cache.take(), [], []
    while not script.is_done:
        inputs.append(golden_lm.embed(torch.tensor([script.pending])))
        hidden.append(golden_lm(inputs[-1], cache, [slot]))
        script.accept(script.forced if script.forced is not None else drawn.pop(0))
    check(run, f"{name}.inputs", torch.cat(inputs, 1))
    check(run, f"{name}.hidden", torch.cat(hidden, 1))
    last = torch.stack([hidden[i][0, -1] for i in run[f"{name}.logp_calls"].tolist()])
    check(run, f"{name}.logp", logp(golden_lm, last))
