"""A golden set: a directory of tensors and documents somebody recorded, and what is said of them.

In: a directory with `goldens.json`. Out: specifications, tensors, documents and constants by name.
Anything wrong with the set itself is a `SetError` of one line. Nothing is read before it is asked
for. It knows no model and compares nothing.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cosyvoice.errors import BadRequest

INDEX = "goldens.json"
EXACT = "exact"  # equal integers
INPUT = "input"  # given to the model, not compared

Tolerance = float | str
Place = tuple[str | int, ...]  # into a document: ("rows", 12, "wetext018")


class SetError(BadRequest):
    """The golden set itself is broken or incomplete."""


@dataclass(frozen=True)
class Spec:
    """What the set says of one tensor."""

    tolerance: Tolerance
    shape: tuple[int, ...]
    meaning: str = ""


@dataclass
class GoldenSet:
    """One set. `tensors` and `documents` hold what was read, or what a recording has put there."""

    folder: Path
    specs: dict[str, dict[str, Spec]]  # by file, then by name
    params: dict[str, Any]
    notes: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "GoldenSet":
        """Read the index; the files it describes follow when they are needed."""
        index = _read_json(folder / INDEX)
        try:
            described = index["tensors"].items()
            specs: dict[str, dict[str, Spec]] = {}
            for key, value in described:
                file, _, name = key.partition(":")
                specs.setdefault(file, {})[name] = _spec(value)
            params, notes = dict(index["params"]), dict(index["notes"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SetError(
                f"{folder / INDEX} is malformed ({type(error).__name__}: {error}): "
                "give a directory that holds a whole golden set"
            ) from error
        return cls(folder, specs, params, notes)

    def check(self, file: str) -> None:
        """Compare a file's header with the index; SetError where they disagree."""
        shapes = _shapes(self.folder / file)
        for name, spec in self.specs[file].items():
            if name not in shapes:
                raise SetError(f"{self.folder / file} lacks {name}, which {INDEX} describes")
            if shapes[name] != spec.shape:
                raise SetError(
                    f"{self.folder / file}: {name} has the shape {list(shapes[name])}, "
                    f"{INDEX} says {list(spec.shape)}"
                )
        unknown = sorted(shapes.keys() - self.specs[file].keys())
        if unknown:
            raise SetError(f"{self.folder / file}: {unknown[0]} is not described in {INDEX}")

    def tensor(self, file: str, name: str) -> Tensor:
        if file not in self.tensors:
            self.tensors[file] = _read_tensors(self.folder / file)
        if name not in self.tensors[file]:
            raise SetError(f"{self.folder / file} lacks {name}: record the set again")
        return self.tensors[file][name]

    def has(self, file: str, name: str) -> bool:
        return name in self.specs.get(file, {})

    def document(self, file: str) -> Any:
        if file not in self.documents:
            self.documents[file] = _read_json(self.folder / file)
        return self.documents[file]

    def at(self, file: str, path: Place) -> Any:
        """The value at a place in a document."""
        value = self.document(file)
        for i, key in enumerate(path):
            try:
                value = value[key]
            except (LookupError, TypeError) as error:
                raise SetError(
                    f"{file} lacks {shown(path[: i + 1])}: record the set again"
                ) from error
        return value

    def param(self, group: str, name: str) -> Any:
        return _constant(self.params, "params", (group, name))

    def note(self, *path: str) -> Any:
        return _constant(self.notes, "notes", path)


@dataclass(frozen=True)
class Part:
    """The part of a set that one stage is about: `5_flow.safetensors` and `5_flow.json`."""

    whole: GoldenSet
    stem: str

    @property
    def file(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def text_file(self) -> str:
        return f"{self.stem}.json"

    @cached_property
    def specs(self) -> dict[str, Spec]:
        return self.whole.specs.get(self.file, {})

    @property
    def groups(self) -> set[str]:
        """First components of the names: the cases that were recorded."""
        return {name.partition(".")[0] for name in self.specs}

    def under(self, prefix: str) -> list[str]:
        """What follows `prefix.` in the names that begin so."""
        start = f"{prefix}."
        return [name.removeprefix(start) for name in self.specs if name.startswith(start)]

    def tensor(self, name: str) -> Tensor:
        return self.whole.tensor(self.file, name)

    def ids(self, name: str) -> list[int]:
        """Ids that are given, without their batch axis."""
        return [int(i) for i in self.tensor(name).flatten().tolist()]

    def at(self, *path: str | int) -> Any:
        return self.whole.at(self.text_file, path)

    def recording(self, file: str) -> Path:
        """An audio file of the set."""
        path = self.whole.folder / file
        if not path.is_file():
            raise SetError(f"{path} is missing: give a directory that holds a whole golden set")
        return path


def shown(path: Iterable[str | int]) -> str:
    """A place in a document, as one writes it: `rows[12].wetext018`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return "".join(parts).removeprefix(".")


def _spec(value: Any) -> Spec:
    tolerance = value["tolerance"]
    if tolerance not in (EXACT, INPUT):
        tolerance = float(tolerance)
        if not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"{tolerance} is no tolerance")
    return Spec(tolerance, tuple(int(n) for n in value["shape"]), str(value.get("meaning", "")))


def _constant(table: Any, kind: str, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(table, dict) or key not in table:
            raise SetError(f"{INDEX} lacks {kind}.{'.'.join(path)}: record the set again")
        table = table[key]
    return table


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SetError(
            f"{path} is missing: give a directory that holds a whole golden set"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise SetError(f"{path} cannot be read ({error}): fetch the golden set again") from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> SetError:
    reason = " ".join(str(error).split())[:200]
    return SetError(f"{path} is missing or damaged ({reason}): fetch the golden set again")
