"""What a model directory says about sizes, read as data and checked.

In: a directory holding `cosyvoice3.yaml` and `CosyVoice-BlankEN/config.json`. Out: ModelConfig.
Each value is checked for type and range, and what only one value of is implemented (24 kHz, 80 mel
bins, the cosine Euler solver) must have that value; errors name the file and the key.
It opens no weights and knows no tensor.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosyvoice import hyperyaml
from cosyvoice.config import (
    FRAME_SAMPLES,
    FRAMES_PER_TOKEN,
    N_MELS,
    SAMPLE_RATE_HZ,
    TOKENS_HZ,
    FlowConfig,
    LLMConfig,
    ModelConfig,
    Sampling,
    VocoderConfig,
)
from cosyvoice.errors import ModelFilesError
from cosyvoice.hyperyaml import Tagged

YAML_NAME = "cosyvoice3.yaml"
QWEN_CONFIG_NAME = "CosyVoice-BlankEN/config.json"
OLDER_YAML_NAMES = ("cosyvoice2.yaml", "cosyvoice.yaml")

N_EXTRA_SPEECH_ROWS = 200  # sos, eos, task, fill and 196 unused rows
DIT_CONV_GROUPS = 16
MAX_FILE_BYTES = 1_000_000
MAX_SIZE = 100_000  # of a width; products of four stay far below 2 ** 63
MAX_VOCABULARY = 10_000_000
MAX_LAYERS = 1_000
MAX_ITEMS = 16  # of a list of rates or kernels
MEL_WINDOW_SAMPLES = 1920


def read_config(model_dir: Path) -> ModelConfig:
    """Sizes and constants of the model in `model_dir`; ModelFilesError where they are unusable."""
    root = _read_yaml(model_dir)
    qwen = _read_json(model_dir / QWEN_CONFIG_NAME)
    _check_rates(root)
    _check_features(root.section("feat_extractor"))
    root.section("get_tokenizer").only("version", "cosyvoice3")
    config = ModelConfig(llm=_llm(root, qwen), flow=_flow(root), vocoder=_vocoder(root))
    if config.llm.n_speech_tokens != config.flow.n_speech_tokens:
        raise root.error("flow.vocab_size", "and llm.speech_token_size must be equal")
    return config


@dataclass(frozen=True)
class Section:
    """A mapping of a file, and where in the file it stands."""

    file: Path
    path: str
    values: dict[str, Any]

    def error(self, key: str, problem: str) -> ModelFilesError:
        return ModelFilesError(f"{self.file}: {self.path}{key} {problem}")

    def value(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(key, "is missing")
        value = self.values[key]
        if isinstance(value, Tagged) and value.tag == "PLACEHOLDER":
            raise self.error(key, "is a placeholder; put a value there")
        return value

    def section(self, key: str, class_name: str = "") -> "Section":
        """The mapping under `key`; where `class_name` is given, its tag must name that class."""
        value = self.value(key)
        tag = value.tag if isinstance(value, Tagged) else ""
        if class_name and tag.rpartition(".")[2] != class_name:
            found = f"!{tag}" if tag else "no class"
            raise self.error(
                key, f"must be a {class_name}, not {found}: only CosyVoice3 is supported"
            )
        inner = value.value if isinstance(value, Tagged) else value
        if not isinstance(inner, dict):
            raise self.error(key, f"must be a mapping of keys to values, not {_shown(inner)}")
        return Section(self.file, f"{self.path}{key}.", inner)

    def only(self, key: str, supported: Any) -> None:
        value = self.value(key)
        if value != supported or isinstance(value, bool) != isinstance(supported, bool):
            raise self.error(key, f"is {_shown(value)}; only {_shown(supported)} is supported")

    def count(self, key: str, at_most: int = MAX_SIZE) -> int:
        return self._count(key, self.value(key), at_most)

    def _count(self, key: str, value: Any, at_most: int) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # what arithmetic such as <chunk_size> * 2 / 1 leaves
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
            raise self.error(key, f"must be an integer from 1 to {at_most}, not {_shown(value)}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        value = self.value(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}, not {_shown(value)}")
        return float(value)

    def counts(self, key: str) -> tuple[int, ...]:
        return self._counts(key, self.value(key))

    def _counts(self, key: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_ITEMS:
            raise self.error(key, f"must be a list of 1 to {MAX_ITEMS}, not {_shown(value)}")
        return tuple(self._count(key, item, MAX_SIZE) for item in value)

    def count_lists(self, key: str) -> tuple[tuple[int, ...], ...]:
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_ITEMS:
            raise self.error(key, f"must be a list of lists, not {_shown(value)}")
        return tuple(self._counts(key, item) for item in value)

    def multiple(self, key: str, of: int, value: int) -> None:
        if value % of:
            raise self.error(key, f"({value}) must be a multiple of {of}")

    def same_length(self, key: str, *lists: Sequence[Any]) -> None:
        if len({len(items) for items in lists}) > 1:
            raise self.error(key, "and the lists that go with it must be of one length")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ModelFilesError(
                f"{file}: larger than {MAX_FILE_BYTES} bytes: not a configuration"
            )
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelFilesError(f"{file} is missing: download the model again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{file} cannot be read: {error}") from error


def _read_yaml(model_dir: Path) -> Section:
    file = model_dir / YAML_NAME
    older = [name for name in OLDER_YAML_NAMES if (model_dir / name).exists()]
    if older and not file.exists():
        raise ModelFilesError(
            f"{model_dir} holds {older[0]} but no {YAML_NAME}: only CosyVoice3 models are supported"
        )
    text = _read_text(file)
    try:
        return Section(file, "", hyperyaml.read(text))
    except ModelFilesError as error:
        raise ModelFilesError(f"{file}: {error}") from error


def _read_json(file: Path) -> Section:
    text = _read_text(file)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelFilesError(f"{file}: not a mapping of keys to values at its top level")
    return Section(file, "", values)


def _check_rates(root: Section) -> None:
    root.only("sample_rate", SAMPLE_RATE_HZ)
    root.only("token_frame_rate", TOKENS_HZ)
    root.only("token_mel_ratio", FRAMES_PER_TOKEN)


def _check_features(features: Section) -> None:
    features.only("n_fft", MEL_WINDOW_SAMPLES)
    features.only("win_size", MEL_WINDOW_SAMPLES)
    features.only("hop_size", FRAME_SAMPLES)
    features.only("num_mels", N_MELS)
    features.only("sampling_rate", SAMPLE_RATE_HZ)
    features.only("fmin", 0)
    features.only("fmax", None)
    features.only("center", supported=False)


def _llm(root: Section, qwen: Section) -> LLMConfig:
    llm = root.section("llm", "CosyVoice3LM")
    n_speech_tokens = llm.count("speech_token_size", MAX_VOCABULARY)
    mix_ratio = llm.counts("mix_ratio")
    if len(mix_ratio) != 2:
        raise llm.error("mix_ratio", "must be two integers, text and speech")
    hidden_size = qwen.count("hidden_size")
    for key in ("llm_input_size", "llm_output_size"):
        llm.only(key, hidden_size)
    n_heads, n_kv_heads = qwen.count("num_attention_heads"), qwen.count("num_key_value_heads")
    qwen.multiple("hidden_size", 2 * n_heads, hidden_size)  # rotary halves of each head
    qwen.multiple("num_attention_heads", n_kv_heads, n_heads)
    qwen.only("hidden_act", "silu")
    if "use_sliding_window" in qwen.values:
        qwen.only("use_sliding_window", supported=False)
    return LLMConfig(
        hidden_size=hidden_size,
        intermediate_size=qwen.count("intermediate_size"),
        n_layers=qwen.count("num_hidden_layers", MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        text_vocab_size=qwen.count("vocab_size", MAX_VOCABULARY),
        n_speech_tokens=n_speech_tokens,
        n_speech_rows=n_speech_tokens + N_EXTRA_SPEECH_ROWS,
        rms_norm_eps=qwen.number("rms_norm_eps", 1e-12, 1e-2),
        rope_theta=qwen.number("rope_theta", 1.0, 1e12),
        max_positions=qwen.count("max_position_embeddings", MAX_VOCABULARY),
        mix_ratio=(mix_ratio[0], mix_ratio[1]),
        sampling=_sampling(llm.section("sampling")),
    )


def _sampling(sampling: Section) -> Sampling:
    return Sampling(
        top_p=sampling.number("top_p", 0.0, 1.0),
        top_k=sampling.count("top_k"),
        window_tokens=sampling.count("win_size"),
        max_share=sampling.number("tau_r", 0.0, 1.0),
    )


def _flow(root: Section) -> FlowConfig:
    flow = root.section("flow", "CausalMaskedDiffWithDiT")
    lookahead = flow.section("pre_lookahead_layer", "PreLookaheadLayer")
    decoder = flow.section("decoder", "CausalConditionalCFM")
    estimator = decoder.section("estimator", "DiT")
    solver = decoder.section("cfm_params")
    solver = solver.section("content") if "content" in solver.values else solver
    lookahead_tokens = flow.count("pre_lookahead_len")
    for key in ("input_size", "output_size"):
        flow.only(key, N_MELS)
    for key in ("mel_dim", "mu_dim", "spk_dim", "out_channels"):
        estimator.only(key, N_MELS)
    flow.only("input_frame_rate", TOKENS_HZ)
    lookahead.only("in_channels", N_MELS)
    lookahead.only("pre_lookahead_len", lookahead_tokens)
    solver.only("solver", "euler")
    solver.only("t_scheduler", "cosine")
    dim, head_dim = estimator.count("dim"), estimator.count("dim_head")
    block_frames = estimator.count("static_chunk_size")
    estimator.multiple("dim", DIT_CONV_GROUPS, dim)
    estimator.multiple("dim_head", 2, head_dim)  # rotary pairs
    estimator.multiple("static_chunk_size", FRAMES_PER_TOKEN, block_frames)
    return FlowConfig(
        n_speech_tokens=flow.count("vocab_size", MAX_VOCABULARY),
        n_mels=N_MELS,
        embedding_size=root.count("spk_embed_dim"),
        lookahead_tokens=lookahead_tokens,
        lookahead_channels=lookahead.count("channels"),
        dim=dim,
        depth=estimator.count("depth", MAX_LAYERS),
        n_heads=estimator.count("heads", MAX_LAYERS),
        head_dim=head_dim,
        ff_mult=estimator.count("ff_mult", MAX_LAYERS),
        block_frames=block_frames,
        cfg_rate=solver.number("inference_cfg_rate", 0.0, 100.0),
    )


def _vocoder(root: Section) -> VocoderConfig:
    hift = root.section("hift", "CausalHiFTGenerator")
    istft = hift.section("istft_params")
    f0 = hift.section("f0_predictor", "CausalConvRNNF0Predictor")
    hift.only("in_channels", N_MELS)
    hift.only("sampling_rate", SAMPLE_RATE_HZ)
    f0.only("in_channels", N_MELS)
    f0.only("num_class", 1)
    config = VocoderConfig(
        n_mels=N_MELS,
        base_channels=hift.count("base_channels"),
        n_harmonics=hift.count("nb_harmonics", 1_000),
        sine_amplitude=hift.number("nsf_alpha", 0.0, 10.0),
        noise_std=hift.number("nsf_sigma", 0.0, 10.0),
        voiced_threshold_hz=hift.number("nsf_voiced_threshold", 0.0, SAMPLE_RATE_HZ / 2),
        upsample_rates=hift.counts("upsample_rates"),
        upsample_kernel_sizes=hift.counts("upsample_kernel_sizes"),
        n_fft=istft.count("n_fft", MEL_WINDOW_SAMPLES),
        hop_samples=istft.count("hop_len", MEL_WINDOW_SAMPLES),
        resblock_kernel_sizes=hift.counts("resblock_kernel_sizes"),
        resblock_dilations=hift.count_lists("resblock_dilation_sizes"),
        source_kernel_sizes=hift.counts("source_resblock_kernel_sizes"),
        source_dilations=hift.count_lists("source_resblock_dilation_sizes"),
        lrelu_slope=hift.number("lrelu_slope", 0.0, 1.0),
        audio_limit=hift.number("audio_limit", 0.0, 1.0),
        lookahead_frames=hift.count("conv_pre_look_right", 1_000),
        f0_channels=f0.count("cond_channels"),
    )
    _check_vocoder(hift, config)
    return config


def _check_vocoder(hift: Section, config: VocoderConfig) -> None:
    rates = config.upsample_rates
    hift.same_length(
        "upsample_rates", rates, config.upsample_kernel_sizes, config.source_kernel_sizes
    )
    hift.same_length(
        "resblock_dilation_sizes", config.resblock_dilations, config.resblock_kernel_sizes
    )
    hift.same_length(
        "source_resblock_dilation_sizes", config.source_dilations, config.source_kernel_sizes
    )
    if math.prod(rates) * config.hop_samples != FRAME_SAMPLES:
        raise hift.error(
            "upsample_rates", f"times hop_len must give {FRAME_SAMPLES} samples a frame"
        )
    hift.multiple("base_channels", 2 ** len(rates), config.base_channels)
    hift.multiple("istft_params.n_fft", 2 * config.hop_samples, config.n_fft)
    for key in ("resblock_kernel_sizes", "source_resblock_kernel_sizes"):
        if any(kernel % 2 == 0 for kernel in hift.counts(key)):
            raise hift.error(key, "must be odd numbers")
