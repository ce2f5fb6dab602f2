"""Text to ids and back: the byte-level BPE of the checkpoint plus CosyVoice3's special tokens.

Comes in: a model directory with `CosyVoice-BlankEN/{vocab.json,merges.txt,tokenizer_config.json}`.
Goes out: lists of ids, with nothing put before or after them. Special tokens are cut out of the
raw string before anything else; the rest is composed (NFC), so `decode` returns composed text.
May be shared between threads. Knows no prompt convention and no audio.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as BackEnd
from tokenizers.decoders import ByteLevel as BytesToText
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from cosyvoice.errors import ModelFilesError

from .special_tokens import ADDED_TOKENS, SEPARATOR

FOLDER = "CosyVoice-BlankEN"

# Qwen2: contractions, words with one leading sign, single digits, signs, line ends, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Qwen2-style tokenizer of one model directory."""

    def __init__(self, model_dir: Path | str) -> None:
        folder = Path(model_dir) / FOLDER
        vocab = _read_vocab(folder / "vocab.json")
        merges = _read_merges(folder / "merges.txt", vocab)
        specials = _read_specials(folder / "tokenizer_config.json", len(vocab))
        self._back_end = _build(vocab, merges, [*specials, *ADDED_TOKENS])
        self._n_words = len(vocab)

    def __len__(self) -> int:
        return self._back_end.get_vocab_size(with_added_tokens=True)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Every special token with its id, in order of the ids."""
        added = self._back_end.get_added_tokens_decoder()
        return {added[i].content: i for i in sorted(added)}

    @property
    def endofprompt(self) -> int:
        """The id that separates the system prefix from the text."""
        return self.specials[SEPARATOR]

    def encode(self, text: str) -> list[int]:
        """Turn text into ids, any string; the empty one gives none."""
        return self._back_end.encode(well_formed(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text, special tokens spelled out."""
        # The back end would read the characters of `[à]` as bytes, hence one call per kind.
        runs = groupby(ids, lambda i: i >= self._n_words)
        return "".join(self._names(run) if special else self._words(run) for special, run in runs)

    def _names(self, ids: Iterable[int]) -> str:
        return "".join(self._back_end.id_to_token(i) or "" for i in ids)

    def _words(self, ids: Iterable[int]) -> str:
        return self._back_end.decode(list(ids), skip_special_tokens=False)


def well_formed(text: str) -> str:
    """Join surrogate pairs that JSON left apart; a lone surrogate becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _build(vocab: dict[str, int], merges: list[tuple[str, str]], specials: list[str]) -> BackEnd:
    # ignore_merges=False: the published merges are fewer than the words of vocab.json, and a word
    # that no merge makes must not be found by looking it up whole.
    back_end = BackEnd(BPE(vocab=vocab, merges=merges, ignore_merges=False))
    back_end.normalizer = NFC()
    back_end.pre_tokenizer = Sequence(
        [Split(Regex(_WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    back_end.decoder = BytesToText()
    back_end.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in specials]
    )
    return back_end


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    ids = vocab.values()
    if not all(type(i) is int for i in ids) or set(ids) != set(range(len(vocab))):
        raise _broken(path, "its ids are not 0, 1, 2, ...")
    missing = set(ByteLevel.alphabet()) - vocab.keys()
    if missing:
        raise _broken(path, f"{len(missing)} of the 256 byte symbols have no id")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for n_line, line in enumerate(_read_text(path).split("\n"), start=1):
        line = line.strip()
        if not line or (n_line == 1 and line.startswith("#version:")):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise _broken(path, f"line {n_line} merges symbols that vocab.json does not have")
        merges.append((left, right))
    if not merges and len(vocab) > len(ByteLevel.alphabet()):
        raise _broken(path, "it merges nothing, and vocab.json has words")
    return merges


def _read_specials(path: Path, n_words: int) -> list[str]:
    """The specials the file declares; they must follow the words without a gap."""
    declared = _read_json(path).get("added_tokens_decoder")
    try:
        specials = {int(i): str(entry["content"]) for i, entry in declared.items()}  # type: ignore[union-attr]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, "added_tokens_decoder is not a table of tokens") from error
    if sorted(specials) != list(range(n_words, n_words + len(specials))):
        raise _broken(path, f"its special tokens do not follow the {n_words} words of vocab.json")
    return [specials[i] for i in sorted(specials)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise _broken(path, f"it is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise _broken(path, "it is not a JSON object")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelFilesError(
            f"{path} is missing; download the model again, or give another model directory"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, f"it cannot be read ({error})") from error


def _broken(path: Path, what: str) -> ModelFilesError:
    return ModelFilesError(f"{path} is unusable: {what}; download the model again")
