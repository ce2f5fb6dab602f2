"""The runner: does one step on the device.

In: utterances and chunks. Out: drawn ids and audio. It owns the networks, the LLM's cache and the
fixed noise. It knows no queue, no client and no scheduling.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from cosyvoice.config import EngineConfig
from cosyvoice.models.attention import EXACT, AttentionForm
from cosyvoice.models.flow import Flow, FlowState, Solver
from cosyvoice.models.flow_cache import Slabs
from cosyvoice.models.llm import KVSlots, SpeechLM
from cosyvoice.models.noise import SourceNoise
from cosyvoice.models.sampling import forbidden_ids, recent_ids, sample
from cosyvoice.models.tempo import Tempo, WholeTempo
from cosyvoice.models.vocoder import Vocoder, VocoderState

from .prefixes import Prefixes
from .request import Chunk, Request, Utterance
from .script import Script
from .stream import Audio

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The three networks and the two noise buffers, on their device."""

    llm: SpeechLM
    flow: Flow
    vocoder: Vocoder
    flow_noise: Tensor  # [80, 15000]
    source_noise: SourceNoise
    attention: AttentionForm = EXACT  # of the flow
    number_format: str = "fp32"

    @property
    def device(self) -> torch.device:
        return self.llm.speech_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.speech_embedding.weight.dtype


@dataclass(eq=False)
class Voiceover:
    """An utterance's states below the LLM."""

    flow: FlowState
    vocoder: VocoderState
    tempo: Tempo | WholeTempo | None
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
        self._n_threads = torch.get_num_threads()
        self.prefixes = Prefixes(config.prefix_bytes)
        self.n_dropped_steps = 0
        self._live: list[Voiceover] = []
        with torch.inference_mode():
            self._solver: Solver = models.flow.solver(
                config.flow_steps,
                cfg_rate=config.cfg_rate,
                form=models.attention,
                slabs=Slabs(config.flow_bytes // 2),
            )

    def begin(self) -> None:
        """The engine's thread shares its work out over as many cores as torch was given."""
        torch.set_num_threads(self._n_threads)

    @property
    def n_free_slots(self) -> int:
        return self._slots.n_free

    # The LLM.

    @torch.inference_mode()
    def read(self, utterance: Utterance, n_items: int) -> None:
        """Feed the first pending items of an utterance; nothing is drawn yet."""
        self._feed((utterance,), n_items)

    @torch.inference_mode()
    def write(self, utterances: tuple[Utterance, ...]) -> list[int]:
        """Feed each utterance its pending items (one each, where there are several utterances)."""
        n_items = len(utterances[0].pending)
        hidden = self._feed(utterances)
        try:
            return self._draw(utterances, self.models.llm.logits(hidden[:, -1]))
        except BaseException:  # so that the step can be tried again
            self._slots.advance([u.slot for u in utterances if u.slot is not None], -n_items)
            raise

    def _feed(self, utterances: Sequence[Utterance], n_items: int | None = None) -> Tensor:
        for utterance in utterances:
            if utterance.slot is None:
                utterance.slot = self._slots.take()
        items = torch.tensor(
            [u.pending[:n_items] for u in utterances], device=self.models.device
        )  # [B, T]
        slots = [u.slot for u in utterances if u.slot is not None]
        hidden: Tensor = self.models.llm(self.models.llm.embed(items), self._slots, slots)
        return hidden  # [B, T, H]

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
    def render(self, utterances: Sequence[Utterance], chunks: Sequence[Chunk]) -> list[Audio]:
        """Audio of each utterance's chunk; may be empty while the vocoder looks ahead."""
        mels = self._mels(utterances, chunks)
        audio = []
        for utterance, chunk, mel in zip(utterances, chunks, mels, strict=True):
            samples = self._audio(utterance.voiceover, mel, last=chunk.is_last)
            audio.append(samples.cpu().numpy().astype(np.float32, copy=False))
        self._keep_to_budget()
        return audio

    @torch.inference_mode()
    def warm(self, utterance: Utterance) -> None:
        """Begin the utterance's voiceover: its voice's own blocks are computed, or found."""
        if utterance.voiceover is None:
            utterance.voiceover = self._voiceover(utterance.request)

    def _audio(self, voiceover: Voiceover, mel: Tensor, *, last: bool) -> Tensor:
        voiceover.n_frames += len(mel)
        if voiceover.tempo is not None:
            mel = voiceover.tempo.extend(mel, last=last)
        return self.models.vocoder.extend(voiceover.vocoder, mel, last)

    def _mels(self, utterances: Sequence[Utterance], chunks: Sequence[Chunk]) -> list[Tensor]:
        """The next mel frames of each; those that are rendered alike share one pass."""
        mels: dict[int, Tensor] = {}
        together = []
        for i, (utterance, chunk) in enumerate(zip(utterances, chunks, strict=True)):
            self.warm(utterance)
            if self._ends_in_full(utterance, chunk):
                mels[i] = self._full_pass(utterance)[utterance.voiceover.n_frames :]
            else:
                together.append(i)
        done = self.models.flow.extend_all(
            [utterances[i].voiceover.flow for i in together],
            [chunks[i].tokens for i in together],
            [chunks[i].is_last for i in together],
        )
        mels |= dict(zip(together, done, strict=True))
        return [mels[i] for i in range(len(chunks))]

    def _ends_in_full(self, utterance: Utterance, chunk: Chunk) -> bool:
        """The reference's last call: everything once more, with full attention."""
        is_streaming = utterance.request.streaming
        return chunk.is_last and is_streaming and not self.config.rules.end_causal

    def _full_pass(self, utterance: Utterance) -> Tensor:
        state = self._flow_state(utterance.request, chunked=False)
        return self.models.flow.extend(state, utterance.tokens, last=True)

    def _voiceover(self, request: Request) -> Voiceover:
        tempo: Tempo | WholeTempo | None = None
        if request.speed != 1:
            tempo = Tempo(request.speed) if request.streaming else WholeTempo(request.speed)
        voiceover = Voiceover(
            flow=self._flow_state(request, chunked=request.streaming),
            vocoder=self.models.vocoder.start(
                self.models.source_noise, early=self.config.rules.early_vocoder
            ),
            tempo=tempo,
        )
        self._live.append(voiceover)
        return voiceover

    def _flow_state(self, request: Request, *, chunked: bool) -> FlowState:
        flow, noise, prompt = self.models.flow, self.models.flow_noise, request.prompt.flow
        if not chunked:
            return flow.start(prompt, self._solver, noise, chunked=False)
        prefix = self.prefixes.get(prompt.key, lambda: flow.prefix(prompt, self._solver, noise))
        return flow.fork(prefix)

    def _keep_to_budget(self) -> None:
        """Let the largest states recompute what there is no room to keep."""
        while sum(v.flow.n_bytes for v in self._live) > self.config.flow_bytes:
            largest = max(self._live, key=lambda v: v.flow.n_bytes)
            if not self.n_dropped_steps:
                log.warning(
                    "the flow's memory budget of %d MB is full: some steps are computed anew, "
                    "which is exact but slower",
                    self.config.flow_bytes >> 20,
                )
            self.n_dropped_steps += 1
            largest.flow.drop_step()

    # Giving back.

    def release_slot(self, utterance: Utterance) -> None:
        """Give the utterance's slot back, if it holds one."""
        if utterance.slot is not None:
            self._slots.release(utterance.slot)
            utterance.slot = None

    def release(self, utterance: Utterance) -> None:
        """Free everything the utterance holds."""
        self.release_slot(utterance)
        if utterance.voiceover is not None:
            utterance.voiceover.flow.free()
            self._live.remove(utterance.voiceover)
            utterance.voiceover = None
