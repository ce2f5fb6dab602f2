"""The cache of voices' prefixes: shared, counted, bounded."""

from types import SimpleNamespace
from typing import Any

from cosyvoice.engine.prefixes import Prefixes


def state(n_bytes: int) -> Any:
    return SimpleNamespace(n_prefix_bytes=n_bytes)


def test_a_prefix_is_made_once_and_the_least_used_goes_first() -> None:
    prefixes = Prefixes(max_bytes=100)
    made = []

    def get(key: str, n_bytes: int = 40) -> Any:
        return prefixes.get(key, lambda: made.append(key) or state(n_bytes))  # type: ignore[func-returns-value]

    first = get("a")
    assert get("a") is first
    get("b")
    get("a")
    get("c")  # no room for three: b was used longest ago
    assert get("a") is first
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert (prefixes.n_hits, prefixes.n_misses) == (3, 4)
    assert prefixes.n_bytes == 80


def test_a_prefix_beyond_the_budget_is_used_and_not_kept() -> None:
    prefixes = Prefixes(max_bytes=10)
    assert prefixes.get("a", lambda: state(40)).n_prefix_bytes == 40
    assert prefixes.n_bytes == 0
