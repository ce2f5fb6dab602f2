"""Prefixes: the flow's state of a voice's own blocks, computed once and shared by its requests.

In: a voice's key and how to make its prefix. Out: the prefix, to be forked, never extended.
Keeps the ones used last within a budget of bytes. It knows no device and no request.
"""

from collections import OrderedDict
from collections.abc import Callable

from cosyvoice.models.flow import FlowState


class Prefixes:
    """A least-recently-used cache. One thread at a time."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._states: OrderedDict[str, FlowState] = OrderedDict()
        self.n_bytes = 0
        self.n_hits = 0
        self.n_misses = 0

    def get(self, key: str, make: Callable[[], FlowState]) -> FlowState:
        """The prefix under `key`, made if it is not there."""
        if key in self._states:
            self.n_hits += 1
            self._states.move_to_end(key)
            return self._states[key]
        self.n_misses += 1
        state = make()
        if state.n_prefix_bytes <= self._max_bytes:
            self._states[key] = state
            self.n_bytes += state.n_prefix_bytes
            while self.n_bytes > self._max_bytes:
                _, oldest = self._states.popitem(last=False)
                self.n_bytes -= oldest.n_prefix_bytes
        return state
