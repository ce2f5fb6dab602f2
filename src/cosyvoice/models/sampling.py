"""Repetition-aware nucleus sampling, as tensor expressions over a batch.

Comes in: logits, the ids drawn lately, two uniform numbers a row, and what must not be drawn.
Goes out: one id a row. Draws by inverse CDF, so the same numbers give the same ids in any batch;
nothing here waits for the device or loops over rows. Knows no random generator and no sentence.

B rows, V ids, K candidates, W ids of history.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cosyvoice.config import Sampling

NO_ID = -1  # pads a history shorter than the window
ID_BITS = 32


class Nucleus(NamedTuple):
    """The likeliest ids, descending, lower id first among equals."""

    ids: Tensor  # [B, K]
    probs: Tensor  # [B, K] of the whole distribution, not renormalised
    keep: Tensor  # [B, K] bool: a prefix of each row


def sample(
    logits: Tensor,
    history: Tensor,
    *,
    uniforms: Tensor,
    forbidden: Tensor,
    params: Sampling,
) -> Tensor:
    """Ids [B] drawn from logits [B, V].

    history [B, W]: the last ids drawn, NO_ID where there were fewer. uniforms [B, 2]: float64 in
    [0, 1), for the first draw and for the one after a repetition. forbidden [B, V]: bool.
    """
    logp = log_probs(logits, forbidden)
    nucleus = nucleus_of(logp, params)
    column = draw(nucleus.probs * nucleus.keep, uniforms[:, 0])  # [B]
    first = nucleus.ids.gather(1, column[:, None])  # [B, 1]
    again = repeats(first, history, params).squeeze(1)  # [B]
    first = first.squeeze(1)
    return torch.where(again, draw(fallback(logp, first), uniforms[:, 1]), first)


def log_probs(logits: Tensor, forbidden: Tensor) -> Tensor:
    """Log-softmax in float32, then -inf where forbidden: [B, V], not renormalised."""
    return logits.float().log_softmax(-1).masked_fill(forbidden, -torch.inf)


def nucleus_of(logp: Tensor, params: Sampling) -> Nucleus:
    """The fewest likeliest ids that reach top_p, at most top_k, at least one."""
    probs = logp.softmax(-1)
    ids = _likeliest(probs, min(params.top_k, probs.shape[-1]))
    probs = probs.gather(1, ids)  # [B, K]
    # float64: the sum of a few float32 is then the same on every device
    reached = probs.cumsum(1, dtype=torch.float64) >= params.top_p
    keep = torch.ones_like(reached)
    keep[:, 1:] = ~reached[:, :-1]  # the entry that crosses stays
    return Nucleus(ids, probs, keep)


def repeats(ids: Tensor, history: Tensor, params: Sampling) -> Tensor:
    """Whether each of ids [B, K] fills its share of history [B, W]: [B, K] bool."""
    count = (ids[:, :, None] == history[:, None, :]).sum(-1)
    return count >= params.window_tokens * params.max_share


def fallback(logp: Tensor, repeated: Tensor) -> Tensor:
    """The distribution [B, V] over all ids but the repeated one [B]."""
    return logp.scatter(1, repeated[:, None], -torch.inf).softmax(-1)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Columns [B] of weights [B, K] by inverse CDF at u [B] in [0, 1]; never one of weight zero."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    # A column of weight zero cannot be hit, however a parallel sum rounds.
    reach = torch.where(weights > 0, cumulative, 0.0)
    total = reach.amax(1)
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u * total, below)
    return (reach > target[:, None]).to(torch.uint8).argmax(1)  # the first one


def forbidden_ids(spans: Tensor, n_ids: int) -> Tensor:
    """Mask [B, n_ids] from spans [B, 3] (first, stop, spared): first <= id < stop, but spared."""
    first, stop, spared = spans[:, :, None].unbind(1)  # [B, 1] each
    ids = torch.arange(n_ids, device=spans.device)
    return (ids >= first) & (ids < stop) & (ids != spared)


def recent_ids(histories: Sequence[Sequence[int]], params: Sampling) -> Tensor:
    """The last ids of each history as [B, W] on the host, padded in front."""
    n = params.window_tokens
    return torch.tensor(
        [[NO_ID] * (n - len(ids)) + list(ids[max(len(ids) - n, 0) :]) for ids in histories],
        dtype=torch.int64,
    ).view(-1, n)


def _likeliest(probs: Tensor, n: int) -> Tensor:
    """The first n ids [B, n] of a stable descending sort.

    Non-negative floats sort like their bits; with the id below them no two keys are equal and
    top-k, twenty times faster than the sort, gives the same answer.
    """
    last = probs.shape[-1] - 1
    rank = last - torch.arange(last + 1, device=probs.device)  # lower id, higher rank
    keys = (probs.view(torch.int32).long() << ID_BITS) | rank
    return last - (keys.topk(n, dim=-1).values & ((1 << ID_BITS) - 1))
