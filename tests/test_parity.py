"""Parity: our code gives the reference's numbers, and the comparison notices where it does not."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.parity import Report, dump, run
from cosyvoice.parity.compare import FAIL, PASS, compare_tensors, compare_values
from cosyvoice.parity.goldens import EXACT, INDEX, INPUT
from cosyvoice.text import Tokenizer

TEXT = "The meeting is at 10:30 today."


def quiet(model: Path, goldens: Path, *stages: int) -> Report:
    return run(model, goldens, stages, tell=lambda line: None)


def printed(report: Report) -> list[str]:
    out = io.StringIO()
    report.print(out)
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def report(golden: Path, golden_model: Path) -> Report:
    return quiet(golden_model, golden)


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    """A golden set that may be spoilt."""
    ignored = shutil.ignore_patterns("model")
    return Path(shutil.copytree(golden, tmp_path / "set", ignore=ignored))


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# What CI asks: the golden model is the reference.


def test_every_row_of_the_golden_set_passes(report: Report) -> None:
    assert [f"{row.name}: {row.verdict}" for row in report.rows if row.has_failed] == []
    assert report.passed
    assert report.exit_code == 0


def test_every_tensor_of_the_golden_set_has_a_row(report: Report, golden: Path) -> None:
    tensors = json.loads((golden / INDEX).read_text())["tensors"]
    wanted = {name for name in tensors if not name.startswith("9_")}
    assert wanted <= {row.name for row in report.rows}
    given = {name for name, spec in tensors.items() if spec["tolerance"] == INPUT} & wanted
    assert {row.name for row in report.rows if row.verdict == INPUT} == given


def test_last_line_is_the_outcome_as_json(report: Report) -> None:
    *table, last = printed(report)
    outcome = json.loads(last)
    assert outcome["passed"] is True
    assert outcome["n_failed"] == 0
    assert outcome["n_rows"] == len(outcome["rows"]) - 1  # training stands in one row for later
    assert set(outcome["rows"][0]) == {"name", "shape", "max_abs", "l1", "tolerance", "verdict"}
    assert [row["name"] for row in outcome["rows"] if row["verdict"] == "later"] == [
        "9_training.safetensors"
    ]
    assert len(table) > outcome["n_rows"]


def test_stages_run_alone(golden: Path, golden_model: Path) -> None:
    report = quiet(golden_model, golden, 4, 6)
    assert list(report.parts) == ["4_sampling", "6_hift", "noise"]
    assert report.passed
    with pytest.raises(BadRequest, match="there is no stage 12"):
        quiet(golden_model, golden, 12)


def test_threads_are_as_before(golden: Path, golden_model: Path) -> None:
    before = torch.get_num_threads()
    quiet(golden_model, golden, 4)
    assert torch.get_num_threads() == before


# It notices.


def spoilt(tensor: Tensor, tolerance: float | str) -> Tensor:
    if tensor.dtype == torch.bool:
        return ~tensor
    if tolerance == EXACT:
        return tensor + 1
    return tensor + 3 * float(tolerance) + 1e-6


def test_each_compared_tensor_fails_when_it_is_another(copied: Path, golden_model: Path) -> None:
    specs = json.loads((copied / INDEX).read_text())["tensors"]
    for file in copied.glob("[1-7]_*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            tolerance = specs[f"{file.name}:{name}"]["tolerance"]
            if tolerance != INPUT and not name.endswith("logp_calls"):  # a choice, not a result
                tensors[name] = spoilt(tensor, tolerance)
        save_file(tensors, file)
    report = quiet(golden_model, copied, *range(1, 8))
    compared = [
        row
        for row in report.rows
        if ".safetensors:" in row.name and row.tolerance != INPUT and "logp_calls" not in row.name
    ]
    assert len(compared) > 200
    assert [row.name for row in compared if not row.has_failed] == []
    assert report.exit_code == 1


def test_each_recorded_value_fails_when_it_is_another(copied: Path, golden_model: Path) -> None:
    def change_cases(document: dict) -> None:
        document["eos"] += 1
        document["cases"]["uni"]["sequence"][3][1] += 1
        document["cases"]["bistream"]["ignore_eos"][0] ^= True

    def change_rows(document: dict) -> None:
        document["rows"] = document["rows"][:2]
        document["rows"][0]["wetext018"][0] += "!"
        document["rows"][1]["wetext018_nosplit"] = {"any": True}

    edit(copied / "3_llm.json", change_cases)
    edit(copied / "8_text.json", change_rows)
    report = quiet(golden_model, copied, 3, 8)
    assert {row.name for row in report.rows if row.has_failed} == {
        "3_llm.json:eos",
        "3_llm.json:cases.uni.sequence",
        "3_llm.json:cases.bistream.ignore_eos",
        "8_text.json:rows[0].wetext018",
    }


def test_one_changed_weight_is_noticed(golden: Path, golden_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(golden_model, model)
    weights = torch.load(model / "flow.pt", weights_only=True)
    weights["decoder.estimator.transformer_blocks.1.attn.to_v.bias"][0] += 0.05
    torch.save(weights, model / "flow.pt")
    report = quiet(model, golden, 4, 5)
    failed = {row.name.removeprefix("5_flow.safetensors:") for row in report.rows if row.has_failed}
    assert report.exit_code == 1
    assert "dit_full.transformer_blocks.1" in failed
    assert "schedule.mel_3" in failed
    assert "dit_full.transformer_blocks.0" not in failed
    assert json.loads(printed(report)[-1])["n_failed"] == len(failed)


def test_a_tensor_nobody_computes_fails(copied: Path, golden_model: Path) -> None:
    file = copied / "4_sampling.safetensors"
    save_file({**load_file(file), "temperature": torch.ones(1)}, file)
    with pytest.raises(BadRequest, match="temperature is not described"):
        quiet(golden_model, copied, 4)
    spec = {"shape": [1], "dtype": "float32", "meaning": "", "tolerance": 1e-6}
    edit(
        copied / INDEX, lambda i: i["tensors"].update({"4_sampling.safetensors:temperature": spec})
    )
    report = quiet(golden_model, copied, 4)
    assert [row.verdict for row in report.rows if row.has_failed] == [f"{FAIL}: not computed"]


def test_other_chunks_than_recorded_fail(copied: Path, golden_model: Path) -> None:
    file = copied / "6_hift.safetensors"
    tensors = load_file(file)
    del tensors["chunked.wav_2"]
    save_file(tensors, file)
    edit(copied / INDEX, lambda index: index["tensors"].pop(f"{file.name}:chunked.wav_2"))
    report = quiet(golden_model, copied, 6)
    assert [row.name for row in report.rows if row.has_failed] == [f"{file.name}:chunked.wav_2"]
    edit(copied / INDEX, lambda i: i["notes"]["hift_chunked"].update({"mel_lengths": [18, 30]}))
    report = quiet(golden_model, copied, 6)
    failed = [row for row in report.rows if row.has_failed]
    assert [row.verdict for row in failed] == [f"{FAIL}: shape [1, 9600]"]


def test_a_stage_that_raises_fails_its_rows_and_no_other(copied: Path, golden_model: Path) -> None:
    edit(copied / INDEX, lambda index: index["notes"]["e2e"].update({"text": "..."}))
    report = quiet(golden_model, copied, 4, 7)
    assert all(not row.has_failed for row in report.parts["4_sampling"])
    verdicts = {row.verdict for row in report.parts["7_e2e"] if row.verdict != INPUT}
    assert verdicts == {
        f"{FAIL}: BadRequest: there is nothing to speak: give a text with letters or digits"
    }


def rename_recordings(folder: Path, names: dict[str, str]) -> None:
    """Give the recordings of a set other names, wherever they are named."""
    file = folder / "2_features.safetensors"

    def renamed(name: str) -> str:
        recording, dot, rest = name.partition(".")
        return names[recording] + dot + rest

    def change(index: dict) -> None:
        start = f"{file.name}:"
        index["tensors"] = {
            start + renamed(key.removeprefix(start)) if key.startswith(start) else key: value
            for key, value in index["tensors"].items()
        }
        info = index["notes"]["features"]["info"]
        index["notes"]["features"]["info"] = {names[key]: value for key, value in info.items()}
        for constants in index["params"].values():
            for role in constants.keys() & {"prompt", "source"}:
                recording = constants[role][0]
                constants[role] = names[recording] + constants[role][1:]

    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file)
    edit(folder / INDEX, change)


@pytest.mark.parametrize("names", [{"a": "slt-1", "b": "slt-2"}, {"a": "ada 24k", "b": "ada"}])
def test_recordings_may_have_any_names(
    copied: Path, golden_model: Path, names: dict[str, str]
) -> None:
    rename_recordings(copied, names)
    assert quiet(golden_model, copied, 2, 7).passed


def test_tokens_may_be_more_than_the_text_would_allow(
    copied: Path, golden: Path, golden_model: Path
) -> None:
    """The reference's LLM was replaced when the set was recorded, its limits with it."""
    text = "Hi."
    ids = torch.tensor([Tokenizer(golden_model).encode(text)], dtype=torch.int32)
    file = copied / "7_e2e.safetensors"
    tensors = load_file(file)
    assert len(tensors["tokens"]) > 20 * ids.shape[1]
    save_file({**tensors, "llm_in.text": ids}, file)

    def change(index: dict) -> None:
        index["tensors"][f"{file.name}:llm_in.text"]["shape"] = list(ids.shape)
        index["notes"]["e2e"]["text"] = text

    edit(copied / INDEX, change)
    assert quiet(golden_model, copied, 7).passed


# Bad input.


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tensors": {"a:b": {}}}', '{"tensors": 3}'])
def test_broken_index_is_refused(copied: Path, golden_model: Path, content: str) -> None:
    (copied / INDEX).write_text(content)
    with pytest.raises(BadRequest, match=INDEX):
        quiet(golden_model, copied, 4)


@pytest.mark.parametrize("tolerance", ["loose", -1, "nan"])
def test_odd_tolerance_is_refused(copied: Path, golden_model: Path, tolerance: object) -> None:
    name = "4_sampling.safetensors:cand_ids_00"
    edit(copied / INDEX, lambda index: index["tensors"][name].update({"tolerance": tolerance}))
    with pytest.raises(BadRequest, match="malformed"):
        quiet(golden_model, copied, 4)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("goldens.json", 4),
        ("4_sampling.json", 4),
        ("4_sampling.safetensors", 4),
        ("noise.safetensors", 6),
        ("prompt_b.wav", 7),
    ],
)
def test_missing_file_is_named(copied: Path, golden_model: Path, file: str, stage: int) -> None:
    (copied / file).unlink()
    with pytest.raises(BadRequest, match=file) as raised:
        quiet(golden_model, copied, stage)
    assert "\n" not in str(raised.value)


def test_truncated_tensors_are_refused(copied: Path, golden_model: Path) -> None:
    file = copied / "4_sampling.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadRequest, match="damaged"):
        quiet(golden_model, copied, 4)


def test_shapes_must_be_those_of_the_index(copied: Path, golden_model: Path) -> None:
    name = "4_sampling.safetensors:cand_ids_00"
    edit(copied / INDEX, lambda index: index["tensors"][name].update({"shape": [3]}))
    with pytest.raises(BadRequest, match="cand_ids_00 has the shape"):
        quiet(golden_model, copied, 4)


def test_missing_weights_stop_the_run(golden: Path, golden_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(golden_model, model, ignore=shutil.ignore_patterns("hift.pt"))
    assert quiet(model, golden, 4).passed  # which needs none
    with pytest.raises(ModelFilesError, match="hift.pt"):
        quiet(model, golden, 6)


# Verdicts.


def verdict(ours: list[float], golden: list[float], **bounds: float | None) -> str:
    bounds = {"tolerance": 0.1, "max_rms": None} | bounds
    return compare_tensors("x", torch.tensor(ours), torch.tensor(golden), **bounds).verdict


def test_verdicts_of_tensors() -> None:
    inf, nan = float("inf"), float("nan")
    assert verdict([1.0, 2.0], [1.0, 2.1], tolerance=0.11) == PASS
    assert verdict([1.0, 2.0], [1.0, 2.2]) == FAIL
    assert verdict([1.0, -inf], [1.0, -inf]) == PASS
    assert verdict([1.0, inf], [1.0, -inf]) == FAIL
    assert verdict([1.0, nan], [1.0, 2.0]) == FAIL
    assert verdict([1.0], [1.0, 2.0]) == f"{FAIL}: shape [1]"
    assert verdict([1.0 + 1e-7], [1.0], tolerance=0.0) == FAIL
    assert verdict([0.05] * 9, [0.0] * 9, max_rms=0.01).startswith(f"{FAIL}: RMS")
    assert verdict([], []) == PASS


def test_verdicts_of_values() -> None:
    assert compare_values("x", ["a"], ["a"]).verdict == PASS
    assert compare_values("x", ["a"], ["b"]).verdict == f"{FAIL}: ['a']"
    assert compare_values("x", "whatever", {"any": True}).verdict == PASS


def test_outcome_is_json_where_numbers_are_none(golden: Path) -> None:
    row = compare_tensors(
        "x", torch.tensor([float("nan")]), torch.ones(1), tolerance=1.0, max_rms=None
    )
    outcome = json.loads(printed(Report({"x": [row]}))[-1])
    assert outcome["rows"][0]["max_abs"] is None
    assert not outcome["passed"]


# A set of our own.


@pytest.fixture(scope="module")
def dumped(golden: Path, golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dump") / "set"
    speak(golden_model, golden / "prompt_b.wav", out)
    return out


def speak(model: Path, recording: Path, out: Path) -> None:
    dump(model, recording, TEXT, prompt_text="The light turns.", out=out, seed=3)


def test_a_dump_passes_its_own_run(dumped: Path, golden_model: Path) -> None:
    report = quiet(golden_model, dumped)
    assert [f"{row.name}: {row.verdict}" for row in report.rows if row.has_failed] == []
    assert {part.partition("_")[0] for part in report.parts} == {*"12345678", "noise"}
    assert report.n_rows > 150


def test_a_dump_has_every_kind_of_case_of_the_golden_set(dumped: Path, golden: Path) -> None:
    def cases(folder: Path) -> set[str]:
        """First parts of the names, numbers left out; training aside."""
        names = json.loads((folder / INDEX).read_text())["tensors"]
        tensors = [name.partition(".safetensors:")[2] for name in names if name[0] != "9"]
        return {re.sub(r"_\d+", "", name.partition(".")[0]) for name in tensors}

    variants = {"b", "uni_noprompt", "bistream_earlyfill", "bistream_noprompt", "bistream_short"}
    without_effect = {"rand_ini", "uv_noise_head"}
    assert cases(golden) - variants - without_effect == cases(dumped)


def test_the_noise_of_a_dump_reaches_to_the_end_of_its_longest_case(dumped: Path) -> None:
    audio = load_file(dumped / "7_e2e.safetensors")
    longest = max(tensor.shape[1] for name, tensor in audio.items() if ".wav" in name)
    assert load_file(dumped / "noise.safetensors")["sine_waves"].shape[1] >= longest


def test_the_same_seed_gives_the_same_dump(
    dumped: Path, golden: Path, golden_model: Path, tmp_path: Path
) -> None:
    speak(golden_model, golden / "prompt_b.wav", tmp_path / "again")
    for file in dumped.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_artifacts_have_the_older_harness_shapes(dumped: Path) -> None:
    shapes = {}
    for stem in ("frontend_artifacts", "debug_artifacts"):
        with safe_open(dumped / f"{stem}.safetensors", framework="pt") as file:
            shapes |= {(stem[0], k): tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
    n_frames = shapes["d", "python_flow_output"][2]
    assert shapes["f", "whisper_mel"][:2] == (1, 128)
    assert shapes["f", "speaker_embedding"] == (1, 192)
    assert shapes["f", "speech_feat"][2] == 80
    assert shapes["d", "token"] == shapes["d", "speech_tokens"] == (1, n_frames // 2)
    assert shapes["d", "python_audio_output"] == (1, 480 * n_frames)
    assert shapes["d", "python_hift_source"] == (1, 1, 480 * n_frames)
    assert shapes["d", "rand_noise"] == (1, 80, 15000)
    assert (dumped / "debug_artifacts.wav").stat().st_size == 44 + 2 * 480 * n_frames


def test_a_dump_replaces_nothing_and_leaves_nothing(
    golden: Path, golden_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(BadRequest, match="not an empty directory"):
        speak(golden_model, golden / "prompt_b.wav", tmp_path / "full")
    with pytest.raises(ModelFilesError):
        speak(tmp_path, golden / "prompt_b.wav", tmp_path / "new")
    with pytest.raises(BadRequest, match="no file"):
        speak(golden_model, tmp_path / "none.wav", tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]
