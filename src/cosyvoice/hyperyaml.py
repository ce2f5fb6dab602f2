"""HyperPyYAML text as plain data: nothing is imported, called or executed.

In: the text of a file such as `cosyvoice3.yaml`. Out: dicts, lists, strings, numbers, and `Tagged`
where a tag (`!new:pkg.Class`, `!name:`, `!apply:`, `!module:`, `!PLACEHOLDER`) would have run code.
`!ref`, `!copy` and `!tuple` are carried out, since they only move data.
The text is not trusted: its size, depth, expansion and arithmetic are bounded, and what is over a
bound or malformed raises ModelFilesError. It does not know what the keys mean.
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from cosyvoice.errors import ModelFilesError

# The published file has 7 KB, 200 values and 6 levels.
MAX_CHARACTERS = 262_144
MAX_VALUES = 20_000  # counted after references and aliases are filled in
MAX_DEPTH = 64
MAX_REF_CHARACTERS = 1_000
MAX_NUMBER = 1e18

STANDARD_TAG = "tag:yaml.org,2002:"
REFERENCE = re.compile(r"<([^<>]*)>")
KEY_PATH = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")
ARITHMETIC_TOKEN = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|\*\*|//|[-+*/()])")

# Plain scalars. YAML 1.1 would take 1e-5 for a string, 010 for eight and 1:30 for ninety.
PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(
        r"true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF"
    ),
    "int": re.compile(r"[-+]?[0-9]{1,18}"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?"),
}
TRUE_WORDS = frozenset({"true", "yes", "on"})


@dataclass(frozen=True)
class Tagged:
    """A value under a tag that would have run code: `!new:pkg.Class` and its arguments."""

    tag: str  # without the exclamation mark
    value: Any


def read(text: str) -> dict[str, Any]:
    """The top-level mapping of `text`, references filled in."""
    if len(text) > MAX_CHARACTERS:
        raise ModelFilesError(
            f"longer than {MAX_CHARACTERS} characters: not a model's configuration"
        )
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\\U99999999" is a ValueError
        raise ModelFilesError(f"not valid YAML: {_one_line(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ModelFilesError("not a mapping of keys to values at its top level")
    return _Reading(root).mapping(root)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _where(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _kind(plain: str) -> str:
    """What an unquoted scalar is."""
    return next((name for name, pattern in PLAIN.items() if pattern.fullmatch(plain)), "str")


class _Loader(yaml.SafeLoader):
    """Composes nodes only; `_Reading` turns them into values, so no constructor ever runs."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ModelFilesError(f"nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return STANDARD_TAG + (_kind(value) if implicit[0] else "str")
        return STANDARD_TAG + ("map" if kind is yaml.MappingNode else "seq")


class _Reading:
    """One pass over the nodes of one text, with what it has spent so far."""

    def __init__(self, root: yaml.MappingNode) -> None:
        self.root = root
        self.n_values = 0
        self.open: list[int] = []  # ids of the nodes being read, outermost first

    def value(self, node: yaml.Node) -> Any:
        self.n_values += 1
        if self.n_values > MAX_VALUES:
            raise ModelFilesError(f"expands to more than {MAX_VALUES} values")
        if id(node) in self.open:
            raise ModelFilesError(f"{_where(node)}: refers to itself")
        if len(self.open) >= MAX_DEPTH:
            raise ModelFilesError(f"{_where(node)}: nested more than {MAX_DEPTH} levels deep")
        self.open.append(id(node))
        value = self._tagged(node) if node.tag.startswith("!") else self._plain(node)
        self.open.pop()
        return value

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            if key in values:
                raise ModelFilesError(f"{_where(key_node)}: the key {key} stands there twice")
            values[key] = self.value(value_node)
        return values

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag.startswith("!"):
            raise ModelFilesError(f"{_where(node)}: a key must be a plain word")
        return str(node.value)

    def _plain(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix(STANDARD_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and (kind == "str" or kind in PLAIN):
            return _scalar(kind, node)
        raise ModelFilesError(f"{_where(node)}: the tag !!{kind} is not allowed")

    def _tagged(self, node: yaml.Node) -> Any:
        tag = node.tag[1:]
        if tag in ("ref", "copy") and isinstance(node, yaml.ScalarNode):
            return self._reference(node)
        if tag == "tuple":
            return self._tuple(node)
        if tag.startswith("include"):
            raise ModelFilesError(
                f"{_where(node)}: !include is not supported; paste the file there"
            )
        return Tagged(tag, self._contents(node))

    def _contents(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        return node.value

    def _tuple(self, node: yaml.Node) -> tuple[Any, ...]:
        """`!tuple [1, 2]` and the older `!tuple (1, 2)`, whose content YAML takes for a string."""
        if isinstance(node, yaml.SequenceNode):
            return tuple(self.value(item) for item in node.value)
        inner = re.fullmatch(r"\((.*)\)", str(node.value).strip())
        if inner is None:
            raise ModelFilesError(f"{_where(node)}: !tuple needs a list such as [1, 2]")
        words = [word.strip() for word in inner[1].split(",") if word.strip()]
        return tuple(_word(word, node) for word in words)

    def _reference(self, node: yaml.ScalarNode) -> Any:
        """`<a>` alone is the value itself; between other text it is arithmetic or a string."""
        text = str(node.value).strip()
        whole = REFERENCE.fullmatch(text)
        if whole:
            return self._referred(whole[1], node)
        if len(text) > MAX_REF_CHARACTERS:
            raise ModelFilesError(f"{_where(node)}: longer than {MAX_REF_CHARACTERS} characters")
        parts: list[Any] = REFERENCE.split(text)  # literal, name, literal, name, ... literal
        literals = parts[0::2]
        parts[1::2] = [self._referred(name, node) for name in parts[1::2]]
        if all(_is_number(value) for value in parts[1::2]):
            tokens = _tokens(literals, parts[1::2])
            if tokens is not None:
                return _Arithmetic(tokens, f"{_where(node)}: !ref {text}").result()
        return self._joined(parts, node)

    def _joined(self, parts: list[Any], node: yaml.Node) -> str:
        if not all(isinstance(part, str) or _is_number(part) for part in parts):
            raise ModelFilesError(
                f"{_where(node)}: only numbers and strings can be combined: {node.value}"
            )
        joined = "".join(map(str, parts))
        if len(joined) > MAX_REF_CHARACTERS:
            raise ModelFilesError(f"{_where(node)}: longer than {MAX_REF_CHARACTERS} characters")
        return joined

    def _referred(self, name: str, node: yaml.Node) -> Any:
        """The value at `a[b][0]`. Only that part of `a` is read, so `a` may refer to itself."""
        path = KEY_PATH.fullmatch(name.strip())
        if path is None:
            raise ModelFilesError(f"{_where(node)}: <{name}> is not a key")
        target: yaml.Node | None = self.root
        for key in [path[1], *re.findall(r"\[([^\[\]]+)\]", path[2])]:
            target = self._child(target, key.strip())
        if target is None:
            raise ModelFilesError(f"{_where(node)}: <{name}> refers to a key that does not exist")
        return self.value(target)

    def _child(self, node: yaml.Node | None, key: str) -> yaml.Node | None:
        node = self._followed(node)
        if isinstance(node, yaml.MappingNode):
            return next((child for k, child in node.value if k.value == key), None)
        if isinstance(node, yaml.SequenceNode) and re.fullmatch(r"\d{1,6}", key):
            return node.value[int(key)] if int(key) < len(node.value) else None
        return None

    def _followed(self, node: yaml.Node | None) -> yaml.Node | None:
        """The node itself, or where it leads when it is a lone `!ref <a>`."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, yaml.ScalarNode) or node.tag not in ("!ref", "!copy"):
                return node
            name = REFERENCE.fullmatch(str(node.value).strip())
            if name is None or "[" in name[1]:
                return None
            keys = (child for key, child in self.root.value if key.value == name[1])
            node = next(keys, None)
        raise ModelFilesError("a chain of references refers to itself")


def _scalar(kind: str, node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    pattern = PLAIN.get(kind)
    if pattern is None:
        return text
    if not pattern.fullmatch(text):  # an explicit tag such as `!!int many`
        raise ModelFilesError(f"{_where(node)}: {text[:40]!r} is not of the type {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in TRUE_WORDS
    number = int(text) if kind == "int" else float(text)
    if math.isinf(number):
        raise ModelFilesError(f"{_where(node)}: {text[:40]} is too large a number")
    return number


def _word(text: str, node: yaml.Node) -> Any:
    kind = _kind(text)
    bare = text if kind != "str" else text.strip("'\"")
    return _scalar(kind, yaml.ScalarNode(STANDARD_TAG + kind, bare, node.start_mark))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tokens(literals: list[str], values: list[Any]) -> list[Any] | None:
    """Operators as strings and numbers as numbers, or None where the text is not arithmetic."""
    tokens: list[Any] = []
    for i, literal in enumerate(literals):
        position = 0
        while match := ARITHMETIC_TOKEN.match(literal, position):
            word = match[1]
            is_float = re.search(r"[.eE]", word) is not None
            tokens.append((float if is_float else int)(word) if word[0].isdigit() else word)
            position = match.end()
        if literal[position:].strip():
            return None
        tokens += values[i : i + 1]
    return tokens


class _Arithmetic:
    """Recursive descent over + - * / // ** and parentheses; every result is a bounded number."""

    PRODUCTS: dict[str, Callable[[Any, Any], Any]] = {
        "*": operator.mul,
        "/": operator.truediv,
        "//": operator.floordiv,
    }

    def __init__(self, tokens: list[Any], where: str) -> None:
        self.tokens = tokens[::-1]
        self.where = where
        self.depth = 0

    def result(self) -> float:
        value = self._sum()
        if self.tokens:
            raise ModelFilesError(f"{self.where}: is not an arithmetic expression")
        return value

    def _take(self, *wanted: str) -> str | None:
        if self.tokens and isinstance(self.tokens[-1], str) and self.tokens[-1] in wanted:
            return str(self.tokens.pop())
        return None

    def _sum(self) -> float:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = self._bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> float:
        value = self._signed()
        while sign := self._take(*self.PRODUCTS):
            other = self._signed()
            if sign != "*" and other == 0:
                raise ModelFilesError(f"{self.where}: divides by zero")
            value = self._bounded(self.PRODUCTS[sign](value, other))
        return value

    def _signed(self) -> float:
        sign = 1
        while word := self._take("+", "-"):
            sign = -sign if word == "-" else sign
        return sign * self._power()

    def _power(self) -> float:
        base = self._atom()
        if not self._take("**"):
            return base
        self._deeper()
        exponent = self._signed()
        self.depth -= 1
        # A negative base with a broken exponent is complex; zero to a negative power divides by 0.
        if (base < 0 and exponent != int(exponent)) or (base == 0 and exponent < 0):
            raise ModelFilesError(f"{self.where}: has no real value")
        if base and abs(exponent * math.log(abs(base))) > math.log(MAX_NUMBER):
            raise ModelFilesError(f"{self.where}: is larger than {MAX_NUMBER:g}")
        return self._bounded(base**exponent)

    def _atom(self) -> float:
        if self._take("("):
            self._deeper()
            value = self._sum()
            self.depth -= 1
            if self._take(")"):
                return value
        elif self.tokens and _is_number(self.tokens[-1]):
            return self._bounded(self.tokens.pop())
        raise ModelFilesError(f"{self.where}: is not an arithmetic expression")

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH // 2:
            raise ModelFilesError(f"{self.where}: is nested too deep")

    def _bounded(self, value: float) -> float:
        if not abs(value) <= MAX_NUMBER:
            raise ModelFilesError(f"{self.where}: is larger than {MAX_NUMBER:g}")
        return value
