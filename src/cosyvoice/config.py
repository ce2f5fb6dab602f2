"""Numbers: the constants of the audio, the sizes of the model, the rules of a run.

Comes in: nothing, or the plain data that `hyperyaml.read` makes of `cosyvoice3.yaml`.
Goes out: frozen dataclasses. Knows no tensor and no file.
"""

from dataclasses import dataclass
from math import prod

# Frame arithmetic of CosyVoice3. Everything follows from three rates.
SAMPLE_RATE_HZ = 24_000  # of what we speak
TOKENS_HZ = 25  # speech tokens per second
FRAMES_PER_TOKEN = 2  # mel frames per speech token
FRAMES_HZ = TOKENS_HZ * FRAMES_PER_TOKEN  # 50
FRAME_SAMPLES = SAMPLE_RATE_HZ // FRAMES_HZ  # 480
TOKEN_SAMPLES = FRAME_SAMPLES * FRAMES_PER_TOKEN  # 960
N_MELS = 80
N_SPEECH_TOKENS = 6561  # 3 ** 8, the speech tokenizer's codes
EMBEDDING_SIZE = 192  # of a speaker vector

PROMPT_RATE_HZ = 16_000  # of what the tokenizer and the speaker model hear
MAX_PROMPT_S = 30  # the speech tokenizer takes no more
MAX_FLOW_FRAMES = 15_000  # length of the flow's noise buffer: 300 s, prompt included
MAX_TOKENS = MAX_FLOW_FRAMES // FRAMES_PER_TOKEN

MIN_SPEED = 0.25
MAX_SPEED = 4.0

# Tokens the LLM uses for silence and breath (docs/spec/llm.md section 6).
SILENT_TOKENS = frozenset({1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323})
MAX_SILENT_RUN_TOKENS = 5


@dataclass(frozen=True)
class Sampling:
    """Repetition-aware nucleus sampling (docs/spec/llm.md section 5)."""

    top_p: float = 0.8
    top_k: int = 25
    window_tokens: int = 10
    max_share: float = 0.1  # of the window; a token seen that often or more is redrawn


@dataclass(frozen=True)
class LLMConfig:
    """Sizes of the Qwen2-style decoder and its two vocabularies."""

    hidden_size: int = 896
    intermediate_size: int = 4864
    n_layers: int = 24
    n_heads: int = 14
    n_kv_heads: int = 2
    text_vocab_size: int = 151_936
    n_speech_tokens: int = N_SPEECH_TOKENS  # ids below are speech; sos, eos, task, fill follow
    n_speech_rows: int = N_SPEECH_TOKENS + 200  # rows of speech_embedding and llm_decoder
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_positions: int = 32_768
    mix_ratio: tuple[int, int] = (5, 15)  # text : speech in the interleaved mode
    sampling: Sampling = Sampling()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    @property
    def sos(self) -> int:
        return self.n_speech_tokens

    @property
    def eos(self) -> int:
        return self.n_speech_tokens + 1

    @property
    def task(self) -> int:
        return self.n_speech_tokens + 2

    @property
    def fill(self) -> int:
        return self.n_speech_tokens + 3


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the flow-matching model: conditioning, DiT, Euler solver."""

    n_speech_tokens: int = N_SPEECH_TOKENS
    n_mels: int = N_MELS
    embedding_size: int = EMBEDDING_SIZE
    lookahead_tokens: int = 3
    lookahead_channels: int = 1024
    dim: int = 1024
    depth: int = 22
    n_heads: int = 16
    head_dim: int = 64
    ff_mult: int = 2
    block_frames: int = 50  # of the block-causal mask
    cfg_rate: float = 0.7
    n_steps: int = 10  # not in the file: a constant of the reference's flow module

    @property
    def attention_size(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def block_tokens(self) -> int:
        return self.block_frames // FRAMES_PER_TOKEN


@dataclass(frozen=True)
class VocoderConfig:
    """Sizes of the causal HiFT generator and its F0 predictor."""

    n_mels: int = N_MELS
    base_channels: int = 512
    n_harmonics: int = 8  # overtones; the source has one sine more
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    voiced_threshold_hz: float = 10.0
    upsample_rates: tuple[int, ...] = (8, 5, 3)
    upsample_kernel_sizes: tuple[int, ...] = (16, 11, 7)
    n_fft: int = 16
    hop_samples: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    source_kernel_sizes: tuple[int, ...] = (7, 7, 11)
    source_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99
    lookahead_frames: int = 4  # of conv_pre
    f0_channels: int = 512
    n_f0_layers: int = 5  # this and the next two are constants of the reference's predictor
    f0_kernel_size: int = 3
    f0_lookahead_frames: int = 3  # of its first layer

    @property
    def columns_per_frame(self) -> int:
        return prod(self.upsample_rates)

    @property
    def n_sines(self) -> int:
        return self.n_harmonics + 1


@dataclass(frozen=True)
class ModelConfig:
    """Everything `cosyvoice3.yaml` and `CosyVoice-BlankEN/config.json` say about sizes."""

    llm: LLMConfig = LLMConfig()
    flow: FlowConfig = FlowConfig()
    vocoder: VocoderConfig = VocoderConfig()


@dataclass(frozen=True)
class Rules:
    """Where the reference is odd and we differ; `REFERENCE` selects its behaviour everywhere.

    The numbers in the comments are those of docs/rulings.md.
    """

    add_prefix: bool = True  # 1: complete a prompt that lacks <|endofprompt|>, else refuse it
    cut_heads: bool = True  # 2, 4: take a client's prefix off, normalise and split the rest
    instruct_saved_voice: bool = True  # 5: a saved voice obeys the instruction
    forbid_all_stops: bool = True  # 7: before min_len every stop id, not only 6561
    count_after_separator: bool = True  # 8: min_len counts the tokens after the prefix
    clean_interleave: bool = True  # 10: text-in without the reference's double feed
    end_causal: bool = True  # 11: a stream ends under the block mask, not in a full pass
    first_hop_tokens: int = 8  # 11: fewest new tokens in a stream's first chunk
    later_hop_blocks: tuple[int, ...] = (1, 2, 4)  # 11: of 25 tokens; the last one repeats
    early_vocoder: bool = True  # 11: 4 frames of vocoder delay instead of 8
    english_only: bool = True  # 19: English normaliser with lang="en", not "auto"
    clean_quotes: bool = True  # 19: without the backslashes wetext leaves before quotes


OURS = Rules()
REFERENCE = Rules(
    add_prefix=False,
    cut_heads=False,
    instruct_saved_voice=False,
    forbid_all_stops=False,
    count_after_separator=False,
    clean_interleave=False,
    end_causal=False,
    first_hop_tokens=25,
    later_hop_blocks=(2, 4),
    early_vocoder=False,
    english_only=False,
    clean_quotes=False,
)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine."""

    n_slots: int = 8  # sentences decoded together; each holds max_positions of KV cache
    max_positions: int = 4096  # LLM positions per sentence: prompt, text and speech
    n_ahead: int = 2  # sentences of one request written before they are due
    max_waiting: int = 256  # requests that may queue before Overloaded
    n_prefill_items: int = 256  # most LLM positions fed before others may draw a token
    n_render_together: int = 4  # chunks of several streams in one pass of the flow
    slack_passes: float = 2.0  # a stream with more sound left than so many passes take can wait
    guard_s: float = 0.3  # with less left, a stream that lacks tokens makes new ones wait
    flow_bytes: int = 2 << 30  # keys and values of all streams; beyond it steps are recomputed
    prefix_bytes: int = 1 << 30  # the same of voices' own frames, kept between requests
    flow_steps: int | None = None  # fewer Euler steps than the model's ten: faster, worse
    cfg_rate: float | None = None  # another strength of guidance than the model's
    rules: Rules = OURS
