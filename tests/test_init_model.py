"""init-model: what it writes the loaders read, the same for the same seed, all or nothing."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from cosyvoice import hyperyaml
from cosyvoice.config import ModelConfig
from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.init_model import Writing, preset_config, weights, write_model
from cosyvoice.models.checkpoint import load_flow, load_llm, load_vocoder, read_config
from cosyvoice.models.flow import FlowPrompt
from cosyvoice.models.llm import KVSlots
from cosyvoice.models.noise import SourceNoise, flow_noise
from cosyvoice.models.vocoder import Vocoder

GOLDEN_FILES = {
    "README.md",
    "campplus.onnx",
    "cosyvoice3.yaml",
    "flow.pt",
    "hift.pt",
    "llm.pt",
    "speech_tokenizer_v3.onnx",
    "CosyVoice-BlankEN/config.json",
    "CosyVoice-BlankEN/generation_config.json",
    "CosyVoice-BlankEN/merges.txt",
    "CosyVoice-BlankEN/tokenizer_config.json",
    "CosyVoice-BlankEN/vocab.json",
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "nano"
    write_model(directory, "nano", seed=3)
    return directory


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def networks(directory: Path) -> list[nn.Module]:
    config = read_config(directory)
    return [load(directory, config) for load in (load_llm, load_flow, load_vocoder)]


# Round trip.


def test_sizes_survive_the_round_trip(nano: Path) -> None:
    vocabulary = json.loads((nano / "CosyVoice-BlankEN/vocab.json").read_text())
    written = preset_config("nano", len(vocabulary) + 283)
    assert read_config(nano) == written
    assert written.llm.hidden_size == 64
    assert written.llm.text_vocab_size % 64 == 0


def test_full_preset_has_the_published_sizes() -> None:
    config = preset_config("full", 1_000)
    assert config == ModelConfig()
    with torch.device("meta"):
        named = Vocoder(config.vocoder).named_parameters()
    n_gains = sum(p.shape[0] for name, p in named if weights.NORMALISED.fullmatch(name))
    # docs/spec/checkpoint.md section 1; the network itself holds no gains.
    n_published = 506_148_480 + 332_257_088 + 20_779_887
    assert weights.n_parameters(config) + n_gains == n_published


def test_every_tensor_of_the_file_arrives(nano: Path) -> None:
    llm, flow, vocoder = networks(nano)
    for model, name in ((llm, "llm.pt"), (flow, "flow.pt"), (vocoder, "hift.pt")):
        make = weights.MAKERS[name]
        drawn = make(read_config(nano), weights.Draw(f"3/{name}"))
        stored = torch.load(nano / name, weights_only=True)
        assert stored.keys() == drawn.keys()
        assert all(torch.equal(stored[key], drawn[key]) for key in stored)
        assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("name", ["llm.pt", "flow.pt", "hift.pt"])
def test_names_are_those_of_the_golden_model(golden_model: Path, name: str) -> None:
    golden = torch.load(golden_model / name, weights_only=True)
    drawn = weights.MAKERS[name](read_config(golden_model), weights.Draw("0"))
    assert {key: t.shape for key, t in drawn.items()} == {k: t.shape for k, t in golden.items()}


def test_yaml_has_the_structure_of_the_golden_one(nano: Path, golden_model: Path) -> None:
    ours, theirs = (
        outline(hyperyaml.read((directory / "cosyvoice3.yaml").read_text()))
        for directory in (nano, golden_model)
    )
    assert ours == theirs


def outline(value: object) -> object:
    """Keys and tags, without the numbers."""
    if isinstance(value, hyperyaml.Tagged):
        return value.tag, outline(value.value)
    return {key: outline(v) for key, v in value.items()} if isinstance(value, dict) else None


def test_unused_head_shares_the_storage_of_the_text_table(nano: Path) -> None:
    stored = torch.load(nano / "llm.pt", weights_only=True)
    table, head = (stored[f"llm.model.{k}.weight"] for k in ("model.embed_tokens", "lm_head"))
    assert table.data_ptr() == head.data_ptr()


# Determinism.


def test_same_seed_same_bytes(nano: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    write_model(tmp_path / "nano", "nano", seed=3)
    assert files(tmp_path / "nano") == files(nano)
    assert files(nano).keys() == GOLDEN_FILES
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_changes_every_large_file(nano: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "nano", "nano", seed=4)
    mine, theirs = files(tmp_path / "nano"), files(nano)
    for name in ("llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v3.onnx"):
        assert mine[name] != theirs[name]


def test_half_precision_halves_the_files(nano: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "half", "nano", seed=3, writing=Writing(storage="fp16"))
    pairs = zip(networks(tmp_path / "half"), networks(nano), strict=True)
    for a, b in pairs:
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert p.dtype == q.dtype
            assert torch.allclose(p, q, rtol=2e-3, atol=1e-3)
    assert (tmp_path / "half/llm.pt").stat().st_size < 0.52 * (nano / "llm.pt").stat().st_size


# What comes out of the networks.


@pytest.mark.parametrize("seed", [0, 1])
def test_the_random_voice_is_audible_and_not_clipped(tmp_path: Path, seed: int) -> None:
    config = write_model(tmp_path / "m", "nano", seed=seed, writing=Writing(storage="fp16"))
    flow, vocoder = load_flow(tmp_path / "m", config), load_vocoder(tmp_path / "m", config)
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 6561, (50,), generator=draw).tolist()
    nobody = FlowPrompt((), torch.zeros(0, 80), torch.randn(192, generator=draw))
    with torch.inference_mode():
        state = flow.start(nobody, flow.solver(), flow_noise(), chunked=False)
        mel = flow.extend(state, tokens, last=True)
        f0 = vocoder.pitch(mel.T[None])
        audio = vocoder.extend(vocoder.start(SourceNoise.published(config)), mel, last=True)
    assert -8 < mel.mean() < -2
    assert ((f0 > 80) & (f0 < 300)).float().mean() > 0.3
    assert 0.02 < audio.square().mean().sqrt() < 0.3
    assert (audio.abs() > 0.98).float().mean() < 0.02


def test_llm_logits_are_neither_flat_nor_certain(nano: Path) -> None:
    config = read_config(nano)
    llm = load_llm(nano, config)
    cache = KVSlots(config.llm, 1, 64, device="cpu", dtype=torch.float32)
    items = torch.tensor([[config.llm.sos, ~5, ~300, config.llm.task, 17]])
    with torch.inference_mode():
        logits: Tensor = llm.logits(llm(llm.embed(items), cache, [cache.take()]))
    assert (logits.std(dim=-1) > 1).all()
    assert (logits.softmax(dim=-1).max(dim=-1).values < 0.5).all()


# ONNX stand-ins.


@pytest.mark.parametrize("n_frames", [1, 4, 5, 99, 3000])
def test_speech_tokenizer_gives_an_id_for_four_frames(nano: Path, n_frames: int) -> None:
    session = onnxruntime.InferenceSession(nano / "speech_tokenizer_v3.onnx")
    assert [i.name for i in session.get_inputs()] == ["feats", "feats_length"]
    feats = np.random.default_rng(0).normal(0.5, 0.5, (1, 128, n_frames)).astype(np.float32)
    length = np.array([n_frames], np.int32)
    (ids,) = session.run(["indices"], {"feats": feats, "feats_length": length})
    assert ids.dtype == np.int32
    assert ids.shape == (1, -(-n_frames // 4))
    assert ids.min() >= 0
    assert ids.max() <= 6560
    if n_frames == 3000:
        assert len(np.unique(ids)) > 400


def test_speaker_model_tells_voices_apart(nano: Path) -> None:
    session = onnxruntime.InferenceSession(nano / "campplus.onnx")
    rng = np.random.default_rng(0)
    embeddings = []
    for scale, n_frames in ((1.0, 200), (1.0, 400), (3.0, 200)):
        fbank = (scale * rng.normal(size=(1, n_frames, 80))).astype(np.float32)
        (embedding,) = session.run(["output"], {"input": fbank})
        assert embedding.shape == (1, 192)
        assert embedding.dtype == np.float32
        embeddings.append(embedding[0])
    same, other = (np.linalg.norm(embeddings[0] - embeddings[i]) for i in (1, 2))
    assert np.linalg.norm(embeddings[0]) > 0.1
    assert same < 0.5 * other


# Tokenizer.


def test_tokenizer_encodes_and_decodes_any_text(nano: Path) -> None:
    qwen = nano / "CosyVoice-BlankEN"
    bpe = models.BPE.from_file(str(qwen / "vocab.json"), str(qwen / "merges.txt"))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "The other assistant, please. 我们的声音 \x00\n éß 🙂"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < 0.9 * len(text.encode())  # the merges are used
    n_base = len(json.loads((qwen / "vocab.json").read_text()))
    special = json.loads((qwen / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {n_base + i for i in range(3)} == set(map(int, special))
    assert read_config(nano).llm.text_vocab_size >= n_base + 283


# All or nothing.


def test_only_a_directory_of_ours_is_replaced_and_only_by_force(nano: Path, tmp_path: Path) -> None:
    ours, foreign, empty = tmp_path / "ours", tmp_path / "foreign", tmp_path / "empty"
    shutil.copytree(nano, ours)
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("irreplaceable")
    empty.mkdir()
    with pytest.raises(ModelFilesError, match="--force replaces it"):
        write_model(ours, "nano", seed=5)
    assert files(ours) == files(nano)
    for writing in (Writing(), Writing(force=True)):
        with pytest.raises(ModelFilesError, match="was not written by init-model"):
            write_model(foreign, "nano", writing=writing)
    assert files(foreign) == {"thesis.txt": b"irreplaceable"}
    write_model(ours, "nano", seed=5, writing=Writing(force=True))
    assert files(ours)["llm.pt"] != files(nano)["llm.pt"]
    write_model(empty, "nano", seed=3)
    assert files(empty) == files(nano)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "foreign", "ours"]


def test_a_write_cut_short_leaves_nothing(tmp_path: Path) -> None:
    lines: list[str] = []

    def stop_at_the_second(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "new", "nano", writing=Writing(report=stop_at_the_second))
    assert lines == ["writing llm.pt (1 of 3)", "writing flow.pt (2 of 3)"]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ModelFilesError, match=r"1.00 GB free and the model needs 3.44 GB: make room"
    ):
        write_model(tmp_path / "full", "full")
    assert not list(tmp_path.iterdir())


def test_a_missing_onnx_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFilesError, match=r"pip install 'cosyvoice\[onnx\]'"):
        write_model(tmp_path / "nano", "nano")
    assert not list(tmp_path.iterdir())


def test_unknown_presets_storages_and_targets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="nano, full"):
        write_model(tmp_path / "m", "huge")
    with pytest.raises(BadRequest, match="fp32, fp16"):
        write_model(tmp_path / "m", "nano", writing=Writing(storage="int8"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelFilesError, match="is a file"):
        write_model(tmp_path / "file", "nano")
    with pytest.raises(ModelFilesError, match="cannot write .*choose another place"):
        write_model(tmp_path / "file" / "m", "nano")


def test_the_bundled_model_is_complete_and_small() -> None:
    bundled = Path(weights.__file__).parents[1] / "assets" / "nano"
    assert files(bundled).keys() >= GOLDEN_FILES - {"README.md"}
    assert sum(map(len, files(bundled).values())) < 5_000_000
