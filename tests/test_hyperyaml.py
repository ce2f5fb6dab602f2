"""hyperyaml: the published grammar as data, nothing executed, every bound held."""

import contextlib
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosyvoice.errors import ModelFilesError
from cosyvoice.hyperyaml import MAX_CHARACTERS, Tagged, read


def test_golden_file_reads_as_data(golden_model: Path) -> None:
    values = read((golden_model / "cosyvoice3.yaml").read_text())
    assert values["__set_seed1"] == Tagged("apply:random.seed", [1986])
    assert values["llm"].tag == "new:cosyvoice.llm.llm.CosyVoice3LM"
    assert values["llm"].value["llm_input_size"] == values["llm_input_size"]
    decoder = values["flow"].value["decoder"].value
    assert decoder["estimator"].value["static_chunk_size"] == 50
    assert decoder["cfm_params"].value["content"]["sigma_min"] == 1e-6
    assert values["feat_extractor"].value["fmax"] is None
    assert values["feat_extractor"].value["center"] is False


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-6", 1e-6),
        ("1e-06", 1e-6),
        ("-2.5E3", -2500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("'1e-6'", "1e-6"),
        ("010", 10),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("True", True),
        ("off", False),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!tuple (1, 1e-3, a)", (1, 1e-3, "a")),
        ("!tuple [1, [2]]", (1, [2])),
        ("!module:os.path", Tagged("module:os.path", "")),
        ("!PLACEHOLDER", Tagged("PLACEHOLDER", "")),
        ("!name:os.system {command: ls}", Tagged("name:os.system", {"command": "ls"})),
    ],
)
def test_scalars_and_tags(scalar: str, value: object) -> None:
    read_value = read(f"a: {scalar}")["a"]
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("<two>", 2),
        ("<two> * <three>", 6),
        ("<two>*<three>+1", 7),
        ("1 + <two> * <three> ** <two>", 19),
        ("-<two> ** 2", -4),
        ("2 ** 3 ** 2", 512),
        ("2 ** -1", 0.5),
        ("(<two> + 1) // 2", 1),
        ("7 / <two>", 3.5),
        ("1e-3 * <two>", 2e-3),
        ("--<two>", 2),
        ("<nested[inner]> - 1", 6),
        ("<nested[list][1]>", 20),
        ("<alias[inner]>", 7),
        ("<object[size]>", 3),
        ("<name>/<two>", "run/2"),
        ("results/<two>", "results/2"),
    ],
)
def test_references(expression: str, value: object) -> None:
    text = (
        "two: 2\nthree: !ref <two> + 1\nname: run\n"
        "nested:\n  inner: 7\n  list: [10, 20]\n  own: !ref <nested[inner]>\n"
        "alias: !ref <nested>\nobject: !new:a.B {size: 3}\n"
        f"result: !ref {expression}\n"
    )
    result = read(text)["result"]
    assert result == value
    assert type(result) is type(value)


def test_a_copy_is_a_separate_value() -> None:
    values = read("a: {b: [1]}\nc: !copy <a>")
    values["a"]["b"].append(2)
    assert values["c"] == {"b": [1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !ref <b>", "does not exist"),
        ("a: {b: 1}\nc: !ref <a[x]>", "does not exist"),
        ("a: [1]\nc: !ref <a[1]>", "does not exist"),
        ("a: !ref <a>", "refers to itself"),
        ("a: !ref <b> + 1\nb: !ref <a> + 1", "refers to itself"),
        ("a: !ref <b>\nb: !ref <a>\nc: !ref <a[x]>", "refers to itself"),
        ("a: &x [*x]", "refers to itself"),
        ("a: !ref 9**9**9", "larger than"),
        ("a: !ref 2**62", "larger than"),
        ("a: !ref 1e400 * 2", "larger than"),
        ("a: !ref 1 // 0", "divides by zero"),
        ("a: !ref 0 ** -1", "no real value"),
        ("a: !ref (-8) ** 0.5", "no real value"),
        ("a: !ref 1 +", "not an arithmetic"),
        ("a: !ref (1", "not an arithmetic"),
        ("a: !ref 1 2", "not an arithmetic"),
        (f"a: !ref {'(' * 400}1{')' * 400}", "nested too deep"),
        (f"a: !ref {'1**' * 300}1", "nested too deep"),
        ("b: {}\na: !ref <b> * 2", "only numbers and strings"),
        ("a: !include:other.yaml", "!include"),
        ("a: !!python/object/apply:os.system ['true']", "not allowed"),
        ("a: !!timestamp 2024-01-01", "not allowed"),
        ("a: !!int many", "not of the type"),
        ("a: 1\na: 2", "twice"),
        ("? [1]\n: 2", "plain word"),
        ("a: !tuple 1", "needs a list"),
        ("- 1", "top level"),
        ("", "top level"),
        ("a: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ('a: "\\UFFFFFFFF"', "not valid YAML"),
        (f"%YAML {'9' * 5000}.1\n--- a", "not valid YAML"),
        ("a: 1" + "0" * 400, "too large"),
        (f"a: {'[' * 200}", "levels deep"),
        ("x" * (MAX_CHARACTERS + 1), "longer than"),
    ],
)
def test_malformed_and_hostile_text_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ModelFilesError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_billion_laughs_are_refused() -> None:
    by_alias = "a0: &a0 [1, 1]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
    )
    by_reference = "a0: 1\n" + "".join(
        f"a{i}: [{', '.join([f'!ref <a{i - 1}>'] * 10)}]\n" for i in range(1, 30)
    )
    by_text = "a0: xxxxxxxxxx\n" + "".join(
        f"a{i}: !ref <a{i - 1}><a{i - 1}>\n" for i in range(1, 30)
    )
    for text in (by_alias, by_reference):
        with pytest.raises(ModelFilesError, match="expands to more than"):
            read(text)
    with pytest.raises(ModelFilesError, match="longer than|expands to more than"):
        read(by_text)


def test_nothing_is_imported_or_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    text = (
        f"a: !apply:os.mkdir ['{witness}']\nb: !new:antigravity.X {{}}\nc: !name:this.d {{}}\n"
        f"d: !module:antigravity\ne: !new:pathlib.Path.touch ['{witness}']\n"
    )
    before = set(sys.modules)
    assert read(text)["a"] == Tagged("apply:os.mkdir", [str(witness)])
    assert not witness.exists()
    assert not {"antigravity", "this"} & (set(sys.modules) - before)


numbers = st.integers(-9, 9).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.builds(
        lambda a, sign, b: f"({a}) {sign} ({b})",
        inner,
        st.sampled_from(["+", "-", "*", "/", "//"]),
        inner,
    ),
    max_leaves=12,
)


@given(expressions)
def test_arithmetic_agrees_with_python(expression: str) -> None:
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        with pytest.raises(ModelFilesError, match="divides by zero"):
            read(f"a: !ref {expression}")
        return
    assert math.isclose(read(f"a: !ref {expression}")["a"], expected, rel_tol=1e-12)


@given(st.text(alphabet="ab:{}[]<>!&*ref -\n'\"1.e()#|%?,", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ModelFilesError):
        assert isinstance(read(text), dict)
