"""spk2info.pt: the reference's types and shapes, round trips, hostile files."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.config import EMBEDDING_SIZE, N_MELS
from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.spk2info import read_spk2info, write_spk2info
from cosyvoice.voice import Voice


def cloned(n_tokens: int = 6, n_frames: int = 13, ids: tuple[int, ...] | None = (7, 8, 9)) -> Voice:
    return Voice(
        embedding=torch.randn(EMBEDDING_SIZE),
        tokens=torch.arange(n_tokens, dtype=torch.int32),
        mel=torch.randn(n_frames, N_MELS),
        transcript_ids=ids,
    )


def entry(n_tokens: int = 6) -> dict[str, torch.Tensor]:
    """A stored speaker as the reference writes one."""
    words = torch.tensor([[7, 8, 9]], dtype=torch.int32)
    tokens = torch.arange(n_tokens, dtype=torch.int32)[None]
    mel, embedding = torch.randn(1, 2 * n_tokens, N_MELS), torch.randn(1, EMBEDDING_SIZE)
    lengths = [torch.tensor([t.shape[1]], dtype=torch.int32) for t in (words, tokens, mel)]
    return {
        "prompt_text": words,
        "prompt_text_len": lengths[0],
        "llm_prompt_speech_token": tokens,
        "llm_prompt_speech_token_len": lengths[1],
        "flow_prompt_speech_token": tokens,
        "flow_prompt_speech_token_len": lengths[1],
        "prompt_speech_feat": mel,
        "prompt_speech_feat_len": lengths[2],
        "llm_embedding": embedding,
        "flow_embedding": embedding,
    }


def test_written_entries_have_the_references_layout(tmp_path: Path) -> None:
    path = tmp_path / "spk2info.pt"
    write_spk2info(path, {"ada": cloned(), "bare": Voice(embedding=torch.randn(EMBEDDING_SIZE))})
    written, expected = torch.load(path, weights_only=True), entry()
    assert list(written) == ["ada", "bare"]
    assert written["ada"].keys() == expected.keys()
    for key, theirs in expected.items():
        assert (written["ada"][key].dtype, written["ada"][key].shape) == (
            theirs.dtype,
            theirs.shape,
        )
    assert written["bare"].keys() == {"embedding"}
    assert written["bare"]["embedding"].shape == (1, EMBEDDING_SIZE)
    assert [p.name for p in tmp_path.iterdir()] == ["spk2info.pt"]


@pytest.mark.parametrize("ids", [(7, 8, 9), ()])
def test_round_trip(tmp_path: Path, ids: tuple[int, ...]) -> None:
    voices = {
        "ada": cloned(ids=ids).aligned(),
        "小明": Voice(embedding=torch.randn(EMBEDDING_SIZE)),
    }
    write_spk2info(tmp_path / "s.pt", voices)
    read = read_spk2info(tmp_path / "s.pt")
    assert list(read) == list(voices)
    for name, voice in voices.items():
        assert read[name].digest == voice.digest
        assert read[name].transcript_ids == voice.transcript_ids
        assert read[name].is_embedding_only == voice.is_embedding_only


def test_golden_zero_shot_input_is_a_stored_voice(golden: Path, tmp_path: Path) -> None:
    tensors, start = load_file(golden / "2_features.safetensors"), "a.zero_shot."
    stored = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
    stored = {k: t for k, t in stored.items() if k not in ("text", "text_len")}
    torch.save({"a": stored}, tmp_path / "in.pt")
    write_spk2info(tmp_path / "out.pt", read_spk2info(tmp_path / "in.pt"))
    written = torch.load(tmp_path / "out.pt", weights_only=True)["a"]
    assert written.keys() == stored.keys()
    for key, theirs in stored.items():
        assert written[key].dtype == theirs.dtype
        assert torch.equal(written[key], theirs)


def test_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    embedding = torch.randn(1, EMBEDDING_SIZE)
    sft = {"embedding": embedding, "language": torch.zeros(1), "note": "from 2024"}
    torch.save({"sft": sft, "ada": entry() | {"extra": torch.zeros(3)}}, tmp_path / "s.pt")
    voices = read_spk2info(tmp_path / "s.pt")
    assert torch.equal(voices["sft"].embedding, embedding[0])
    assert voices["sft"].is_embedding_only
    assert voices["ada"].transcript_ids == (7, 8, 9)


def test_half_precision_vectors_become_float32(tmp_path: Path) -> None:
    torch.save({"a": {"embedding": torch.randn(1, EMBEDDING_SIZE).half()}}, tmp_path / "s.pt")
    assert read_spk2info(tmp_path / "s.pt")["a"].embedding.dtype == torch.float32


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('/tmp/cosyvoice-was-here', 'w')",)


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Hostile()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"a": Hostile()}, protocol=2))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(ModelFilesError, match="more than tensors"):
            read_spk2info(tmp_path / name)
    assert not Path("/tmp/cosyvoice-was-here").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    with pytest.raises(ModelFilesError, match="there is no file"):
        read_spk2info(path)
    write_spk2info(path, {"ada": cloned()})
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        with pytest.raises(ModelFilesError, match=r"s\.pt"):
            read_spk2info(path)


BROKEN = {
    "no dictionary": [1, 2],
    "no entry": {"a": 3},
    "empty id": {"": {"embedding": torch.zeros(1, EMBEDDING_SIZE)}},
    "number as id": {5: {"embedding": torch.zeros(1, EMBEDDING_SIZE)}},
    "nothing": {"a": {}},
    "another size": {"a": {"embedding": torch.zeros(1, 80)}},
    "a list": {"a": {"embedding": [0.0] * EMBEDDING_SIZE}},
    "integers": {"a": {"embedding": torch.zeros(1, EMBEDDING_SIZE, dtype=torch.int32)}},
    "not finite": {"a": {"embedding": torch.full((1, EMBEDDING_SIZE), torch.nan)}},
    "sparse": {"a": {"embedding": torch.zeros(1, EMBEDDING_SIZE).to_sparse()}},
    "float tokens": {"a": entry() | {"flow_prompt_speech_token": torch.zeros(1, 6)}},
    "negative tokens": {"a": entry() | {"flow_prompt_speech_token": -entry()["prompt_text"]}},
    "misaligned": {"a": entry() | {"prompt_speech_feat": torch.zeros(1, 13, N_MELS)}},
    "no words": {"a": {k: v for k, v in entry().items() if k != "prompt_text"}},
    "endless": {"a": entry() | {"prompt_text": torch.zeros(1, 1).int().expand(1, 10**12)}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_entries_that_are_no_voice_are_refused(tmp_path: Path, case: str) -> None:
    torch.save(BROKEN[case], tmp_path / "s.pt")
    with pytest.raises(ModelFilesError, match=r"s\.pt"):
        read_spk2info(tmp_path / "s.pt")


def test_what_cannot_be_stored_is_refused_before_the_file_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    path.write_bytes(b"old")
    words = Voice(
        embedding=cloned().embedding, tokens=cloned().tokens, mel=cloned().mel, transcript="hello"
    )
    for voices, reason in (({"": cloned()}, "not empty"), ({"a": words}, "tokenise")):
        with pytest.raises(BadRequest, match=reason):
            write_spk2info(path, voices)
    assert path.read_bytes() == b"old"
