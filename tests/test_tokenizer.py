"""Text -> ids and back: the golden ids, the laws of special tokens, files that are broken."""

import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from cosyvoice.errors import ModelFilesError
from cosyvoice.text import Tokenizer
from cosyvoice.text.special_tokens import ADDED_TOKENS

GOLDEN = Path(__file__).parent / "golden"
STRINGS = json.loads((GOLDEN / "1_tokenizer.json").read_text("utf-8"))

# Unassigned characters may compose in one Unicode version and not in the next.
any_text = st.text(st.characters(exclude_categories=("Cn", "Cs")))
laws = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "model")


@pytest.mark.parametrize("row", STRINGS["strings"], ids=lambda row: row["text"][:20])
def test_tokenizer_gives_the_golden_ids(tokenizer: Tokenizer, row: dict) -> None:
    assert tokenizer.encode(row["text"]) == row["ids"]


def test_special_tokens_have_the_golden_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.specials == STRINGS["added_token_ids"]
    assert tokenizer.endofprompt == STRINGS["endofprompt_id"]
    assert len(tokenizer) == STRINGS["n_tokens"]


@laws
@given(text=any_text)
def test_decode_gives_the_composed_text_back(tokenizer: Tokenizer, text: str) -> None:
    assume("<" not in text and "[" not in text)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@laws
@given(left=any_text, special=st.sampled_from(ADDED_TOKENS), right=any_text)
def test_a_special_token_parts_the_text(
    tokenizer: Tokenizer, left: str, special: str, right: str
) -> None:
    assume("<" not in left + right and "[" not in left + right)
    ids = tokenizer.encode(left + special + right)
    assert ids == [*tokenizer.encode(left), tokenizer.specials[special], *tokenizer.encode(right)]
    composed = [unicodedata.normalize("NFC", side) for side in (left, right)]
    assert tokenizer.decode(ids) == special.join(composed)


def test_merges_cut_to_nothing_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, words=("ab",), merges="#version: 0.2\n")
    with pytest.raises(ModelFilesError, match="merges.txt is unusable: it merges nothing"):
        Tokenizer(tmp_path)


def test_half_a_surrogate_pair_is_no_error(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")
    assert tokenizer.encode("a\ud83d") == tokenizer.encode("a\ufffd")


def test_many_threads_get_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [row["text"] for row in STRINGS["strings"]] * 8
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(t) for t in texts]


def write_model(
    root: Path, *, words: tuple[str, ...] = (), merges: str = "#version: 0.2\n"
) -> Path:
    folder = root / "CosyVoice-BlankEN"
    folder.mkdir()
    vocab = [*sorted(ByteLevel.alphabet()), *words]
    specials = {str(len(vocab)): {"content": "<|endoftext|>"}}
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text(merges)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": specials}))
    return folder


def test_a_word_without_a_merge_stays_in_pieces(tmp_path: Path) -> None:
    write_model(tmp_path, words=("ab", "cd"), merges="#version: 0.2\na b\n")
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("ab cd")] == ["ab", " ", "c", "d"]
    assert tokenizer.endofprompt == len(ByteLevel.alphabet()) + 2 + 3  # words, file's own, im_*


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": 0, "b": 7}'),
        ("vocab.json", '{"a": 0}'),
        ("vocab.json", '{"a": [0]}'),
        ("merges.txt", "#version: 0.2\na b\n"),
        ("merges.txt", "ab\n"),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"900": {"content": "<x>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"256": {}}}'),
        ("tokenizer_config.json", "\udcff"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    file = write_model(tmp_path) / name
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFilesError, match=f"{name} is unusable.*download"):
        Tokenizer(tmp_path)
    file.unlink()
    with pytest.raises(ModelFilesError, match=f"{name} is missing.*download"):
        Tokenizer(tmp_path)
