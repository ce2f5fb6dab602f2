"""Stage 7: text and recordings to audio, through front end, engine and runner.

In: a text, a transcript, recordings and the tokens the language model is to say. Out: the LLM's
input, mels and audio of whole utterances, streams, other speeds, silences and voice conversion.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cosyvoice.config import REFERENCE
from cosyvoice.engine.request import Request
from cosyvoice.frontend import Order
from cosyvoice.parity.eavesdrop import Performance, perform
from cosyvoice.parity.found import Computed, Found
from cosyvoice.parity.goldens import Part, SetError
from cosyvoice.parity.subject import Subject

FIRST_OF = re.compile(r"(?:\w+:)?(\w+)(?:\[:(\d+)\])?")  # "7_e2e:tokens[:9]"


def compute(part: Part, subject: Subject) -> Iterator[Found]:
    """Every case the set has."""
    scene = Scene(part, subject)
    cases = {
        "llm_in": _llm_input,
        "nonstream": _whole,
        "stream": _stream,
        "speed": _speed,
        "silent": _silent,
        "vc": _conversion,
        "short_stream": _short_stream,
    }
    for name, case in cases.items():
        if name in part.groups:
            yield from case(scene)


@dataclass(frozen=True)
class Scene:
    """Where requests come from."""

    part: Part
    subject: Subject

    def order(self, case: str, *, streaming: bool = False, speed: float = 1.0) -> Request:
        """A zero-shot request for the text of the set, in the voice of a case.

        `streaming` holds where the constants of the case do not say how it was recorded.
        """
        note = self.part.whole.note
        return self.subject.front_end.request(
            Order(
                text=note("e2e", "text"),
                seed=0,
                recording=self.recording(self.part.whole.param(case, "prompt")),
                transcript=note("e2e", "prompt_text"),
                mode="zero_shot",
                streaming=bool(self.part.whole.params[case].get("stream", streaming)),
                speed=speed,
            )
        )

    def recording(self, said: str) -> Path:
        """The recording a constant speaks of: it begins with its name, as in `a, untruncated`."""
        named = self.part.whole.note("features", "info")
        for name in sorted(named, key=len, reverse=True):  # `a` may begin the name of another
            if re.match(rf"{re.escape(name)}(?!\w)", said):
                return self.part.recording(self.part.whole.note("features", "info", name, "file"))
        raise SetError(f"no recording of notes.features.info is called {said!r}: record again")

    def perform(self, request: Request, forced: Sequence[int] | None = None) -> Performance:
        return perform(self.subject.models, request, rules=REFERENCE, forced=forced)


def _llm_input(scene: Scene) -> Iterator[Found]:
    request = scene.order("e2e")
    fields = {
        "text": [i for sentence in request.sentences for i in sentence.ids],
        "prompt_text": request.prompt.llm_text,
        "prompt_speech_token": request.prompt.llm_speech,
    }
    for name, ids in fields.items():
        yield Computed(f"llm_in.{name}", torch.tensor([list(ids)], dtype=torch.int32))


def _whole(scene: Scene) -> Iterator[Found]:
    speech = scene.perform(scene.order("e2e"), scene.part.ids("tokens"))
    yield Computed("nonstream.mel", speech.mel)
    yield Computed("nonstream.wav", speech.audio)


def _stream(scene: Scene) -> Iterator[Found]:
    speech = scene.perform(scene.order("e2e", streaming=True), scene.part.ids("tokens"))
    for i, audio in enumerate(speech.chunks):
        yield Computed(f"stream.wav_{i}", audio, is_piece=True)
    yield Computed("stream.mel_last", speech.mel)  # the reference hands all of it over again


def _speed(scene: Scene) -> Iterator[Found]:
    speed = float(scene.part.whole.param("speed", "speed"))
    speech = scene.perform(scene.order("speed", speed=speed), scene.part.ids("speed.tokens"))
    yield Computed("speed.mel", speech.mel)
    yield Computed("speed.wav", speech.audio)


def _silent(scene: Scene) -> Iterator[Found]:
    speech = scene.perform(scene.order("silent"), scene.part.ids("silent.tokens_in"))
    yield Computed("silent.tokens_kept", torch.tensor(speech.tokens, dtype=torch.int32))
    yield Computed("silent.wav", speech.audio)


def _conversion(scene: Scene) -> Iterator[Found]:
    param = scene.part.whole.param
    source, prompt = (scene.recording(param("vc", name)) for name in ("source", "prompt"))
    request = scene.subject.front_end.conversion(source, prompt, streaming=False, speed=1.0)
    yield Computed("vc.wav", scene.perform(request).audio, is_head=True)


def _short_stream(scene: Scene) -> Iterator[Found]:
    which = scene.part.whole.param("short_stream", "tokens")
    found = FIRST_OF.fullmatch(which)
    if not found:
        raise SetError(f"params.short_stream.tokens is {which!r}, not like 7_e2e:tokens[:9]")
    name, n_tokens = found.groups()
    tokens = scene.part.ids(name)[: int(n_tokens) if n_tokens else None]
    speech = scene.perform(scene.order("short_stream", streaming=True), tokens)
    # It is one chunk; were there more, the first would be too short.
    yield Computed("short_stream.wav", speech.chunks[0])
