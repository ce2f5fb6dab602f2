"""A small byte-level BPE tokenizer in the Qwen2 style, learnt from a paragraph.

In: nothing but the text below. Out: merges and a vocabulary, always the same.
It knows neither files nor the special tokens, only how many ids those will need.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

FILE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # named in tokenizer_config.json
ROOM_FOR_SPECIALS = len(FILE_SPECIALS) + 280  # CosyVoice3 adds its own at load time
N_MERGES = 200

# Ordinary sentences, English and Chinese: enough for the most frequent pairs.
TEXT = """
You are a helpful assistant. The quick brown fox jumps over the lazy dog, and the dog does not mind.
It was the best of times, it was the worst of times; there is nothing in the world that we have not
heard before. Please say a sentence as loudly as possible. Would you like to come with me to the
station this evening? I think that they should have been here an hour ago. When the sunlight strikes
raindrops in the air, they act as a prism and form a rainbow. She said that her brother and his
friends were waiting for the other train. Reading and writing are things one learns by doing them.
收到好友从远方寄来的生日礼物，那份意外的惊喜与深深的祝福让我心中充满了甜蜜的快乐。
今天的天气很好，我们一起去公园走走吧。请用广东话表达。希望你以后能够做得比我还好。
这是一个很小的模型，它的声音是随机的。我不知道他们什么时候会来，但是我们可以在这里等他们。
"""


@dataclass(frozen=True)
class Tokenizer:
    """Base ids are 0 .. len(vocabulary) - 1; special tokens follow."""

    merges: tuple[tuple[str, str], ...]
    vocabulary: dict[str, int]

    @property
    def n_ids(self) -> int:
        return len(self.vocabulary) + ROOM_FOR_SPECIALS


def learn() -> Tokenizer:
    """Byte-pair encoding of TEXT: the most frequent pair is merged, ties in alphabetical order."""
    words = [tuple(word) for word in _words()]
    merges: list[tuple[str, str]] = []
    for _ in range(N_MERGES):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    symbols = [*sorted(byte_alphabet().values()), *map("".join, merges)]
    return Tokenizer(tuple(merges), {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))})


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it has one, else one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _words() -> Iterator[str]:
    """Words with the blank before them and runs of punctuation, in the byte alphabet."""
    alphabet = byte_alphabet()
    for word in re.findall(r" ?\w+| ?[^\w\s]+", " ".join(TEXT.split())):
        yield "".join(alphabet[byte] for byte in word.encode())


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    symbols: list[str] = []
    for symbol in word:
        # A symbol just merged is longer than pair[0], so "aaa" becomes "aa a" as BPE has it.
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return tuple(symbols)
