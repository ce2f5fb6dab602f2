"""Stage 3: the language model with its draws decided, plain and with text that arrives.

In: ids of text and prompt, and the ids to draw. Out: what the scripts feed, in which calls, the
hidden states and log-probabilities at every position, and what is handed on to the flow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cosyvoice.config import REFERENCE, LLMConfig
from cosyvoice.engine.script import (
    NOTHING,
    Plain,
    ReferenceInterleaved,
    Script,
    plain_items,
    split_head,
    token_limits,
)
from cosyvoice.models.llm import KVSlots
from cosyvoice.parity.found import Computed, Fact, Found
from cosyvoice.parity.goldens import Part
from cosyvoice.parity.subject import Subject


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """Special ids, then every recorded case."""
    config = subject.config.llm
    for name in ("sos", "eos", "fill"):
        yield Fact((name,), getattr(config, name))
    yield Fact(("task_id",), config.task)
    yield Fact(("stop_token_ids",), [config.n_speech_tokens, config.n_speech_rows - 1])
    for case, recorded in part.at("cases").items():
        is_plain = "sequence" in recorded or "forced" in part.under(case)
        yield from (_plain if is_plain else _text_in)(part, subject, case)


@dataclass
class Conversation:
    """A script's dialogue with the network, in one slot of the cache, and its protocol."""

    subject: Subject
    cache: KVSlots
    calls: list[list[int]] = field(default_factory=list)  # items fed
    vectors: list[Tensor] = field(default_factory=list)  # [1, T, H] fed
    hidden: list[Tensor] = field(default_factory=list)  # [1, T, H] that came back

    @classmethod
    def begin(cls, subject: Subject, n_positions: int) -> "Conversation":
        cache = KVSlots(subject.config.llm, 1, n_positions, device="cpu", dtype=torch.float32)
        return cls(subject, cache)

    def feed(self, items: Sequence[int]) -> None:
        """One call of the network."""
        vectors = self.subject.llm.embed(torch.tensor([list(items)]))
        self.calls.append(list(items))
        self.vectors.append(vectors)
        self.hidden.append(self.subject.llm(vectors, self.cache, [0]))

    def last_hidden(self, calls: Sequence[int]) -> Tensor:
        """What the draws after these calls look at: [n, H]."""
        return torch.cat([self.hidden[i][:, -1] for i in calls])

    def log_probs(self, calls: Sequence[int]) -> Tensor:
        """[n, V], before anything is forbidden."""
        return self.subject.llm.logits(self.last_hidden(calls)).log_softmax(-1)


def _plain(part: Part, subject: Subject, case: str) -> Iterator[Found]:
    config = subject.config.llm
    text, forced = part.ids(f"{case}.text"), part.ids(f"{case}.forced")
    items = plain_items(
        config,
        text,
        prompt_text=part.ids(f"{case}.prompt_text"),
        prompt_speech=part.ids(f"{case}.prompt_speech_token"),
    )
    min_len, max_len = token_limits(len(text), len(text))
    script = Plain(config, items, min_len=min_len, max_len=max_len, rules=REFERENCE)
    talk = Conversation.begin(subject, len(items) + len(forced) + 1)
    talk.feed(script.pending)
    for token in forced:
        script.accept(token)
        talk.feed(script.pending)
    steps = range(len(talk.calls))
    yield Computed(f"{case}.lm_input", talk.vectors[0])
    yield Computed(f"{case}.prefill_hidden", talk.hidden[0])
    yield Computed(f"{case}.step_hidden", talk.last_hidden(steps))
    yield Computed(f"{case}.logp", talk.log_probs(steps))
    yield Fact(("cases", case, "min_len"), min_len)
    yield Fact(("cases", case, "max_len"), max_len)
    yield Fact(("cases", case, "sequence"), _written(config, talk.calls[0]))


@dataclass
class Draws:
    """What the sampler is made to return, and whether the end was suppressed each time."""

    ids: list[int]
    suppressed: list[bool] = field(default_factory=list)

    def next(self, script: Script) -> int:
        n_drawn = len(self.suppressed)
        self.suppressed.append(script.forbidden != NOTHING)
        if n_drawn >= len(self.ids):
            raise ValueError(f"the script draws more than the {len(self.ids)} recorded ids")
        return self.ids[n_drawn]


def _text_in(part: Part, subject: Subject, case: str) -> Iterator[Found]:
    text, speech = part.ids(f"{case}.text"), part.ids(f"{case}.prompt_speech_token")
    prompt_text = part.ids(f"{case}.prompt_text")
    head, rest = split_head(prompt_text, subject.tokenizer.endofprompt)
    config = subject.config.llm
    script = ReferenceInterleaved(config, head, rest=rest, prompt_speech=speech)
    draws = Draws(list(part.at("cases", case, "sampled")))
    # Everything is fed once, the longest call perhaps twice, and each forced fill costs a draw.
    n_once = len(prompt_text) + len(text) + len(speech) + 2 * len(draws.ids)
    talk = Conversation.begin(subject, 2 * n_once)
    spoken: list[int] = []
    for i in text:
        script.say([i])
        spoken += _answer(script, talk, draws)
    script.end_text()
    spoken += _answer(script, talk, draws)
    yield from _protocol(part, case, talk)
    yield Computed(f"{case}.yielded", torch.tensor(spoken, dtype=torch.int32))
    n_drawn = len(draws.suppressed)
    facts = {
        "calls": [_written(config, call) for call in talk.calls],
        "yielded": spoken,
        "sampled": draws.ids[:n_drawn],
        "ignore_eos": draws.suppressed,
        "n_sampled": n_drawn,
        "unused_forced": len(draws.ids) - n_drawn,
        "eos_given": script.history[-1:] == [config.eos],
    }
    for name, value in facts.items():
        yield Fact(("cases", case, name), value)


def _answer(script: ReferenceInterleaved, talk: Conversation, draws: Draws) -> list[int]:
    """Let the network speak until the script wants more text; the tokens for the flow."""
    spoken = []
    while not script.is_waiting and not script.is_done:
        talk.feed(script.pending)
        drawn = draws.next(script) if script.forced is None else script.forced
        token = script.accept(drawn)
        if token is not None:
            spoken.append(token)
    return spoken


def _protocol(part: Part, case: str, talk: Conversation) -> Iterator[Found]:
    n_calls = len(talk.calls)
    yield Computed(f"{case}.inputs", torch.cat(talk.vectors, dim=1))
    lengths = [len(call) for call in talk.calls]
    yield Computed(f"{case}.call_len", torch.tensor(lengths, dtype=torch.int32))
    yield Computed(f"{case}.hidden", torch.cat(talk.hidden, dim=1))
    # Which calls were stored was the recorder's choice; ours must have made as many.
    stored = [i for i in part.ids(f"{case}.logp_calls") if i < n_calls]
    yield Computed(f"{case}.logp_calls", torch.tensor(stored, dtype=torch.int32))
    yield Computed(f"{case}.logp", talk.log_probs(stored))


def _written(config: LLMConfig, items: Sequence[int]) -> list[list[str | int]]:
    """Items as the document writes them: kind, id, and a name for what opens and what follows."""
    names = {config.sos: ["sos"], config.task: ["task_id"]}
    return [["text", ~i] if i < 0 else ["speech", i, *names.get(i, [])] for i in items]
