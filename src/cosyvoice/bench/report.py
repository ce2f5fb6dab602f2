"""Figures as lines for people and as one JSON object for programs.

In: nested figures. Out: text. Timings are one line each for people and three milliseconds in JSON.
It knows no measurement.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from .timing import Timing

MANY = 8  # of a list's items are shown
VERDICTS = {True: "met", False: "NOT MET", None: "disturbed: faster than its ceiling"}


def lines(title: str, figures: Any) -> list[str]:
    """A heading, then a line for each figure, its path on the left."""
    rows = list(_rows("", figures))
    width = max((len(name) for name, _ in rows), default=0)
    return ["", title, *(f"  {name.ljust(width)}  {text}".rstrip() for name, text in rows)]


def goal_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The goals of issue 3, as a table."""
    if not rows:
        return []
    width = max(len(row["goal"]) for row in rows)
    return ["", "goals"] + [
        f"  {row['goal'].ljust(width)}  {row['found']:>10g}  at most {row['at_most']:<6g}  "
        f"{VERDICTS[row['met']]}"
        for row in rows
    ]


def to_json(figures: Any) -> str:
    """One line; what is not a number there is null."""
    return json.dumps(_plain(figures), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _rows(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _rows(f"{path}.{key}" if path else str(key), item)
    else:
        yield path, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        more = " ..." if len(value) > MANY else ""
        return ", ".join(_text(item) for item in value[:MANY]) + more
    return f"{value:g}" if isinstance(value, float) else str(value)
