"""Stage 4: scores and a history to the distributions a token is drawn from.

In: scores, histories, and for which candidate the fallback was recorded. Out: the nucleus, where
the repetition rule fires, the fallback distribution.
"""

from collections.abc import Iterator

import torch

from cosyvoice.models.sampling import fallback, log_probs, nucleus_of, recent_ids, repeats
from cosyvoice.parity.found import Computed, Fact, Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """One case for each entry of the document."""
    for i, _ in enumerate(part.at()):
        yield from _case(part, subject, (i, part.at(i, "fallback_index")))


def _case(part: Part, subject: Subject, which: tuple[int, int]) -> Iterator[Found]:
    i, fallback_index = which
    params = subject.config.llm.sampling
    logits = part.tensor(f"logits_{i:02d}")[None]  # [1, V]
    logp = log_probs(logits, torch.zeros_like(logits, dtype=torch.bool))
    nucleus = nucleus_of(logp, params)
    n = int(nucleus.keep.sum())
    ids, probs = nucleus.ids[:, :n], nucleus.probs[:, :n]  # [1, n]
    fires = repeats(ids, recent_ids([part.ids(f"history_{i:02d}")], params), params)
    yield Computed(f"cand_ids_{i:02d}", ids[0])
    yield Computed(f"logp_{i:02d}_sel", logp.gather(1, ids)[0])
    yield Computed(f"cand_prob_{i:02d}", probs[0])
    yield Computed(f"cand_prob_norm_{i:02d}", (probs / probs.sum())[0])
    yield Computed(f"repeat_{i:02d}", fires[0])
    # Past the last candidate, where ours are fewer, the row above has failed already.
    repeated = ids[:, min(fallback_index, n - 1)]
    yield Computed(f"fallback_{i:02d}", fallback(logp, repeated)[0])
    yield Fact((i, "n_cand"), n)
    yield Fact((i, "any_trigger"), bool(fires.any()))
