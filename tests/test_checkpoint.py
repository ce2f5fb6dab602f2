"""Reading a model directory: every tensor arrives as stored, every broken file is named."""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cosyvoice.config import LLMConfig, ModelConfig
from cosyvoice.errors import ModelFilesError
from cosyvoice.models.checkpoint import (
    BUNDLED_MODEL_DIR,
    Loading,
    llm_key,
    load_flow,
    load_llm,
    load_vocoder,
    read_config,
)
from cosyvoice.models.llm import SpeechLM

LOADERS = {"llm.pt": load_llm, "flow.pt": load_flow, "hift.pt": load_vocoder}
Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def model_dir(golden_model: Path, tmp_path: Path) -> Path:
    """The golden model as links, so that a test can replace one file of it."""
    for file in golden_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def stored(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def replace(file: Path, contents: Any, *, legacy: bool = False) -> None:
    file.unlink(missing_ok=True)
    torch.save(contents, file, _use_new_zipfile_serialization=not legacy)


def replace_bytes(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def load(model_dir: Path, name: str) -> nn.Module:
    return LOADERS[name](model_dir, read_config(model_dir))


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(p, q) for (x, p), (y, q) in pairs)


# What is stored is what arrives.


def test_llm_tensors_equal_the_file(golden_model: Path) -> None:
    tensors = stored(golden_model / "llm.pt")
    del tensors["llm.model.lm_head.weight"]
    for name, parameter in load(golden_model, "llm.pt").named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, tensors.pop(llm_key(name)))
    assert not tensors


def test_flow_tensors_equal_the_file(golden_model: Path) -> None:
    tensors = stored(golden_model / "flow.pt")
    del tensors["decoder.estimator.rotary_embed.inv_freq"]
    for name, parameter in load(golden_model, "flow.pt").named_parameters():
        assert torch.equal(parameter, tensors.pop(name))
    assert not tensors


def test_vocoder_weights_are_gain_times_direction(golden_model: Path) -> None:
    tensors = stored(golden_model / "hift.pt")
    for name, parameter in load(golden_model, "hift.pt").named_parameters():
        is_pitch = name.startswith("f0_predictor.")
        assert parameter.dtype == (torch.float64 if is_pitch else torch.float32)
        normalised = f"{name.removesuffix('weight')}parametrizations.weight.original"
        if name in tensors:
            expected = tensors.pop(name).double()
        else:
            gain, v = (tensors.pop(f"{normalised}{i}").double() for i in (0, 1))
            expected = gain * v / v.flatten(1).norm(dim=1)[:, None, None]
        tolerance = 1e-15 if is_pitch else 1e-6
        assert torch.allclose(parameter.double(), expected, rtol=tolerance, atol=tolerance)
    assert not tensors


def test_networks_are_ready_for_inference(golden_model: Path) -> None:
    before = torch.get_rng_state()
    for name in LOADERS:
        model = load(golden_model, name)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_spares_norms_vocoder_and_pitch(golden_model: Path) -> None:
    config, options = read_config(golden_model), Loading(dtype=torch.bfloat16)
    for name, p in load_llm(golden_model, config, options=options).named_parameters():
        assert p.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    flow = load_flow(golden_model, config, options=options)
    assert {p.dtype for p in flow.parameters()} == {torch.bfloat16}
    vocoder = load_vocoder(golden_model, config, options=options)
    assert {p.dtype for p in vocoder.parameters()} == {torch.float32, torch.float64}


# Forms in which the same weights are stored.


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors | {"epoch": 3, "step": 12_000},
        lambda tensors: {key: nn.Parameter(t) for key, t in tensors.items()},
    ],
    ids=["trainer entries", "parameters"],
)
def test_equal_forms(model_dir: Path, name: str, edit: Edit) -> None:
    expected = load(model_dir, name)
    replace(model_dir / name, edit(stored(model_dir / name)))
    assert same(load(model_dir, name), expected)


def test_transposed_storage_is_straightened(model_dir: Path) -> None:
    tensors = stored(model_dir / "flow.pt")
    expected = load(model_dir, "flow.pt")
    turned = {key: t.T.contiguous().T if t.ndim == 2 else t for key, t in tensors.items()}
    replace(model_dir / "flow.pt", turned)
    found = load(model_dir, "flow.pt")
    assert same(found, expected)
    assert all(p.is_contiguous() for p in found.parameters())


@pytest.mark.parametrize("name", LOADERS)
def test_files_of_the_older_format_load(model_dir: Path, name: str) -> None:
    expected = load(model_dir, name)
    replace(model_dir / name, stored(model_dir / name), legacy=True)
    assert same(load(model_dir, name), expected)


@pytest.mark.parametrize("name", LOADERS)
def test_half_precision_files_become_float32(model_dir: Path, name: str) -> None:
    expected = load(model_dir, name)
    replace(model_dir / name, {key: t.half() for key, t in stored(model_dir / name).items()})
    pairs = zip(load(model_dir, name).parameters(), expected.parameters(), strict=True)
    assert all(a.dtype == b.dtype and torch.allclose(a, b, 2e-3, 1e-4) for a, b in pairs)


def older_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"parametrizations.weight.original0": "weight_g"}
    names["parametrizations.weight.original1"] = "weight_v"
    pattern = re.compile("|".join(map(re.escape, names)))
    return {pattern.sub(lambda m: names[m[0]], key): t for key, t in tensors.items()}


def gan_checkpoint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    generator = {f"generator.{key}": t for key, t in tensors.items()}
    return generator | {"discriminator.conv.weight": torch.zeros(3), "epoch": 1}


@pytest.mark.parametrize("edit", [older_weight_norm, gan_checkpoint])
def test_forms_of_the_vocoder(model_dir: Path, edit: Edit) -> None:
    expected = load(model_dir, "hift.pt")
    replace(model_dir / "hift.pt", edit(stored(model_dir / "hift.pt")))
    assert same(load(model_dir, "hift.pt"), expected)


def test_folded_vocoder(model_dir: Path) -> None:
    expected = load(model_dir, "hift.pt")
    weights = {name: p.detach().clone() for name, p in expected.named_parameters()}
    replace(model_dir / "hift.pt", weights)
    pairs = zip(load(model_dir, "hift.pt").parameters(), expected.parameters(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), 1e-6) for a, b in pairs)


def test_tuned_llm_is_preferred_unless_unwanted(model_dir: Path) -> None:
    tensors = stored(model_dir / "llm.pt")
    replace(model_dir / "llm.rl.pt", {key: t + 1 for key, t in tensors.items()})
    config = read_config(model_dir)
    base = tensors["speech_embedding.weight"]
    tuned = load_llm(model_dir, config).speech_embedding.weight
    plain = load_llm(model_dir, config, options=Loading(use_rl=False)).speech_embedding.weight
    assert torch.equal(tuned, base + 1)
    assert torch.equal(plain, base)


# Memory.


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_float32_weights_stay_in_the_file(tmp_path: Path) -> None:
    config = ModelConfig(
        llm=LLMConfig(
            hidden_size=64, intermediate_size=64, n_layers=1, n_heads=2, text_vocab_size=200_000
        )
    )
    file = tmp_path / "llm.pt"
    model = SpeechLM(config.llm)
    replace(file, {llm_key(name): p.detach() for name, p in model.named_parameters()})
    del model
    before = anonymous_bytes()
    loaded = load_llm(tmp_path, config)
    grown = anonymous_bytes() - before
    assert grown < 0.1 * file.stat().st_size
    assert all(mapped_file(p) == str(file) for p in loaded.parameters())


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def mapped_file(tensor: Tensor) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(edge, 16) for edge in line.split(maxsplit=1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[-1]
    return ""


# Broken and hostile files: one line that names the file, and nothing runs.

A_KEY = {
    "llm.pt": "llm.model.model.layers.0.self_attn.q_proj.weight",
    "flow.pt": "decoder.estimator.transformer_blocks.0.attn.to_q.weight",
    "hift.pt": "f0_predictor.classifier.weight",
}


def without(key: str) -> Edit:
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


def refusal(model_dir: Path, name: str) -> str:
    with pytest.raises(ModelFilesError) as caught:
        load(model_dir, name)
    message = str(caught.value)
    assert "\n" not in message
    assert str(model_dir / name) in message
    return message


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is missing"),
        (torch.zeros(3, 3), r"has the shape \(3, 3\), cosyvoice3.yaml implies"),
        (torch.zeros(()), r"has the shape \(\)"),
        (torch.zeros(3, dtype=torch.int64), "of the type torch.int64"),
        (torch.zeros(3, dtype=torch.complex64), "of the type torch.complex64"),
        (torch.zeros(3).to_sparse(), "not a plain dense tensor"),
        (torch.zeros(3, device="meta"), "not a plain dense tensor"),
        (1.5, "is a float, not a tensor"),
        ({"a": torch.zeros(1)}, "is a dict, not a tensor"),
    ],
)
def test_a_wrong_entry_is_named(model_dir: Path, name: str, value: Any, message: str) -> None:
    key = A_KEY[name]
    tensors = without(key)(stored(model_dir / name))
    replace(model_dir / name, tensors if value is None else tensors | {key: value})
    assert re.search(f"{re.escape(key)} .*{message}", refusal(model_dir, name))


@pytest.mark.parametrize("name", LOADERS)
def test_an_unexpected_tensor_is_named(model_dir: Path, name: str) -> None:
    extra = {"llm_embedding.weight": torch.zeros(2), "other.bias": torch.zeros(2)}
    replace(model_dir / name, stored(model_dir / name) | extra)
    message = refusal(model_dir, name)
    assert "llm_embedding.weight does not belong there (and 1 more)" in message


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("original0", None, "half of a normalised weight"),
        ("original1", None, "half of a normalised weight"),
        ("original0", torch.ones(48), "not (n, 1, 1)"),
        ("original0", torch.ones(48, 80, 1), "not (n, 1, 1)"),
        ("original1", torch.ones(48), "not 3"),
    ],
)
def test_half_a_weight_norm_is_refused(
    model_dir: Path, suffix: str, value: Tensor | None, message: str
) -> None:
    key = f"conv_pre.parametrizations.weight.{suffix}"
    tensors = without(key)(stored(model_dir / "hift.pt"))
    replace(model_dir / "hift.pt", tensors if value is None else tensors | {key: value})
    with pytest.raises(ModelFilesError, match=re.escape(message)):
        load(model_dir, "hift.pt")


@pytest.mark.parametrize("contents", [[torch.zeros(1)], torch.zeros(1), {3: torch.zeros(1)}, {}])
def test_anything_but_a_dictionary_of_tensors_is_refused(model_dir: Path, contents: Any) -> None:
    replace(model_dir / "flow.pt", contents)
    refusal(model_dir, "flow.pt")


@pytest.mark.parametrize("n_bytes", [1, 4, 100, 5_000, 1_000_000, -1, -30])
def test_a_truncated_file_is_refused(model_dir: Path, n_bytes: int) -> None:
    file = model_dir / "flow.pt"
    replace_bytes(file, file.read_bytes()[:n_bytes])
    refusal(model_dir, "flow.pt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><title>404</title>", "is not a PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated or damaged"),
        (b"\x80\x02" + b"\xff" * 100, "something else than tensors|damaged"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    model_dir: Path, data: bytes, message: str
) -> None:
    replace_bytes(model_dir / "llm.pt", data)
    assert re.search(message, refusal(model_dir, "llm.pt"))


def test_missing_files_and_directories_are_named(model_dir: Path) -> None:
    (model_dir / "llm.pt").unlink()
    assert "is missing" in refusal(model_dir, "llm.pt")
    (model_dir / "llm.pt").mkdir()
    assert "cannot be read" in refusal(model_dir, "llm.pt")


class Bomb:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_does_not_run(model_dir: Path, tmp_path: Path, legacy: bool) -> None:
    witness = tmp_path / "witness"
    pickle.loads(pickle.dumps(Bomb(witness)))
    assert witness.exists()  # the bomb works where nobody is careful
    witness.unlink()
    tensors = stored(model_dir / "flow.pt") | {"epoch": Bomb(witness)}
    replace(model_dir / "flow.pt", tensors, legacy=legacy)
    assert "holds something else than tensors" in refusal(model_dir, "flow.pt")
    assert not witness.exists()


def rezip(file: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    file.unlink()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def test_a_compressed_archive_is_refused(model_dir: Path) -> None:
    rezip(model_dir / "flow.pt", lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(model_dir, "flow.pt")


def test_a_tensor_longer_than_its_bytes_is_refused(model_dir: Path) -> None:
    rezip(
        model_dir / "flow.pt",
        lambda name, data: data[: len(data) // 2] if "/data/" in name else data,
    )
    assert "is damaged" in refusal(model_dir, "flow.pt")


def test_a_program_is_refused(model_dir: Path) -> None:
    rezip(model_dir / "flow.pt", lambda _, data: data)
    with zipfile.ZipFile(model_dir / "flow.pt", "a") as archive:
        archive.writestr("flow/constants.pkl", b"")
    assert "TorchScript" in refusal(model_dir, "flow.pt")


@pytest.mark.parametrize("name", LOADERS)
def test_the_bundled_model_loads(name: str) -> None:
    load(BUNDLED_MODEL_DIR, name)
