"""What the LLM is fed: laws of the text-in machines and the plain one, and the recorded runs."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cosyvoice.config import MAX_SILENT_RUN_TOKENS, REFERENCE, SILENT_TOKENS, LLMConfig
from cosyvoice.engine.script import (
    NOTHING,
    Forbidden,
    Interleaved,
    Plain,
    ReferenceInterleaved,
    TextIn,
    plain_items,
    split_head,
    text_items,
    token_limits,
)
from cosyvoice.engine.silence import SilentFilter
from cosyvoice.errors import BadRequest, SpeechError

CONFIG = LLMConfig(n_speech_tokens=100, n_speech_rows=120, text_vocab_size=5000)
HEAD = [900, 901]
BISTREAMS = ("bistream", "bistream_earlyfill", "bistream_noprompt", "bistream_short")


def answers(seed: int, p_special: float = 0.03):
    """A caller of the LLM's part: speech ids, now and then a special one that is allowed."""
    dice = random.Random(seed)

    def answer(script: TextIn) -> int:
        if script.forced is not None:
            return script.forced
        if dice.random() > p_special:
            return dice.randrange(CONFIG.n_speech_tokens)
        if isinstance(script, Interleaved) and script.forbidden == NOTHING:
            return dice.randrange(CONFIG.n_speech_tokens, CONFIG.n_speech_rows)
        return CONFIG.eos if script.forbidden == NOTHING else CONFIG.fill

    return answer


def play(script: TextIn, pieces: list[list[int]], *, seed: int, eager: bool) -> tuple[list, list]:
    """Run to the end, the text arriving as soon or as late as it can; (feeds, spoken tokens)."""
    answer, feeds, spoken = answers(seed), [], []
    pieces = [*pieces, None]
    while not script.is_done and len(feeds) < 10_000:
        if pieces and (eager or script.is_waiting):
            piece = pieces.pop(0)
            script.end_text() if piece is None else script.say(piece)
            continue
        assert not script.is_waiting, "waits though the text has ended"
        feeds.append(list(script.pending))
        token = script.accept(answer(script))
        spoken += [] if token is None else [token]
    return feeds, spoken


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    pieces, rest = [], list(ids)
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    return [*pieces, rest]


def n_ids(n: int, start: int = 1000) -> list[int]:
    return list(range(start, start + n))


texts = st.integers(1, 60)
prompts = st.tuples(st.integers(0, 30), st.integers(0, 65))
sizes = st.lists(st.integers(0, 9), max_size=30)


@pytest.mark.parametrize("machine", [Interleaved, ReferenceInterleaved])
@settings(max_examples=60, deadline=None)
@given(n_text=texts, prompt=prompts, sizes=sizes, seed=st.integers(0, 999))
def test_how_the_text_is_cut_and_when_it_comes_changes_nothing(
    machine, n_text, prompt, sizes, seed
):
    def make() -> TextIn:
        rest, speech = n_ids(prompt[0], 2000), list(range(prompt[1]))
        return machine(CONFIG, HEAD, rest=rest, prompt_speech=speech)

    text = n_ids(n_text)
    whole = play(make(), [text], seed=seed, eager=True)
    assert play(make(), cut(text, sizes), seed=seed, eager=False) == whole
    assert play(make(), cut(text, sizes), seed=seed, eager=True) == whole


@settings(max_examples=100, deadline=None)
@given(n_text=texts, prompt=prompts, sizes=sizes, seed=st.integers(0, 999))
def test_everything_is_fed_once_and_in_order(n_text, prompt, sizes, seed):
    text, rest, speech = n_ids(n_text), n_ids(prompt[0], 2000), list(range(prompt[1]))
    script = Interleaved(CONFIG, HEAD, rest=rest, prompt_speech=speech)
    feeds, spoken = play(script, cut(text, sizes), seed=seed, eager=False)
    fed = [item for feed in feeds for item in feed]
    assert script.is_done
    assert fed[0] == CONFIG.sos
    assert fed.count(CONFIG.task) == 1
    assert [~item for item in fed if item < 0] == HEAD + rest + text
    heard = [item for item in fed if 0 <= item < CONFIG.sos]
    last = spoken[-1:] if len(heard) < len(speech + spoken) else []  # what ended it is not fed
    # Leftover prompt speech comes last of the prompt, but nothing is spoken between its blocks.
    assert heard + last == speech + spoken
    assert CONFIG.fill not in fed
    assert CONFIG.eos not in fed


@settings(max_examples=60, deadline=None)
@given(n_text=texts, prompt=prompts, seed=st.integers(0, 999))
def test_fives_of_text_stand_before_at_most_fifteen_tokens_of_speech(n_text, prompt, seed):
    rest, speech = n_ids(prompt[0], 2000), list(range(prompt[1]))
    script = Interleaved(CONFIG, HEAD, rest=rest, prompt_speech=speech)
    feeds, _ = play(script, [n_ids(n_text)], seed=seed, eager=False)
    fed = [item for feed in feeds for item in feed]
    blocks = "".join("t" if item < 0 else "s" for item in fed[1 : fed.index(CONFIG.task)])
    n_speech, n_text_block = CONFIG.mix_ratio[1], CONFIG.mix_ratio[0]
    assert all(len(run) <= n_speech for run in blocks.split("t"))
    n_texts = [len(run) for run in blocks[len(HEAD) :].split("s") if run]
    # All but what is left at the end come in fives; an immediate fill joins two of them.
    assert all(n % n_text_block == 0 for n in n_texts[:-1])


def test_a_short_text_is_fed_as_if_it_had_been_known():
    script = Interleaved(CONFIG, HEAD, rest=[7, 8], prompt_speech=[1, 2, 3])
    script.say([9, 10])
    assert script.is_waiting
    script.end_text()
    assert script.pending == plain_items(
        CONFIG, [9, 10], prompt_text=[*HEAD, 7, 8], prompt_speech=[1, 2, 3]
    )
    assert script.forbidden == NOTHING


@pytest.mark.parametrize("n_prompt_speech", [0, 15, 30])
def test_a_whole_prompt_block_is_followed_by_text(n_prompt_speech):
    speech = list(range(n_prompt_speech))
    script = Interleaved(CONFIG, HEAD, rest=n_ids(n_prompt_speech // 3), prompt_speech=speech)
    script.say([50, 51, 52, 53])
    assert script.is_waiting
    script.say([54])
    assert script.pending[-5:] == text_items([50, 51, 52, 53, 54])
    assert script.forbidden == Forbidden(100, 120, CONFIG.fill)
    for token in range(15):
        assert script.forced is None
        assert script.accept(token) == token
    assert script.forced == CONFIG.fill
    assert script.accept(CONFIG.fill) is None
    assert script.is_waiting
    assert script.pending == []


def test_an_endless_answer_ends_at_twenty_tokens_for_each_of_text():
    script = Interleaved(CONFIG, HEAD)
    feeds, spoken = play_without_stop(script, n_ids(3))
    assert len(spoken) == len(feeds) == 60


def play_without_stop(script: TextIn, text: list[int]) -> tuple[list, list]:
    script.say(text)
    script.end_text()
    feeds, spoken = [], []
    while not script.is_done:
        feeds.append(script.pending)
        spoken.append(script.accept(3))
    return feeds, spoken


def test_no_text_at_all_says_nothing():
    script = Interleaved(CONFIG, HEAD, rest=n_ids(20), prompt_speech=[1, 2])
    assert script.is_waiting
    script.end_text()
    assert script.is_done
    assert not script.is_waiting


def test_the_reference_refuses_a_stop_id_while_text_arrives():
    script = ReferenceInterleaved(CONFIG, HEAD, rest=n_ids(5), prompt_speech=[1])
    script.say([40])
    assert script.forbidden == Forbidden(CONFIG.sos, CONFIG.sos + 1)
    with pytest.raises(SpeechError, match="another seed"):
        script.accept(CONFIG.eos)
    assert script.is_done


def test_the_reference_loses_prompt_speech_that_found_no_text():
    script = ReferenceInterleaved(CONFIG, HEAD, rest=[5], prompt_speech=[1, 2])
    script.say([40])
    script.end_text()
    assert script.pending == [CONFIG.sos, *text_items([*HEAD, 5, 40]), CONFIG.task]


def test_plain_forbids_stops_until_the_minimum_then_stops_on_any():
    script = Plain(CONFIG, plain_items(CONFIG, [5]), min_len=2, max_len=20)
    assert script.pending == [CONFIG.sos, ~5, CONFIG.task]
    for token in (7, 8):
        assert script.forbidden == Forbidden(100, 120)
        assert script.accept(token) == token
        assert script.pending == [token]
    assert script.forbidden == NOTHING
    assert script.accept(119) is None
    assert script.is_done


def test_plain_in_reference_forbids_only_sos_and_eos_may_end_it_early():
    script = Plain(CONFIG, [1], min_len=2, max_len=20, rules=REFERENCE)
    assert script.forbidden == Forbidden(CONFIG.sos, CONFIG.sos + 1)
    assert script.accept(CONFIG.eos) is None
    assert script.is_done


def test_plain_ends_at_the_maximum():
    script = Plain(CONFIG, [1], min_len=0, max_len=3)
    assert [script.accept(i) for i in range(3)] == [0, 1, 2]
    assert script.is_done
    assert Plain(CONFIG, [1], min_len=0, max_len=0).is_done


def test_limits_count_as_ruled():
    assert token_limits(52, 40) == (80, 1040)


def test_head_ends_at_the_first_separator():
    assert split_head([1, 9, 2, 9], 9) == ([1, 9], [2, 9])
    with pytest.raises(BadRequest, match="endofprompt"):
        split_head([1, 2], 9)


def test_silence_is_cut_to_five_tokens_and_counted_anew_after_speech():
    silent = min(SILENT_TOKENS)
    keep = SilentFilter().keep
    assert [keep(silent) for _ in range(8)] == [True] * MAX_SILENT_RUN_TOKENS + [False] * 3
    assert keep(0)
    assert keep(silent)


# The recorded runs.


def item_of(fed: list) -> int:
    return fed[1] if fed[0] == "speech" else ~fed[1]


def recorded_separator(tensors: dict, cases: dict) -> int:
    """The end of a prompt text that has nothing after it."""
    return int(tensors["bistream_noprompt.prompt_text"][0, -1])


def replay(golden: Path, name: str) -> tuple[TextIn, dict, dict[str, list[int]]]:
    run = json.loads((golden / "3_llm.json").read_text())
    tensors = load_file(golden / "3_llm.safetensors")
    ids = {
        key: tensors[f"{name}.{key}"].ravel().tolist()
        for key in ("prompt_text", "prompt_speech_token", "text", "call_len", "yielded")
    }
    config = LLMConfig(n_speech_tokens=run["sos"])
    separator = recorded_separator(tensors, run["cases"])
    head, rest = split_head(ids["prompt_text"], separator)
    script = ReferenceInterleaved(config, head, rest=rest, prompt_speech=ids["prompt_speech_token"])
    return script, run["cases"][name], ids


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("name", BISTREAMS)
def test_text_in_as_recorded(golden: Path, name: str, at_once: bool):
    script, case, ids = replay(golden, name)
    drawn, suppressed = list(case["sampled"]), []
    calls, spoken, text = [], [], [[i] for i in ids["text"]]
    if at_once:
        text = [ids["text"]]
    while not script.is_done:
        if script.is_waiting:
            script.say(text.pop(0)) if text else script.end_text()
            continue
        calls.append(list(script.pending))
        chosen = script.forced
        if chosen is None:
            chosen = drawn.pop(0)
            suppressed.append(script.forbidden != NOTHING)
        token = script.accept(chosen)
        spoken += [] if token is None else [token]
    assert calls == [[item_of(fed) for fed in call] for call in case["calls"]]
    assert [len(call) for call in calls] == ids["call_len"]
    assert spoken == ids["yielded"] == case["yielded"]
    assert suppressed == case["ignore_eos"]
    assert not drawn


@pytest.mark.parametrize("name", ["uni", "uni_noprompt"])
def test_plain_as_recorded(golden: Path, name: str):
    run = json.loads((golden / "3_llm.json").read_text())
    tensors = load_file(golden / "3_llm.safetensors")
    text, prompt_text, prompt_speech = (
        tensors[f"{name}.{key}"].ravel().tolist()
        for key in ("text", "prompt_text", "prompt_speech_token")
    )
    config, case = LLMConfig(n_speech_tokens=run["sos"]), run["cases"][name]
    items = plain_items(config, text, prompt_text=prompt_text, prompt_speech=prompt_speech)
    assert items == [item_of(fed) for fed in case["sequence"]]
    assert token_limits(len(text), len(text)) == (case["min_len"], case["max_len"])
