"""The rule that shortens long silences between the LLM and the flow.

Comes in: speech tokens one by one. Goes out: whether to speak each. Dropped tokens stay in the
LLM's history and cache; this knows neither.
"""

from cosyvoice.config import MAX_SILENT_RUN_TOKENS, SILENT_TOKENS


class SilentFilter:
    """Drops what exceeds the longest permitted run of silent tokens."""

    def __init__(self) -> None:
        self._n_silent = 0  # in a row, dropped ones included

    def keep(self, token: int) -> bool:
        """Whether this token, the next of the sentence, is to be spoken."""
        if token not in SILENT_TOKENS:
            self._n_silent = 0
            return True
        self._n_silent += 1
        return self._n_silent <= MAX_SILENT_RUN_TOKENS
