"""Which directory, and which sizes: each wrong value is named by its file and key."""

import re
import shutil
from pathlib import Path

import pytest

from cosyvoice.errors import ModelFilesError
from cosyvoice.models.checkpoint import MODEL_DIR_VARIABLE, resolve_model_dir
from cosyvoice.models.model_config import read_config


@pytest.fixture
def model_dir(golden_model: Path, tmp_path: Path) -> Path:
    """The golden model's configuration as links, so that a test can replace one file of it."""
    for name in ("cosyvoice3.yaml", "CosyVoice-BlankEN"):
        (tmp_path / name).symlink_to(golden_model / name)
    return tmp_path


def replace_bytes(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def test_golden_sizes_come_from_the_files(golden_model: Path) -> None:
    config = read_config(golden_model)
    assert (config.llm.hidden_size, config.llm.n_heads, config.llm.head_dim) == (32, 4, 8)
    assert (config.flow.dim, config.flow.depth, config.flow.n_heads) == (64, 2, 2)
    assert (config.flow.head_dim, config.flow.lookahead_channels) == (32, 40)
    assert (config.vocoder.base_channels, config.vocoder.f0_channels) == (48, 32)
    assert config.flow.block_frames == 50
    assert config.llm.sampling.max_share == 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dim: 64", "dim: -64", "flow.decoder.estimator.dim must be an integer from 1"),
        ("dim: 64", "dim: sixty", "flow.decoder.estimator.dim must be an integer"),
        ("dim: 64", "dim: true", "flow.decoder.estimator.dim must be an integer"),
        ("dim: 64", "dim: 9**9**9", "flow.decoder.estimator.dim must be an integer"),
        ("dim: 64", "dim: !ref 9**9**9", "larger than"),
        ("dim: 64", "dim: !PLACEHOLDER", "dim is a placeholder"),
        ("dim: 64", "dim: 40", "dim (40) must be a multiple of 16"),
        ("            dim: 64\n", "", "flow.decoder.estimator.dim is missing"),
        ("dim_head: 32", "dim_head: 31", "dim_head (31) must be a multiple of 2"),
        ("depth: 2", "depth: 1000000", "depth must be an integer from 1 to 1000"),
        ("base_channels: 48", "base_channels: 42", "base_channels (42) must be a multiple of 8"),
        ("[8, 5, 3]", "[8, 5]", "hift.upsample_rates and the lists"),
        ("[8, 5, 3]", "[8, 5, 4]", "hift.upsample_rates times hop_len must give 480"),
        ("[8, 5, 3]", "8", "hift.upsample_rates must be a list"),
        ("[3, 7, 11]", "[3, 7, 10]", "hift.resblock_kernel_sizes must be odd"),
        ("top_p: 0.8", "top_p: 1.5", "llm.sampling.top_p must be a number from 0 to 1"),
        ("mix_ratio: [5, 15]", "mix_ratio: [5]", "llm.mix_ratio must be two integers"),
        ("sample_rate: 24000", "sample_rate: 22050", "sample_rate is 22050; only 24000"),
        ("solver: 'euler'", "solver: 'midpoint'", "solver is 'midpoint'; only 'euler'"),
        ("center: False", "center: True", "feat_extractor.center is True"),
        ("vocab_size: 6561", "vocab_size: 4096", "flow.vocab_size and llm.speech_token_size"),
        ("llm_input_size: 32", "llm_input_size: 64", "llm.llm_input_size is 64; only 32"),
        ("CosyVoice3LM", "CosyVoice2LM", "llm must be a CosyVoice3LM"),
        ("CausalMaskedDiffWithDiT", "MaskedDiffWithXvec", "flow must be a CausalMaskedDiffWithDiT"),
        ("!new:cosyvoice.hifigan.generator.CausalHiFTGenerator", "", "hift must be a CausalHiFT"),
        ("llm: !new", "llm2: !new", "llm is missing"),
        ("<chunk_size>", "<chunksize>", "does not exist"),
        ("version: cosyvoice3", "version: cosyvoice2", "get_tokenizer.version"),
    ],
)
def test_a_wrong_value_names_file_and_key(
    model_dir: Path, old: str, new: str, message: str
) -> None:
    file = model_dir / "cosyvoice3.yaml"
    text = file.read_text()
    assert old in text
    replace_bytes(file, text.replace(old, new, 1).encode())
    with pytest.raises(ModelFilesError, match=re.escape(message)) as caught:
        read_config(model_dir)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"hidden_size": 32', '"hidden_size": 30', "llm.llm_input_size is 32; only 30"),
        ('"num_attention_heads": 4', '"num_attention_heads": 3', "multiple of"),
        ('"num_key_value_heads": 2', '"num_key_value_heads": 3', "multiple of 3"),
        ('"hidden_act": "silu"', '"hidden_act": "gelu"', "hidden_act is 'gelu'"),
        ('"use_sliding_window": false', '"use_sliding_window": true', "use_sliding_window"),
        ('"vocab_size": 960', '"vocab_size": null', "vocab_size must be an integer"),
        ('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN', "rms_norm_eps must be a number"),
        ("{", "[", "not valid JSON"),
    ],
)
def test_a_wrong_qwen_value_is_named(
    model_dir: Path, golden_model: Path, old: str, new: str, message: str
) -> None:
    (model_dir / "CosyVoice-BlankEN").unlink()
    shutil.copytree(golden_model / "CosyVoice-BlankEN", model_dir / "CosyVoice-BlankEN")
    file = model_dir / "CosyVoice-BlankEN" / "config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(ModelFilesError, match=re.escape(message)):
        read_config(model_dir)


def test_unreadable_configurations_are_refused(model_dir: Path) -> None:
    file = model_dir / "cosyvoice3.yaml"
    for data in (b"\xff\xfe\x00", b"x" * 2_000_000):
        replace_bytes(file, data)
        with pytest.raises(ModelFilesError, match=re.escape(str(file))):
            read_config(model_dir)
    file.unlink()
    with pytest.raises(ModelFilesError, match="is missing"):
        read_config(model_dir)


@pytest.mark.parametrize("name", ["cosyvoice.yaml", "cosyvoice2.yaml"])
def test_older_models_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("sample_rate: 24000\n")
    with pytest.raises(ModelFilesError, match="only CosyVoice3 models"):
        read_config(tmp_path)


# Which directory.


def test_model_directory_order(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(MODEL_DIR_VARIABLE, raising=False)
    bundled, note = resolve_model_dir()
    assert bundled.parts[-2:] == ("assets", "nano")
    assert "RANDOM" in note
    local = Path("pretrained_models/Fun-CosyVoice3-0.5B")
    local.mkdir(parents=True)
    assert resolve_model_dir()[0] == local
    monkeypatch.setenv(MODEL_DIR_VARIABLE, str(golden_model))
    assert resolve_model_dir()[0] == golden_model
    given, note = resolve_model_dir(tmp_path)
    assert given == tmp_path
    assert str(tmp_path) in note


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_missing_directory_says_where_models_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    absent = tmp_path / "absent"
    monkeypatch.setenv(MODEL_DIR_VARIABLE, str(absent))
    with pytest.raises(ModelFilesError, match="FunAudioLLM/Fun-CosyVoice3-0.5B-2512") as caught:
        resolve_model_dir(absent if how == "argument" else None)
    assert "cosyvoice init-model" in str(caught.value)
