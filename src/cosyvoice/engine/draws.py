"""Random numbers for sampling, addressed by step.

Comes in: a request's seed, the number of the sentence, the attempt. Goes out: two uniform numbers
for any step, the same whatever was asked before and whatever runs beside it. Knows no torch.
"""

import numpy as np
from numpy.typing import NDArray

N_PER_STEP = 2  # one for the draw, one for the draw after a repetition
BLOCK_STEPS = 64
COUNTER_WORDS = 4  # Philox makes this many 64-bit words per count
DOUBLE_BITS = 53
WORD_BITS = 64


class Draws:
    """The counter-based stream of one sentence's attempt."""

    def __init__(self, seed: int, sentence: int, attempt: int = 0) -> None:
        assert sentence >= 0, sentence
        assert attempt >= 0, attempt
        self._key = (seed % 2**WORD_BITS, (sentence << WORD_BITS // 2) + attempt)
        self._first_step = -1
        self._block: NDArray[np.float64] = np.empty((0, N_PER_STEP))

    def at(self, step: int) -> tuple[float, float]:
        """Two numbers in [0, 1) for this step, in the resolution of a double."""
        first_step = step - step % BLOCK_STEPS
        if first_step != self._first_step:
            self._block = self._make_block(first_step)
            self._first_step = first_step
        u1, u2 = self._block[step - first_step].tolist()
        return u1, u2

    def _make_block(self, first_step: int) -> NDArray[np.float64]:
        counter = first_step * N_PER_STEP // COUNTER_WORDS
        stream = np.random.Philox(key=np.array(self._key, np.uint64), counter=counter)
        words = stream.random_raw(BLOCK_STEPS * N_PER_STEP)
        high_bits = (words >> np.uint64(WORD_BITS - DOUBLE_BITS)).astype(np.float64)
        return high_bits.reshape(BLOCK_STEPS, N_PER_STEP) * np.float64(2.0**-DOUBLE_BITS)
