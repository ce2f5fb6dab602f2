"""The runner: does one step on the device.

In: utterances and chunks. Out: drawn ids and audio. It owns the networks, the LLM's cache and the
fixed noise. It knows no queue, no client and no scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cosyvoice.config import EngineConfig
from cosyvoice.models.flow import EulerSchedule, Flow, FlowState
from cosyvoice.models.llm import KVSlots, SpeechLM
from cosyvoice.models.noise import SourceNoise
from cosyvoice.models.sampling import forbidden_ids, recent_ids, sample
from cosyvoice.models.tempo import Tempo, mel_at_speed
from cosyvoice.models.vocoder import Vocoder, VocoderState

from .request import Chunk, Request, Utterance
from .script import Script
from .stream import Audio


@dataclass(frozen=True)
class Models:
    """The three networks and the two noise buffers, on their device."""

    llm: SpeechLM
    flow: Flow
    vocoder: Vocoder
    flow_noise: Tensor  # [80, 15000]
    source_noise: SourceNoise

    @property
    def device(self) -> torch.device:
        return self.llm.speech_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.speech_embedding.weight.dtype


@dataclass
class Voiceover:
    """An utterance's states below the LLM."""

    flow: FlowState
    vocoder: VocoderState
    tempo: Tempo | None
    n_frames: int = 0  # of mel so far, at speed 1


class Runner:
    """Every method runs on the engine's thread."""

    def __init__(self, models: Models, config: EngineConfig) -> None:
        self.config = config
        self.models = models
        self.llm_config = models.llm.config
        self.n_block_tokens = models.flow.config.block_tokens
        self.n_lookahead_tokens = models.flow.config.lookahead_tokens
        self._slots = KVSlots(
            models.llm.config,
            config.n_slots,
            config.max_positions,
            device=models.device,
            dtype=torch.float32 if models.device.type == "cpu" else models.dtype,
        )
        with torch.inference_mode():
            self._schedule: EulerSchedule = models.flow.schedule()

    @property
    def n_free_slots(self) -> int:
        return self._slots.n_free

    # The LLM.

    @torch.inference_mode()
    def write(self, utterances: tuple[Utterance, ...]) -> list[int]:
        """Feed each utterance its pending items (one each, where there are several utterances)."""
        for utterance in utterances:
            if utterance.slot is None:
                utterance.slot = self._slots.take()
        items = torch.tensor([u.pending for u in utterances], device=self.models.device)  # [B, T]
        slots = [u.slot for u in utterances if u.slot is not None]
        hidden = self.models.llm(self.models.llm.embed(items), self._slots, slots)  # [B, T, H]
        return self._draw(utterances, self.models.llm.logits(hidden[:, -1]))

    def _draw(self, utterances: Sequence[Utterance], logits: Tensor) -> list[int]:
        scripts = [cast(Script, u.script) for u in utterances]  # only who writes is asked
        config, device = self.llm_config, self.models.device
        uniforms = [u.draws.at(len(s.history)) for u, s in zip(utterances, scripts, strict=True)]
        ids = sample(
            logits,
            recent_ids([script.history for script in scripts], config.sampling).to(device),
            uniforms=torch.tensor(uniforms, dtype=torch.float64, device=device),
            forbidden=forbidden_ids(
                torch.tensor([script.forbidden for script in scripts], device=device),
                config.n_speech_rows,
            ),
            params=config.sampling,
        ).tolist()
        return [
            drawn if script.forced is None else script.forced
            for drawn, script in zip(ids, scripts, strict=True)
        ]

    # Flow and vocoder.

    @torch.inference_mode()
    def render(self, utterance: Utterance, chunk: Chunk) -> Audio:
        """Audio of the chunk; may be empty while the vocoder looks ahead."""
        voiceover = utterance.voiceover
        if voiceover is None:
            voiceover = utterance.voiceover = self._voiceover(utterance.request)
        mel = self._mel(utterance, voiceover, chunk)
        audio: Tensor = self.models.vocoder.extend(voiceover.vocoder, mel, chunk.is_last)
        return audio.cpu().numpy().astype(np.float32, copy=False)

    def _voiceover(self, request: Request) -> Voiceover:
        rules = self.config.rules
        return Voiceover(
            flow=self._flow_state(request, chunked=request.streaming),
            vocoder=self.models.vocoder.start(self.models.source_noise, early=rules.early_vocoder),
            tempo=Tempo(request.speed) if request.streaming and request.speed != 1 else None,
        )

    def _flow_state(self, request: Request, *, chunked: bool) -> FlowState:
        return self.models.flow.start(
            request.prompt.flow, self._schedule, self.models.flow_noise, chunked=chunked
        )

    def _mel(self, utterance: Utterance, voiceover: Voiceover, chunk: Chunk) -> Tensor:
        request = utterance.request
        if not request.streaming:
            mel = self.models.flow.extend(voiceover.flow, chunk.tokens, last=True)
            return mel_at_speed(mel, request.speed) if request.speed != 1 else mel
        if chunk.is_last and not self.config.rules.end_causal:
            mel = self._full_pass(utterance)[voiceover.n_frames :]
        else:
            mel = self.models.flow.extend(voiceover.flow, chunk.tokens, last=chunk.is_last)
        voiceover.n_frames += len(mel)
        return voiceover.tempo.extend(mel, last=chunk.is_last) if voiceover.tempo else mel

    def _full_pass(self, utterance: Utterance) -> Tensor:
        """The reference's last call: everything once more, with full attention."""
        state = self._flow_state(utterance.request, chunked=False)
        return self.models.flow.extend(state, utterance.tokens, last=True)

    # Giving back.

    def release_slot(self, utterance: Utterance) -> None:
        if utterance.slot is not None:
            self._slots.release(utterance.slot)
            utterance.slot = None

    def release(self, utterance: Utterance) -> None:
        self.release_slot(utterance)
        utterance.voiceover = None
