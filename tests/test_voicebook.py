"""Named voices: what goes in comes out, names stay inside the directory, damage is named."""

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from cosyvoice.errors import BadRequest, ModelFilesError, VoiceNotFound
from cosyvoice.voice import SPEAKER_FILE, TOKENIZER_FILE, VoiceEncoder
from cosyvoice.voicebook import VoiceBook, checked_name, default_voice_dir


@pytest.fixture(scope="module")
def encoder(golden_model: Path) -> VoiceEncoder:
    return VoiceEncoder(golden_model)


@pytest.fixture
def recording(golden: Path) -> Path:
    return golden / "prompt_b.wav"


@pytest.fixture
def book(tmp_path: Path, encoder: VoiceEncoder, recording: Path) -> VoiceBook:
    book = VoiceBook(tmp_path / "voices", encoder)
    book.add("Ada", recording, "what Ada said", consent="Ada herself, 2026")
    return book


def files(book: VoiceBook) -> list[str]:
    return sorted(path.name for path in book.directory.iterdir())


def test_a_stored_voice_is_the_encoded_one(book: VoiceBook, recording: Path) -> None:
    # a second book has nothing in memory
    stored = VoiceBook(book.directory, book._encoder).get("Ada")
    encoded = book._encoder.encode(recording, "what Ada said")
    assert stored.digest == encoded.digest
    assert stored.transcript == "what Ada said"
    assert files(book) == ["Ada.json", "Ada.safetensors"]


def test_the_card_describes_the_recording(book: VoiceBook, recording: Path) -> None:
    card = book.describe("Ada")
    assert (card.name, card.transcript, card.consent) == (
        "Ada", "what Ada said", "Ada herself, 2026",
    )  # fmt: skip
    assert (card.rate_hz, card.version) == (22050, 1)
    assert card.seconds == pytest.approx(1.93, abs=0.01)
    assert card.onnx_hash == book._encoder.fingerprint
    assert card.created.endswith("+00:00")
    assert book.recording("Ada").data == recording.read_bytes()


@pytest.mark.parametrize(
    "name", ["小明", "Zoë 2", "a", "v1.5", "-x-", "ジョン", "x" * 64, "한국어"]
)
def test_names_people_use(tmp_path: Path, book: VoiceBook, name: str, recording: Path) -> None:
    book.add(name, recording)
    assert name in book.names()
    assert book.get(name).can_clone
    book.remove(name)
    assert book.names() == ["Ada"]


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", ".hidden", "dot.", "a\0b", "a\nb",
     "x" * 65, "字" * 65, "a:b", "*", "\ud800", "con?", "~", "%2e%2e"],
)  # fmt: skip
def test_names_that_could_leave_the_directory(book: VoiceBook, name: str, recording: Path) -> None:
    calls = (
        lambda: book.add(name, recording),
        lambda: book.get(name),
        lambda: book.describe(name),
        lambda: book.remove(name),
        lambda: book.rename("Ada", name),
    )
    for call in calls:
        with pytest.raises(BadRequest, match="cannot name a voice") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert files(book) == ["Ada.json", "Ada.safetensors"]


def test_the_two_spellings_of_an_accent_are_one_name() -> None:
    assert checked_name("Zoe\u0308") == checked_name(" Zo\u00eb ") == "Zo\u00eb"


def test_an_unknown_name_lists_what_exists(book: VoiceBook, encoder: VoiceEncoder) -> None:
    for call in (book.get, book.describe, book.remove, book.recording):
        with pytest.raises(VoiceNotFound, match="there are: Ada"):
            call("Bob")
    with pytest.raises(VoiceNotFound, match="there are: Ada"):
        book.rename("Bob", "Eve")
    with pytest.raises(VoiceNotFound, match="none yet"):
        VoiceBook(book.directory / "absent", encoder).get("Ada")


def test_an_empty_book_lists_nothing_and_makes_no_directory(
    tmp_path: Path, encoder: VoiceEncoder
) -> None:
    assert VoiceBook(tmp_path / "none", encoder).names() == []
    assert not (tmp_path / "none").exists()


def test_a_taken_name_is_refused(book: VoiceBook, golden: Path) -> None:
    before = book.get("Ada").digest
    with pytest.raises(BadRequest, match="already"):
        book.add("Ada", golden / "prompt_a.wav")
    book.add("Bob", golden / "prompt_a.wav")
    with pytest.raises(BadRequest, match="already"):
        book.rename("Bob", "Ada")
    assert book.get("Ada").digest == before


def test_a_refused_recording_leaves_nothing(book: VoiceBook) -> None:
    with pytest.raises(BadRequest):
        book.add("Bob", b"no audio")
    assert files(book) == ["Ada.json", "Ada.safetensors"]


def test_rename_keeps_everything_but_the_name(book: VoiceBook) -> None:
    card, voice = book.describe("Ada"), book.get("Ada")
    book.rename("Ada", "Countess")
    assert files(book) == ["Countess.json", "Countess.safetensors"]
    assert book.get("Countess").digest == voice.digest
    assert book.describe("Countess").to_json() == card.to_json()


def test_other_models_encode_the_voice_again(
    book: VoiceBook, golden_model: Path, tmp_path: Path, recording: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(golden_model / TOKENIZER_FILE, other / TOKENIZER_FILE)
    speaker = onnx.load(golden_model / SPEAKER_FILE)
    shift = onnx.helper.make_node("Neg", ["unsigned"], [speaker.graph.output[0].name])
    for node in speaker.graph.node:
        node.output[:] = ["unsigned" if o == shift.output[0] else o for o in node.output]
    speaker.graph.node.append(shift)
    onnx.save(speaker, other / SPEAKER_FILE)

    old, card = book.get("Ada"), book.describe("Ada")
    moved = VoiceBook(book.directory, VoiceEncoder(other))
    voice = moved.get("Ada")
    assert torch.equal(voice.embedding, -old.embedding)
    assert voice.transcript == old.transcript
    again = moved.describe("Ada")
    assert again.onnx_hash == moved._encoder.fingerprint != card.onnx_hash
    assert (again.created, again.consent) == (card.created, card.consent)
    assert torch.equal(load_file(book.directory / "Ada.safetensors")["embedding"], voice.embedding)
    assert book.recording("Ada").data == recording.read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"version": 1}', b'{"seconds": []}'],
)
def test_a_damaged_card_is_named_and_the_others_stay(
    book: VoiceBook, recording: Path, content: bytes
) -> None:
    book.add("Bob", recording)
    (book.directory / "Ada.json").write_bytes(content)
    for call in (book.get, book.describe):
        with pytest.raises(ModelFilesError, match=r"Ada\.json .*remove the voice"):
            call("Ada")
    assert book.names() == ["Ada", "Bob"]
    assert book.get("Bob").can_clone
    book.remove("Ada")
    assert files(book) == ["Bob.json", "Bob.safetensors"]


def test_a_card_of_a_later_format_is_refused(book: VoiceBook) -> None:
    path = book.directory / "Ada.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(ModelFilesError, match="format 2, not 1"):
        book.get("Ada")


def test_damaged_tensors_are_named(book: VoiceBook) -> None:
    path = book.directory / "Ada.safetensors"
    whole, tensors = path.read_bytes(), load(path.read_bytes())
    for content in (b"", whole[:1000], whole[:-5], b"\xff" * 2000):
        path.write_bytes(content)
        with pytest.raises(ModelFilesError, match=r"Ada\.safetensors"):
            book.get("Ada")
    for wrong in (
        {"mel": torch.zeros(80, 4)},
        {"tokens": torch.zeros(4)},
        {"mel": torch.zeros(80)},
    ):
        save_file(tensors | wrong, path)
        with pytest.raises(ModelFilesError, match="other shapes"):
            book.get("Ada")
    del tensors["mel"]
    save_file(tensors, path)
    with pytest.raises(ModelFilesError, match=r"Ada\.safetensors"):
        book.get("Ada")
    path.unlink()
    for call in (book.get, lambda name: book.rename(name, "Eve")):
        with pytest.raises(ModelFilesError, match=r"Ada\.safetensors"):
            call("Ada")
    book.remove("Ada")
    assert files(book) == []


def test_a_voice_in_use_survives_its_file(book: VoiceBook) -> None:
    voice = book.get("Ada")
    with (book.directory / "Ada.safetensors").open("r+b") as file:
        file.truncate(10)  # a mapped tensor would end the process with SIGBUS
    assert voice.mel.isfinite().all()
    assert voice.digest


def test_an_altered_recording_is_not_encoded_again(book: VoiceBook) -> None:
    path = book.directory / "Ada.safetensors"
    tensors = load(path.read_bytes())
    tensors["recording"][100] += 1
    save_file(tensors, path)
    with pytest.raises(ModelFilesError, match="damaged"):
        book.recording("Ada")


def test_foreign_files_are_not_voices(book: VoiceBook) -> None:
    (book.directory / ".0123.part").touch()
    (book.directory / "notes.txt").touch()
    (book.directory / "orphan.safetensors").touch()
    (book.directory / ".json").touch()
    assert book.names() == ["Ada"]


def test_a_directory_that_cannot_be_made_is_named(
    tmp_path: Path, encoder: VoiceEncoder, recording: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelFilesError, match="choose another directory"):
        VoiceBook(tmp_path / "file" / "voices", encoder).add("Ada", recording)


def test_default_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_voice_dir() == tmp_path / "cosyvoice" / "voices"
    assert not default_voice_dir().exists()
