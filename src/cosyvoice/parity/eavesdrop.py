"""Listening to production code at work: outputs of submodules, mels on their way to the vocoder,
and an engine whose language model runs while its draws may be decided from outside.

In: networks and requests. Out: what passed by. It changes nothing of what it hears; only a
`ForcedEngine` puts words into the language model's mouth.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from cosyvoice.config import EngineConfig, Rules
from cosyvoice.engine.engine import Engine
from cosyvoice.engine.request import Chunk, Request, Utterance
from cosyvoice.engine.runner import Models, Runner
from cosyvoice.engine.script import NOTHING, Script
from cosyvoice.engine.stream import Audio
from cosyvoice.models.noise import SourceNoise
from cosyvoice.models.vocoder import Vocoder, VocoderState


@dataclass
class Heard:
    """The last inputs and outputs of the submodules that were listened to, by path."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def listening(network: nn.Module, paths: Iterable[str]) -> Iterator[Heard]:
    """Hear submodules while the block runs; paths the network does not have stay silent."""
    modules = dict(network.named_modules())
    heard = Heard()
    handles = [
        modules[path].register_forward_hook(_hook(heard, path)) for path in paths if path in modules
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _hook(heard: Heard, path: str) -> Any:
    def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        heard.inputs[path] = inputs[0].clone()
        heard.outputs[path] = output.clone()  # later layers may work in place

    return keep


class Tap:
    """Stands where the vocoder stands and keeps the mels that go in."""

    def __init__(self, vocoder: Vocoder) -> None:
        self.mels: list[Tensor] = []  # [T, 80] each
        self._vocoder = vocoder

    def start(self, noise: SourceNoise, *, early: bool = True) -> VocoderState:
        return self._vocoder.start(noise, early=early)

    def extend(self, state: VocoderState, mel: Tensor, last: bool = False) -> Tensor:
        self.mels.append(mel.clone())
        return self._vocoder.extend(state, mel, last)


class ListeningRunner(Runner):
    """The runner, which also notes the tokens that reach the flow."""

    def __init__(self, models: Models, config: EngineConfig) -> None:
        super().__init__(models, config)
        self.rendered: list[int] = []

    def render(self, utterances: Sequence[Utterance], chunks: Sequence[Chunk]) -> list[Audio]:
        for chunk in chunks:
            self.rendered.extend(chunk.tokens)
        return super().render(utterances, chunks)


class Recital:
    """A script whose answers are given. No limit of length cuts it, for a set may have been
    recorded with more tokens than its text would allow the language model."""

    is_waiting = False
    forbidden = NOTHING

    def __init__(self, pending: Sequence[int], answers: Sequence[int]) -> None:
        self.pending = list(pending)
        self.history: list[int] = []
        self.is_done = False
        self._answers = answers  # the last one is the end

    @property
    def forced(self) -> int | None:
        return self._answers[len(self.history)]

    def accept(self, drawn: int) -> int | None:
        self.history.append(drawn)
        self.pending = [drawn]
        self.is_done = len(self.history) == len(self._answers)
        return None if self.is_done else drawn


class ForcedEngine(Engine):
    """The language model runs, and says given tokens, then the end."""

    def __init__(self, runner: Runner, config: EngineConfig, forced: Sequence[int]) -> None:
        self._answers = [*forced, runner.llm_config.eos]
        super().__init__(runner, config)

    def _scripts(self, request: Request) -> Sequence[Script | None]:
        scripts = super()._scripts(request)
        return [script and Recital(script.pending, self._answers) for script in scripts]


@dataclass(frozen=True)
class Performance:
    """What came out of one request."""

    chunks: list[Tensor]  # [1, n] audio each
    mels: list[Tensor]  # [1, 80, T] each, as the vocoder got them
    tokens: list[int]  # that reached the flow

    @property
    def audio(self) -> Tensor:
        return torch.cat([torch.zeros(1, 0), *self.chunks], dim=1)

    @property
    def mel(self) -> Tensor:
        return torch.cat(self.mels, dim=2)


def perform(
    models: Models, request: Request, *, rules: Rules, forced: Sequence[int] | None = None
) -> Performance:
    """Carry a request out on an engine of its own; `forced` are the draws, where they are given."""
    tap = Tap(models.vocoder)
    tapped = replace(models, vocoder=cast(Vocoder, tap))
    config = EngineConfig(n_slots=1, rules=rules)
    runner = ListeningRunner(tapped, config)
    engine = Engine(runner, config) if forced is None else ForcedEngine(runner, config, forced)
    try:
        chunks = [torch.from_numpy(audio)[None] for audio in engine.submit(request)]
    finally:
        engine.close()
    return Performance(chunks, [mel.T[None] for mel in tap.mels], runner.rendered)
