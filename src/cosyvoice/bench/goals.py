"""Which of the project's goals (issue 3) do the figures meet?

In: the figures of a run. Out: a row for each goal whose figure is there;
`met` is None where the figure is not believable. The goals are for the
published size, a 5 s prompt and two cores; elsewhere the rows still compare, and mean less.
It measures nothing.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .timing import Timing


class Goal(NamedTuple):
    """At most `limit`, found at `path` in the figures."""

    name: str
    path: str
    limit: float
    formats: tuple[str, ...] = ()  # whose goal it is; of all where empty
    least: float = 0.0  # what it cannot be below, unless a neighbour slowed the ceiling down


GOALS = (
    Goal("2: decode to a plain sweep of the weights", "llm.decode_to_sweep", 1.25, least=0.95),
    Goal("2: decode, ms a token", "llm.decode.1", 9, ("int8",)),
    Goal("2: decode, ms a token", "llm.decode.1", 16, ("bf16",)),
    Goal("2: a step of 8 to a step of 1", "llm.batch_8_to_1", 2, least=0.95),
    Goal("3: offline flow to its floor, 4 s", "flow.offline.4s.to_floor", 1.3, least=0.95),
    Goal("3: offline flow to its floor, 10 s", "flow.offline.10s.to_floor", 1.3, least=0.95),
    Goal("3: vocoder, ms a second of audio", "vocoder.per_audio_second.offline", 116),
    Goal("4: chunk 40 to chunk 4, over operations", "flow.growth.cost_to_operations", 1.2),
    Goal("4: flow of 16 s streamed to its floor", "flow.stream.to_floor", 1.5, least=0.95),
    Goal("5: RTF streaming, 4 s", "stream.known_voice.4s.rtf.min", 1),
    Goal("5: RTF streaming, 16 s", "stream.known_voice.16s.rtf.min", 1),
    Goal("5: first audio, ms", "stream.known_voice.4s.first_audio", 1500),
    Goal("5: RTF offline, 4 s", "stream.offline.4s.rtf.min", 1.5),
    Goal("5: RTF offline, 10 s", "stream.offline.10s.rtf.min", 1.5),
    Goal("6: peak of 60 s of sentences, MiB", "memory.sentences_60s.peak", 6 * 1024, ("bf16",)),
    Goal("6: peak of 60 s of sentences, MiB", "memory.sentences_60s.peak", 4 * 1024, ("int8",)),
    Goal("6: growth over the requests, MiB", "memory.requests.growth_mib", 16),
)


def judge(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each goal that the figures speak of; times count by their minimum."""
    rows = []
    for goal in GOALS:
        found = _at(figures, goal.path)
        if found is None or (goal.formats and figures["number_format"] not in goal.formats):
            continue
        value = 1e3 * found.min_s if isinstance(found, Timing) else float(found)
        rows.append(
            {
                "goal": goal.name,
                "at_most": goal.limit,
                "found": round(value, 3),
                "met": value <= goal.limit if value >= goal.least else None,
            }
        )
    return rows


def _at(figures: Mapping[str, Any], path: str) -> Any:
    """What stands at a dotted path, None where nothing does."""
    found: Any = figures
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found
