"""Benchmarks: they count what the networks do, force what they say, and end with one JSON line."""

import ast
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import cosyvoice.bench
from cosyvoice.bench import PARTS, Options, flow, run
from cosyvoice.bench.ceilings import Ceilings, listening
from cosyvoice.bench.formats import answer, compare
from cosyvoice.bench.goals import judge
from cosyvoice.bench.operations import (
    Operations,
    chunk_flow,
    flow_weights,
    llm_weights,
    offline_flow,
)
from cosyvoice.bench.report import goal_lines, lines, to_json
from cosyvoice.bench.streams import Heard, concurrency, listen, running
from cosyvoice.bench.subject import Subject
from cosyvoice.bench.timing import Timing, best_of, quantile
from cosyvoice.cli import app
from cosyvoice.config import SAMPLE_RATE_HZ, TOKEN_SAMPLES, EngineConfig
from cosyvoice.engine.loading import load_models
from cosyvoice.errors import BadRequest
from cosyvoice.models.checkpoint import Loading, load_flow, load_llm, read_config

BARE_MACHINE = {"torch", "numpy", "safetensors", "yaml", "cosyvoice"}
PROMPT_S = 1.2  # 30 tokens: neither a whole block nor none


@pytest.fixture(scope="module")
def subject(golden_model: Path) -> Subject:
    models = load_models(golden_model, device="cpu", dtype="fp32")
    return Subject(models, EngineConfig(n_slots=4, max_positions=600), PROMPT_S)


# Timings.


def test_timing_tells_median_p95_and_minimum() -> None:
    timing = Timing(tuple(n / 1000 for n in range(100, 0, -1)))
    assert (timing.median_s, timing.p95_s, timing.min_s) == (0.050, 0.095, 0.001)
    assert timing.per(10).to_json() == {"median_ms": 5.0, "p95_ms": 9.5, "min_ms": 0.1, "n": 100}
    assert quantile([3.0], 0.95) == 3.0


def test_best_of_warms_up_and_waits_for_the_device() -> None:
    said: list[str] = []
    timing = best_of(lambda: said.append("go"), n=2, n_warm=3, wait=lambda: said.append("wait"))
    assert said == ["go"] * 3 + ["wait", "go", "wait"] * 2
    assert len(timing.samples_s) == 2


# Counts.


def test_counted_operations_are_those_the_flow_does(golden_model: Path) -> None:
    config = read_config(golden_model)
    bare = load_flow(golden_model, config, options=Loading())  # not packed: torch counts these
    subject = Subject(load_models(golden_model, device="cpu", dtype="fp32"), EngineConfig(), 1.2)
    tokens = subject.tokens(40, seed=1)
    noise = subject.models.flow_noise
    with torch.inference_mode():
        solver = bare.solver()
        state = bare.start(subject.voice(), solver, noise, chunked=False)
        with FlopCounterMode(display=False) as counter:
            bare.extend(state, tokens, last=True)
    n_frames = 2 * (subject.n_prompt_tokens + len(tokens))
    assert counter.get_total_flops() == offline_flow(config.flow, n_frames, solver.n_steps).total


def test_a_stream_counts_no_frame_twice(golden_model: Path) -> None:
    config = read_config(golden_model).flow
    chunks = [chunk_flow(config, n, 50, 10) for n in range(0, 400, 50)]
    together = sum(chunks, start=Operations())
    assert together == chunk_flow(config, 0, 400, 10)
    assert together.linear == offline_flow(config, 400, 10).linear
    assert len({chunk.linear for chunk in chunks}) == 1
    steps = {b.attention - a.attention for a, b in zip(chunks, chunks[1:], strict=False)}
    assert len(steps) == 1  # attention grows with the keys, and nothing else does


def test_weights_are_those_of_the_linear_layers(golden_model: Path) -> None:
    config = read_config(golden_model)
    llm = load_llm(golden_model, config, options=Loading())
    with listening(llm) as products, torch.inference_mode():
        llm.logits(llm.hidden(torch.zeros(1, 1, config.llm.hidden_size)))
    assert sum(p.n_ops for p in products) == 2 * llm_weights(config.llm)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_products_are_heard_in_every_format(golden_model: Path, dtype: str) -> None:
    models = load_models(golden_model, device="cpu", dtype=dtype)
    ceilings = Ceilings(Subject(models, EngineConfig(), PROMPT_S), n_go=1)
    with torch.inference_mode():
        products = ceilings._flow_products(50)
    rows = 2 * 50
    n_weights = flow_weights(models.flow.config)
    assert sum(p.n_ops for p in products) == 2 * rows * n_weights
    for product in {p.kind: p for p in products}.values():
        assert product.layer(product.input(models.device)).shape[-1] == product.n_out
    rates = [ceilings.product_rate(50) for _ in range(3)]
    assert rates == sorted(rates)  # the best so far
    assert ceilings.sweep().min_s > 0


def test_listening_leaves_nothing_behind(subject: Subject) -> None:
    with listening(subject.models.flow.dit):
        pass
    assert not any(module._forward_hooks for module in subject.models.flow.dit.modules())


# Speech of a forced length.


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("n_tokens", [7, 40])
def test_length_of_speech_is_forced(subject: Subject, streaming: bool, n_tokens: int) -> None:
    with running(subject) as (engine, runner):
        heard = listen(engine, subject.request(n_tokens, seed=3, streaming=streaming))
        assert len(runner.tokens[3]) == n_tokens
    assert len(heard.audio) == n_tokens * TOKEN_SAMPLES
    assert 0 < heard.first_s <= heard.total_s
    assert set(runner.shares_s()) == {d.kind for d in runner.did}


def test_every_voice_is_another_and_every_go_the_same(subject: Subject) -> None:
    assert subject.voice(1).key == subject.voice(1).key != subject.voice(2).key
    with running(subject) as (engine, runner):
        for seed in (0, 0, 1):
            listen(engine, subject.request(10, voice_seed=seed))
        assert (runner.prefixes.n_hits, runner.prefixes.n_misses) == (1, 2)


def test_stall_is_what_a_listener_waits() -> None:
    second = SAMPLE_RATE_HZ
    audio = torch.zeros(3 * second).numpy()
    smooth = Heard(0.0, ((1.0, second), (1.9, second), (2.5, second)), audio)
    late = Heard(0.0, ((1.0, second), (2.5, second), (4.0, second)), audio)
    assert (smooth.stalled_s, late.stalled_s) == (0.0, 1.0)
    assert (smooth.first_s, smooth.total_s, smooth.audio_s) == (1.0, 2.5, 3.0)


def test_a_crowd_says_what_each_says_alone(subject: Subject) -> None:
    found = concurrency(subject, (1, 3), n_tokens=20)
    for figures in found.values():
        assert figures["share_of_equal_tokens"] == 1
        assert figures["largest_audio_difference"] < 1e-3
    assert len(found["3"]["first_audio"].samples_s) == 3


# Parts.


def test_flow_is_compared_along_a_stream(subject: Subject) -> None:
    found = flow.figures(subject, Ceilings(subject, n_go=1), 1, n_chunks=flow.N_LATE + 1)
    assert len(found["chunks_ms"]) == 41
    assert found["growth"]["operations"] > 1
    n_early, n_late = (found[f"chunk_{n}"]["gop"] for n in (4, 40))
    assert n_late["linear"] == n_early["linear"]
    assert n_late["attention"] > 3 * n_early["attention"]


def test_errors_grow_with_coarser_formats(golden_model: Path) -> None:
    answers = {
        name: answer(Subject(load_models(golden_model, device="cpu", dtype=name), EngineConfig()))
        for name in ("fp32", "bf16", "int8")
    }
    errors = {name: compare(answers["fp32"], found) for name, found in answers.items()}
    assert errors["fp32"] == dict.fromkeys(errors["fp32"], 0.0) | {"same_likeliest": 1.0}
    for key in ("mel_rms", "logp_rms"):
        assert 0 < errors["bf16"][key] < errors["int8"][key]


def test_goals_are_judged_where_their_figures_are() -> None:
    decode = {"1": Timing((0.010, 0.012))}
    rows = judge({"number_format": "int8", "llm": {"decode": decode, "batch_8_to_1": 1.5}})
    assert [(row["found"], row["met"]) for row in rows] == [(10.0, False), (1.5, True)]
    assert judge({"number_format": "fp32"}) == []


def test_faster_than_the_ceiling_is_not_believed() -> None:
    (row,) = judge({"number_format": "fp32", "flow": {"stream": {"to_floor": 0.5}}})
    assert row["met"] is None
    assert "disturbed" in goal_lines([row])[-1]


def test_json_has_null_where_there_is_no_number() -> None:
    figures = {"a": float("nan"), "b": [Timing((0.5,))], 3: "c"}
    assert json.loads(to_json(figures)) == {
        "a": None,
        "b": [{"median_ms": 500.0, "p95_ms": 500.0, "min_ms": 500.0, "n": 1}],
        "3": "c",
    }
    assert lines("title", {"x": {"y": 1.5}})[1:] == ["title", "  x.y  1.5"]


# The whole.


def test_last_line_is_one_json_object_with_everything(golden_model: Path) -> None:
    arguments = ["bench", "engine", "--model-dir", str(golden_model), "--prompt-seconds", "1.2"]
    arguments += ["--tokens", "12", "--concurrency", "1,2", "--repeat", "1", "--requests", "2"]
    arguments += ["--only", "ceilings,llm,vocoder,stream,concurrency,errors,cancel"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["machine"]["n_threads"] == torch.get_num_threads()
    assert set(PARTS) - found.keys() == {"flow", "memory"}
    assert found["stream"]["known_voice"]["0.48s"]["audio_s"] == 0.48
    assert set(found["cancel"]["orphaned"]) == {"prefill", "decode", "render"}
    assert found["goals"]
    assert "bench: llm" in done.stderr


def test_memory_of_requests_and_sentences(
    golden_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = Options(model_dir=golden_model, only=("memory",), n_requests=3, json_only=True)
    found = run(options)["memory"]
    assert found["sentences_60s"]["audio_s"] == pytest.approx(60, abs=1)
    assert found["requests"]["n"] == 3
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_unknown_part_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(BadRequest, match="no such part: walk"):
        run(Options(model_dir=Path("/nowhere"), only=("walk",)))


def test_bare_machine_runs_it(golden_model: Path) -> None:
    """Where typer, onnxruntime and the audio libraries are not installed."""
    missing = ["typer", "rich", "soundfile", "onnxruntime", "tokenizers", "wetext"]
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({missing!r}));"
        f"sys.argv = ['bench', 'engine', '--model-dir', {str(golden_model)!r},"
        " '--only', 'vocoder', '--json-only', '--repeat', '1', '--threads', '1'];"
        "runpy.run_module('cosyvoice.bench', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "per_audio_second" in json.loads(done.stdout)["vocoder"]


def test_imports_what_the_engine_imports() -> None:
    package = Path(cosyvoice.bench.__file__).parent
    imported = set()
    for file in package.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= BARE_MACHINE


def test_nothing_is_left_running(subject: Subject) -> None:
    with running(subject) as (engine, _):
        listen(engine, subject.request(5))
    assert "cosyvoice-engine" not in [thread.name for thread in threading.enumerate()]
