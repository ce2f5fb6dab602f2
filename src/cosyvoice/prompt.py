"""Prompts: what the LLM is given and what the flow is given, for each of the five modes.

In: a voice and text ids. Out: one frozen Prompt. It does not know which mode made it, nor do those
who use it. The table is docs/spec/frontend.md section 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cosyvoice.config import N_MELS
from cosyvoice.models.flow import FlowPrompt

from .voice import Voice


@dataclass(frozen=True)
class Prompt:
    """The part of a request that the voice and the instruction decide."""

    flow: FlowPrompt
    llm_text: tuple[int, ...] = ()  # before the text to speak
    llm_speech: tuple[int, ...] = ()  # after it


def zero_shot(voice: Voice, transcript_ids: Sequence[int]) -> Prompt:
    """Continue the recording: the LLM sees its transcript and its speech tokens."""
    voice = voice.aligned()
    flow = _flow_prompt(voice)
    return Prompt(flow, tuple(transcript_ids), flow.tokens)


def cross_lingual(voice: Voice) -> Prompt:
    """Only the flow knows the voice, so that the recording's language does not leak."""
    return Prompt(_flow_prompt(voice.aligned()))


def instruct2(voice: Voice, instruction_ids: Sequence[int]) -> Prompt:
    """The LLM obeys an instruction; only the flow knows the voice."""
    return Prompt(_flow_prompt(voice.aligned()), tuple(instruction_ids))


def sft(voice: Voice) -> Prompt:
    """A voice that is only an embedding."""
    return Prompt(FlowPrompt((), torch.zeros(0, N_MELS), voice.embedding))


def conversion(voice: Voice) -> Prompt:
    """No LLM: the tokens come from a recording. Unlike the others, the prompt is not aligned."""
    return Prompt(_flow_prompt(voice))


def _flow_prompt(voice: Voice) -> FlowPrompt:
    return FlowPrompt(tuple(voice.tokens.tolist()), voice.mel, voice.embedding)
