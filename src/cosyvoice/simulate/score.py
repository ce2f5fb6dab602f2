"""How well listeners were served: the figures of one rehearsal.

In: what was heard. Out: numbers. It knows no rule, no load and no table.
"""

from dataclasses import dataclass
from math import nan

from .rehearsal import Heard


@dataclass(frozen=True)
class Score:
    """Of streams, but for the last three, which are of all lines."""

    first_audio_p50_s: float
    first_audio_p95_s: float
    first_audio_p99_s: float
    c50: float  # share of streams whose longest gap is below 50 ms
    c100: float
    c200: float
    gap_s: float  # silence between pieces, all streams together
    offline_p50_s: float  # from asking for a file to having it
    audio_per_s: float  # seconds of audio made per second, while there was more to do
    busy: float  # share of the time in which a step ran


def percentile(values: list[float], share: float) -> float:
    """The smallest value that is not below this share of them; nan of none."""
    if not values:
        return nan
    return sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]


def score(heard: list[Heard], busy_s: float) -> Score:
    streams = [h for h in heard if h.line.streaming]
    first = [h.first_audio_s for h in streams]
    gaps = [h.gaps_s for h in streams]
    longest = [max(each) for each in gaps]
    end_s = max(at_s for h in heard for at_s, _ in h.pieces)
    return Score(
        first_audio_p50_s=percentile(first, 0.50),
        first_audio_p95_s=percentile(first, 0.95),
        first_audio_p99_s=percentile(first, 0.99),
        c50=_share_below(longest, 0.05),
        c100=_share_below(longest, 0.10),
        c200=_share_below(longest, 0.20),
        gap_s=sum(map(sum, gaps)),
        offline_p50_s=percentile([h.whole_s for h in heard if not h.line.streaming], 0.50),
        audio_per_s=_rate(heard),
        busy=busy_s / end_s,
    )


def _share_below(values: list[float], limit: float) -> float:
    return sum(value < limit for value in values) / len(values) if values else nan


def _rate(heard: list[Heard]) -> float:
    """Seconds of audio per second until the last line came: what follows is no full load."""
    last_s = max(h.asked_at_s for h in heard)
    made = sum(seconds for h in heard for at_s, seconds in h.pieces if at_s <= last_s)
    return made / last_s if last_s else nan
