"""What a number format costs in accuracy: the same inputs through float32 and through it.

In: a model directory. Out: errors of the mel and of the LLM's log-probabilities. One model is in
memory at a time, besides what the caller holds. It takes no time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosyvoice.config import EngineConfig
from cosyvoice.engine.loading import choose_format, load_models
from cosyvoice.engine.runner import Models
from cosyvoice.engine.script import plain_items
from cosyvoice.errors import BadRequest
from cosyvoice.models.llm import KVSlots
from cosyvoice.models.model_config import read_config

from .progress import tell
from .subject import Subject

FORMATS = ("bf16", "int8", "fp16", "tf32")
SPEECH_TOKENS = 50
N_TEXT = 25


@dataclass(frozen=True)
class Answer:
    """What a model says to the fixed questions."""

    mel: Tensor  # [T, 80], offline
    streamed_mel: Tensor  # [T, 80], under the block-causal mask
    logp: Tensor  # [n, V], the tokens being given


def figures(model_dir: Path, device: torch.device, prompt_s: float) -> dict[str, Any]:
    """Each format the device has, against float32."""
    config = read_config(model_dir)
    tell("errors: fp32")
    exact = _answer(model_dir, device, "fp32", prompt_s)
    found: dict[str, Any] = {}
    for name in FORMATS:
        try:
            choose_format(name, device, config)
        except BadRequest:
            continue  # this device does not have it
        tell(f"errors: {name}")
        found[name] = compare(exact, _answer(model_dir, device, name, prompt_s))
    return found


def _answer(model_dir: Path, device: torch.device, name: str, prompt_s: float) -> Answer:
    models = load_models(model_dir, device=str(device), dtype=name)
    try:
        return answer(Subject(models, EngineConfig(), prompt_s))
    finally:
        if name == "tf32":  # a setting of the process, not of the model
            torch.set_float32_matmul_precision("highest")


@torch.inference_mode()
def answer(subject: Subject) -> Answer:
    """Ask a model at hand."""
    tokens = subject.tokens(SPEECH_TOKENS, seed=1)
    return Answer(
        mel=_mel(subject, tokens, chunked=False),
        streamed_mel=_mel(subject, tokens, chunked=True),
        logp=_logp(subject.models, _items(subject, tokens), len(tokens)),
    )


def _mel(subject: Subject, tokens: list[int], *, chunked: bool) -> Tensor:
    models = subject.models
    state = models.flow.start(subject.voice(), subject.solver, models.flow_noise, chunked=chunked)
    return models.flow.extend(state, tokens, last=True).float().cpu()


def _items(subject: Subject, tokens: list[int]) -> list[int]:
    prompt = subject.tokens(subject.n_prompt_tokens)
    text = subject.text_ids(N_TEXT, seed=1)
    return [*plain_items(subject.models.llm.config, text, prompt_speech=prompt), *tokens]


def _logp(models: Models, items: list[int], n: int) -> Tensor:
    """Log-probabilities of what follows each of the last n + 1 items but the last."""
    config, device = models.llm.config, models.device
    cache = KVSlots(config, 1, len(items), device=device, dtype=torch.float32)
    x = models.llm.embed(torch.tensor([items], device=device))
    hidden = models.llm(x, cache, [cache.take()])[0, -n - 1 : -1]
    return models.llm.logits(hidden).log_softmax(-1).cpu()


def compare(exact: Answer, found: Answer) -> dict[str, float]:
    """Errors; the mel's relative to its own spread too."""
    p = exact.logp.exp()
    agreement = (exact.logp.argmax(-1) == found.logp.argmax(-1)).float().mean()
    errors = {
        "mel_rms": _rms(found.mel - exact.mel),
        "mel_rms_relative": _rms(found.mel - exact.mel) / float(exact.mel.std()),
        "mel_max": float((found.mel - exact.mel).abs().max()),
        "streamed_mel_rms": _rms(found.streamed_mel - exact.streamed_mel),
        "logp_rms": _rms(found.logp - exact.logp),
        "logp_max": float((found.logp - exact.logp).abs().max()),
        "kl_divergence": float((p * (exact.logp - found.logp)).sum(-1).mean()),
        "same_likeliest": float(agreement),
    }
    return {key: round(value, 6) for key, value in errors.items()}


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
