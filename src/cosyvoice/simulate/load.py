"""What is asked of the simulated engine, and when.

In: a seed and how much. Out: things to say, each with its voice and the lengths of its sentences,
and the load that decides when they come. It knows no rule and no cost.
"""

import random
from dataclasses import dataclass

from cosyvoice.config import TOKENS_HZ

VOICES_TOKENS = (87, 125, 140, 213)  # the recordings' lengths
TRANSCRIPT_IDS = 30
MAX_SENTENCES = 4
SPREAD_S = 1.0  # over which clients turn up


@dataclass(frozen=True)
class Line:
    """One thing to say."""

    streaming: bool
    n_prompt_tokens: int
    sentences: tuple[tuple[int, int], ...]  # (text ids, speech tokens) of each
    arrives: float  # one unit after the other on average; its place where clients take turns

    @property
    def audio_s(self) -> float:
        return sum(n_tokens for _, n_tokens in self.sentences) / TOKENS_HZ


@dataclass(frozen=True)
class Load:
    """Lines at random times, so much audio per second; or clients who ask again when served."""

    offered: float = 0.0  # seconds of audio asked for per second
    n_clients: int = 0
    offline_share: float = 0.15

    @property
    def name(self) -> str:
        return f"{self.n_clients} clients" if self.n_clients else f"{self.offered:g} s/s"

    def arrivals(self, lines: list[Line]) -> list[float]:
        """When each line is asked for that does not wait for another one to be done."""
        if self.n_clients:
            n_first = min(self.n_clients, len(lines))
            return [SPREAD_S * i / n_first for i in range(n_first)]
        mean_s = sum(line.audio_s for line in lines) / len(lines)
        return [line.arrives * mean_s / self.offered for line in lines]


def write_lines(seed: int, n: int, *, offline_share: float) -> list[Line]:
    """Lines as people send them: mostly one or two sentences of three to six seconds."""
    dice = random.Random(seed)
    lines, at = [], 0.0
    for _ in range(n):
        at += dice.expovariate(1.0)
        n_sentences = 1
        while n_sentences < MAX_SENTENCES and dice.random() < 0.4:
            n_sentences += 1
        lines.append(
            Line(
                streaming=dice.random() >= offline_share,
                n_prompt_tokens=dice.choice(VOICES_TOKENS),
                sentences=tuple(_sentence(dice) for _ in range(n_sentences)),
                arrives=at,
            )
        )
    return lines


def _sentence(dice: random.Random) -> tuple[int, int]:
    """Five tokens for a text id, more or less."""
    n_text = dice.randint(10, 35)
    return n_text, round(n_text * min(max(dice.gauss(5.0, 0.7), 3.0), 8.0))
