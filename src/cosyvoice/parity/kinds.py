"""What `dump` records, and how close another run must come: the kinds of the reference's sets.

Comes in: the sizes of a model. Goes out: a specification for every tensor, by file and name, where
a `*` stands for what depends on the input. Tolerances are those of the published golden sets.
"""

from fnmatch import fnmatchcase

from cosyvoice.config import ModelConfig

from .goldens import EXACT, INPUT, Spec, Tolerance

RECORDING = "a"  # what the one recording of a dump is called

# Names, then the tolerance of all of them.
TOKENIZER: dict[str, Tolerance] = {"ids_*": EXACT}
FEATURES: dict[str, Tolerance] = {
    "wav16k wav24k": 2e-6,
    "mel24k zero_shot.prompt_speech_feat zero_shot.llm_embedding zero_shot.flow_embedding": 2e-4,
    "whisper128": 2e-5,
    "fbank80 fbank80_cmn": 5e-4,
    "embedding": 1e-4,
    "speech_token zero_shot.*": EXACT,
}
LLM: dict[str, Tolerance] = {
    "text prompt_text prompt_speech_token forced": INPUT,
    "lm_input": 0.0,
    "prefill_hidden step_hidden": 2e-5,
    "logp": 5e-5,
}
TEXT_IN: dict[str, Tolerance] = {
    "text prompt_text prompt_speech_token": INPUT,
    "inputs": 0.0,
    "call_len logp_calls yielded": EXACT,
    "hidden": 2e-5,
    "logp": 5e-5,
}
SAMPLING: dict[str, Tolerance] = {
    "logits_* history_*": INPUT,
    "cand_ids_* repeat_*": EXACT,
    "logp_*_sel cand_prob_* fallback_*": 1e-6,
}
FLOW: dict[str, Tolerance] = {
    "token prompt_token prompt_feat embedding": INPUT,
    "schedule.token schedule.prompt_token schedule.prompt_feat": INPUT,
    "token_emb": 0.0,
    "streaming_mask": EXACT,
    "t_span": 1e-7,
    "spk euler_t.*": 1e-6,
    "rand_noise": 2e-6,
    "pre_lookahead.*": 1e-5,
    "dit_full.block0_q dit_full.block0_q_rot": 2e-5,
    "dit_full.time_embed dit_full.input_embed dit_full.input_embed.conv_pos_embed": 3e-5,
    "dit_full.norm_out dit_full.transformer_blocks.0.attn dit_full.transformer_blocks.0": 3e-5,
    "dit_full.out dit_streaming.out": 5e-5,
    "mel.* euler_x.* schedule.mel_*": 2e-4,
}
VOCODER: dict[str, Tolerance] = {
    "mel extreme.mel extreme.source": INPUT,
    "uv": EXACT,
    "f0_f64": 1e-9,
    "f0 f0_nofinal": 1e-5,
    "stft_real stft_imag": 2e-5,
    "final.conv_pre final.conv_post": 1e-4,
    "source source_nofinal sine_per_frame": 2e-4,
    "wav_final wav_nofinal chunked.wav_*": 2e-3,
    "extreme.wav": 5e-3,
}
SPEECH: dict[str, Tolerance] = {
    "tokens speed.tokens silent.tokens_in": INPUT,
    "llm_in.* silent.tokens_kept": EXACT,
    "nonstream.mel stream.mel_last speed.mel": 2e-4,
    "nonstream.wav stream.wav_* speed.wav silent.wav vc.wav short_stream.wav": 0.15,
}
NOISE: dict[str, Tolerance] = {"sine_waves": INPUT}


def kinds(config: ModelConfig) -> dict[str, dict[str, Spec]]:
    """Specifications without shapes; a name may be a pattern."""
    last = f"dit_full.transformer_blocks.{config.flow.depth - 1}"
    stages = range(len(config.vocoder.upsample_rates))
    layers = ("ups", "source_downs", "source_resblocks")
    trunk = " ".join(f"final.{layer}.{i}" for i in stages for layer in layers)
    return {
        "1_tokenizer.safetensors": _specs(TOKENIZER),
        "2_features.safetensors": _specs(FEATURES, f"{RECORDING}."),
        "3_llm.safetensors": _specs(LLM, "uni.") | _specs(TEXT_IN, "bistream."),
        "4_sampling.safetensors": _specs(SAMPLING),
        "5_flow.safetensors": _specs({**FLOW, last: 3e-5}),
        "6_hift.safetensors": _specs({**VOCODER, trunk: 1e-4}),
        "7_e2e.safetensors": _specs(SPEECH),
        "noise.safetensors": _specs(NOISE),
    }


def kind_of(specs: dict[str, Spec], name: str) -> Spec | None:
    """The specification a name falls under; the first that fits."""
    if name in specs:
        return specs[name]
    return next((spec for pattern, spec in specs.items() if fnmatchcase(name, pattern)), None)


def _specs(table: dict[str, Tolerance], prefix: str = "") -> dict[str, Spec]:
    return {
        prefix + name: Spec(tolerance, ())
        for names, tolerance in table.items()
        for name in names.split()
    }
