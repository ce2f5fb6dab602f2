"""Text -> segments, heads and pieces: the golden rows, the worked examples, the laws."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosyvoice.config import OURS, REFERENCE
from cosyvoice.errors import BadRequest
from cosyvoice.text import (
    PREFIX,
    SEPARATOR,
    PieceBuffer,
    TextFrontEnd,
    Tokenizer,
    Wetext,
    complete_instruction,
    complete_transcript,
    is_speakable,
    require_head,
    split_head,
)
from cosyvoice.text.normalize import drop_blanks
from cosyvoice.text.special_tokens import ADDED_TOKENS
from cosyvoice.text.split import CHINESE, ENGLISH, split
from cosyvoice.text.spoken import MAX_WHOLE_CHARS, DigitSpeller

GOLDEN = Path(__file__).parent / "golden"
ROWS = json.loads((GOLDEN / "8_text.json").read_text("utf-8"))["rows"]
D = "一二三四五六七八九十"

any_text = st.text()
awkward_text = st.text("\"”'\\{}[]<|>()（）。.?!;、,- \n\t\x00019²٣aZé中あ한😀", max_size=30)
laws = settings(deadline=None, max_examples=150)


class AsWritten:
    """Leaves figures as they are."""

    def chinese(self, text: str) -> str:
        return text

    def english(self, text: str) -> str:
        return text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "model")


@pytest.fixture(scope="module")
def front_end(tokenizer: Tokenizer) -> TextFrontEnd:
    return TextFrontEnd(tokenizer, Wetext())


# --- Normalisation ---


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:20])
def test_front_end_gives_the_golden_segments(front_end: TextFrontEnd, row: dict) -> None:
    segments, whole = front_end.segments(row["text"]), front_end.normalize(row["text"])
    if row["wetext018"] == {"any": True}:
        assert segments
        assert whole
    else:
        assert (segments, whole) == (row["wetext018"], row["wetext018_nosplit"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:20])
def test_front_end_without_wetext_gives_the_golden_segments(
    tokenizer: Tokenizer, row: dict
) -> None:
    bare = TextFrontEnd(tokenizer, AsWritten())
    assert bare.segments(row["text"]) == row["none"]
    assert bare.normalize(row["text"]) == row["none_nosplit"]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        (
            "今天是2025年1月1日，气温-5℃，涨幅3.5%。",
            ["今天是二零二五年一月一日，气温负五摄氏度，涨幅百分之三点五。"],
        ),
        ("我 喜欢 GPT 4 模型（很好）——真的，", ["我喜欢GPT四模型很好 真的。"]),
        ("你好.\n世界 - 再见,", ["你好。世界-再见。"]),
        ("面积5m²", ["面积五平方米。"]),
        ("I have 2 cats, don't I?", ["I have two cats, don't I?"]),
        ("...", []),
        ("<|zh|>你好 5", ["<|zh|>你好 5"]),
        ("", [""]),
        (" \n", []),
        ('。"', []),
    ],
)
def test_worked_examples(front_end: TextFrontEnd, text: str, segments: list[str]) -> None:
    assert front_end.segments(text) == segments


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("2024", "two thousand and twenty-four"),
        ("007", "seven"),
        ("1st", "onest"),
        ("5%", "five%"),
        ("x²", "xzero"),
        ("9" * 40, " ".join(["nine"] * 40)),
    ],
)
def test_digits_are_spelled(written: str, words: str) -> None:
    assert DigitSpeller().spell(written) == words


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a b", "a b"), ("a  b", "ab"), (" a", " a"), (" 中", "中"), ("a 中 b", "a中b"), ("a ", "a")],
)
def test_blanks_stay_between_ascii_only(text: str, kept: str) -> None:
    assert drop_blanks(text) == kept


def test_quotes_and_backslashes_are_not_spoken_twice(tokenizer: Tokenizer) -> None:
    ours = TextFrontEnd.under(OURS, tokenizer)
    assert ours.segments('"What?" she said. C:\\x') == ['"What?" she said. C:\\x.']
    assert ours.normalize('他说"3个"') == '他说"三个"'
    assert ours.normalize('他说\\"个') == '他说\\"个'
    reference = TextFrontEnd.under(REFERENCE, tokenizer)
    assert reference.normalize('"What?"') == '\\"What?\\"'


def test_a_lone_number_is_english_but_under_the_reference(tokenizer: Tokenizer) -> None:
    assert TextFrontEnd.under(OURS, tokenizer).normalize("5") == "five"
    assert TextFrontEnd.under(REFERENCE, tokenizer).normalize("5") == "五"


def test_one_sentence_the_grammar_refuses_does_not_spoil_the_others(
    front_end: TextFrontEnd,
) -> None:
    assert front_end.normalize("We ordered item #1 today. It weighs 3.5 km.") == (
        "We ordered item #one today. It weighs three point five kilometers."
    )


@pytest.mark.parametrize(
    "sentence",
    ["Mr. Smith paid $19.99 on March 5, 2024, at noon.\n", "会议是2024年3月5日，涨了3.5%。"],
)
def test_a_long_text_reads_like_its_sentences(front_end: TextFrontEnd, sentence: str) -> None:
    n_sentences = 2 * MAX_WHOLE_CHARS // len(sentence)
    once = front_end.normalize(sentence)
    joint = "" if "。" in once else " "
    assert front_end.normalize(sentence * n_sentences) == joint.join([once] * n_sentences)


@pytest.mark.parametrize(
    "unit", ["会议是2024年3月5日上午10:30，在大楼里举行。", "中", "a", "，", "1"]
)
def test_a_hundred_kilobytes_do_not_hang(front_end: TextFrontEnd, unit: str) -> None:
    n_bytes = 10_000 if unit == "1" else 100_000  # digits are slow, but in proportion
    text = unit * (n_bytes // len(unit.encode()))
    start_s = time.monotonic()
    front_end.segments(text)
    assert time.monotonic() - start_s < 30, "takes about two seconds on an idle core"


def test_half_a_surrogate_pair_is_no_error(front_end: TextFrontEnd) -> None:
    assert front_end.segments("Hi \ud83d\ude00 5\ud83d") == ["Hi 😀 five\ufffd."]


@settings(deadline=None, max_examples=300)
@given(text=awkward_text | any_text)
def test_any_string_can_be_normalised(front_end: TextFrontEnd, text: str) -> None:
    assert isinstance(front_end.normalize(text), str)
    segments = front_end.segments(text)
    assert all(segments) or segments == [text]
    if is_speakable(text) and "\x00" not in text:
        assert segments


def test_many_threads_get_the_same_segments(front_end: TextFrontEnd) -> None:
    texts = [row["text"] for row in ROWS if len(row["text"]) < 60]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(front_end.segments, texts)) == [front_end.segments(t) for t in texts]


@pytest.mark.parametrize(
    ("text", "speakable"),
    [
        ("Hi", True),
        ("5", True),
        ("[breath]", True),
        (" 。！…", False),
        ("", False),
        ("😀", False),
        (PREFIX + "...", False),
        (PREFIX + "你", True),
    ],
)
def test_text_of_signs_cannot_be_spoken(text: str, *, speakable: bool) -> None:
    assert is_speakable(text) is speakable


# --- Splitting ---


def han(*n_characters: int) -> str:
    """Sentences of so many characters, full stop included."""
    return "".join((D * 13)[: n - 1] + "。" for n in n_characters)


@pytest.mark.parametrize(
    ("sentences", "segments"),
    [
        ((71, 11, 12), [71, 23]),
        ((71, 21), [71, 21]),
        ((71, 19), [90]),
        ((61, 21, 31), [61, 52]),
        ((121, 31), [121, 31]),
        ((21, 43, 21, 11), [64, 32]),
    ],
)
def test_chinese_is_cut_by_characters(sentences: tuple[int, ...], segments: list[int]) -> None:
    assert [len(s) for s in split(han(*sentences), CHINESE)] == segments
    assert [len(s) for s in split(han(*sentences)[:-1], CHINESE)] == segments


def test_english_is_cut_by_tokens() -> None:
    text = "".join(" a" * (n - 1) + "." for n in (61, 20, 19))
    assert [n_words(s) for s in split(text, ENGLISH, length=n_words)] == [61, 39]


def n_words(text: str) -> int:
    return text.count(" ") + text.count(".")


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("你好。。世界", ["你好。世界。"]),
        ('他说："走。"然后', ['他说："走。"然后。']),
        ('走。。"然后', ['走。"然后。']),
        ('。"走', ['"走。']),
        ("。", []),
        ("", []),
    ],
)
def test_quotes_and_repeated_enders(text: str, segments: list[str]) -> None:
    assert split(text, CHINESE) == segments


def test_short_english_is_one_segment() -> None:
    text = "Hello, world. How are you? fine"
    assert split(text, ENGLISH) == [text + "."]


@laws
@given(text=awkward_text | any_text | st.text('中。.!"” ', max_size=400))
@pytest.mark.parametrize("punctuation", [CHINESE, ENGLISH])
def test_splitting_keeps_everything_but_enders(text: str, punctuation) -> None:
    segments = split(text, punctuation)
    without_enders = str.maketrans("", "", punctuation.enders)
    assert "".join(segments).translate(without_enders) == text.translate(without_enders)
    assert all(segments)


# --- The prompt convention ---


def test_a_head_is_put_where_there_is_none() -> None:
    assert complete_transcript("你好") == PREFIX + "你好"
    assert complete_instruction(" 请用广东话表达。") == (
        "You are a helpful assistant. 请用广东话表达。<|endofprompt|>"
    )
    assert complete_instruction("You are a helpful assistant. Whisper.") == (
        "You are a helpful assistant. Whisper.<|endofprompt|>"
    )
    assert complete_instruction(" ") == PREFIX


@laws
@given(text=st.text(), head=st.text() | st.just(PREFIX))
def test_a_head_is_put_once_and_comes_off(text: str, head: str) -> None:
    for complete in (complete_transcript, complete_instruction):
        assert complete(complete(text)) == complete(text)
        assert SEPARATOR in complete(text)
    assert split_head(head + SEPARATOR + text)[0].endswith(SEPARATOR)
    assert "".join(split_head(head + SEPARATOR + text)) == head + SEPARATOR + text
    assert split_head(complete_transcript("x" + text))[1] == "x" + text


def test_the_reference_demands_a_head() -> None:
    assert require_head(PREFIX + "x", "prompt_text") == PREFIX + "x"
    with pytest.raises(BadRequest, match=r"prompt_text has no .*begin it with"):
        require_head("x", "prompt_text")


# --- Text that arrives in pieces ---


def pushed(pieces: list[str]) -> list[str]:
    buffer = PieceBuffer()
    return [*(buffer.push(piece) for piece in pieces), buffer.finish()]


@pytest.mark.parametrize(
    ("pieces", "outputs"),
    [
        (["Hel", "lo, wor", "ld. "], ["", "Hello,", " world.", " "]),
        (["你好", "，世", "界。"], ["你好", "，世", "界。", ""]),
        (["我有1", "2个", "コーヒー"], ["我有", "12个", "コーヒー", ""]),
        (["don", "'", "t well-", "known"], ["", "", "don't", "", " well-known"]),
        (["a[bre", "ath]b", "<"], ["a", "[breath]", "b", "<"]),
        (["x < ", "y"], ["x <", "", " y"]),
        (["<|endof", "prompt|>你"], ["", "<|endofprompt|>你", ""]),
        (["a" * 99, "aa", "a"], ["", "a" * 101, "", "a"]),
    ],
)
def test_what_may_grow_waits(pieces: list[str], outputs: list[str]) -> None:
    assert pushed(pieces) == outputs


@laws
@given(pieces=st.lists(st.text("ab3é '’-<[|>]/中。strong" + "\u0301", max_size=60)))
def test_pieces_joined_are_the_text(pieces: list[str]) -> None:
    assert "".join(pushed(pieces)) == "".join(pieces)


words = st.sampled_from(["don't", "hello", "Straße", "42", "well-known", "a", *ADDED_TOKENS])
prose = st.lists(
    words | words.map(lambda word: word + " ") | words.map(lambda word: word + ", ")
).map("".join)


@laws
@given(text=prose, data=st.data())
def test_prose_in_pieces_gives_the_same_ids(
    tokenizer: Tokenizer, text: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [i for output in pushed(pieces) for i in tokenizer.encode(output)]
    assert ids == tokenizer.encode(text)
