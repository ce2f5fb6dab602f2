"""The model under test: its production parts, each loaded when a stage first asks for it.

In: a model directory and the noise a set was recorded with. Out: tokenizer, encoder, networks.
float32 on the CPU, packed as synthesis packs it, whatever the machine has. It compares nothing.
"""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cosyvoice.config import REFERENCE, SAMPLE_RATE_HZ, ModelConfig
from cosyvoice.engine.runner import Models
from cosyvoice.frontend import FrontEnd
from cosyvoice.models.checkpoint import Loading, load_flow, load_llm, load_vocoder, read_config
from cosyvoice.models.flow import Flow
from cosyvoice.models.llm import SpeechLM
from cosyvoice.models.noise import SourceNoise, flow_noise
from cosyvoice.models.packed import pack
from cosyvoice.models.vocoder import Vocoder
from cosyvoice.text import Tokenizer
from cosyvoice.voice import VoiceEncoder
from cosyvoice.voicebook import VoiceBook

from .goldens import GoldenSet

# The reference that sets are recorded with reads llm.pt, also where there is an llm.rl.pt.
OPTIONS = Loading(use_rl=False)

FLOW_NOISE = ("5_flow.safetensors", "rand_noise")
SOURCE_NOISE = ("noise.safetensors", "sine_waves")
MARGIN_SAMPLES = 30 * SAMPLE_RATE_HZ  # drawn by our own recipe beyond what a set holds


class Subject:
    """What a model directory holds. Raises ModelFilesError where a part is missing or broken."""

    def __init__(self, model_dir: Path, goldens: GoldenSet) -> None:
        self.model_dir = model_dir
        self.config: ModelConfig = read_config(model_dir)
        self._goldens = goldens

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.model_dir)

    @cached_property
    def encoder(self) -> VoiceEncoder:
        return VoiceEncoder(self.model_dir)

    @cached_property
    def front_end(self) -> FrontEnd:
        """Assembles requests as the reference does; it has no stored voices."""
        return FrontEnd(
            tokenizer=self.tokenizer,
            encoder=self.encoder,
            book=VoiceBook(self.model_dir / "no-voices", self.encoder),
            rules=REFERENCE,
        )

    @cached_property
    def llm(self) -> SpeechLM:
        llm = load_llm(self.model_dir, self.config, options=OPTIONS)
        pack(llm)
        return llm

    @cached_property
    def flow(self) -> Flow:
        flow = load_flow(self.model_dir, self.config, options=OPTIONS)
        pack(flow.dit)
        return flow

    @cached_property
    def vocoder(self) -> Vocoder:
        return load_vocoder(self.model_dir, self.config, options=OPTIONS)

    @cached_property
    def models(self) -> Models:
        return Models(self.llm, self.flow, self.vocoder, self.flow_noise, self.source_noise)

    @cached_property
    def own_flow_noise(self) -> Tensor:
        """By our own recipe: [M, 15000]."""
        return flow_noise(n_mels=self.config.flow.n_mels)

    @cached_property
    def flow_noise(self) -> Tensor:
        """As recorded, and by our own recipe beyond: [M, 15000]."""
        noise = self.own_flow_noise.clone()
        if self._goldens.has(*FLOW_NOISE):
            recorded = self._goldens.tensor(*FLOW_NOISE)[0]  # [M, T]
            noise[:, : recorded.shape[1]] = recorded
        return noise

    @cached_property
    def source_noise(self) -> SourceNoise:
        """As recorded, and by our own recipe beyond."""
        published = SourceNoise.published(self.config)
        if not self._goldens.has(*SOURCE_NOISE):
            return published
        recorded = self._goldens.tensor(*SOURCE_NOISE)[0]  # [N, H]
        n_recorded = len(recorded)
        beyond = published.rows(n_recorded, n_recorded + MARGIN_SAMPLES)
        return SourceNoise(torch.cat([recorded, beyond]))
