"""The small files of a model directory: configuration, tokenizer, a word to the reader.

In: sizes and a tokenizer. Out: `cosyvoice3.yaml`, `CosyVoice-BlankEN/*`, `README.md`.
It knows no weights and reads nothing back but the README's first line.
"""

import json
from pathlib import Path
from string import Template
from typing import Any

from cosyvoice.config import ModelConfig

from .tokenizer import FILE_SPECIALS, Tokenizer

README_TITLE = "# Random CosyVoice3 model"
README = """{title}

Written by `cosyvoice init-model {options}`. Its weights are random: it makes noise, not speech.
Every file has the name, the layout and the tensor names of the published checkpoint.
"""

YAML = Template("""\
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:numpy.random.seed [1986]
__set_seed3: !apply:torch.manual_seed [1986]
__set_seed4: !apply:torch.cuda.manual_seed_all [1986]

sample_rate: 24000
llm_input_size: $hidden_size
llm_output_size: $hidden_size
spk_embed_dim: $embedding_size
qwen_pretrain_path: ''
token_frame_rate: 25
token_mel_ratio: 2

chunk_size: $block_tokens
num_decoding_left_chunks: -1

llm: !new:cosyvoice.llm.llm.CosyVoice3LM
    llm_input_size: !ref <llm_input_size>
    llm_output_size: !ref <llm_output_size>
    speech_token_size: $n_speech_tokens
    length_normalized_loss: True
    lsm_weight: 0
    mix_ratio: $mix_ratio
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: $top_p
        top_k: $top_k
        win_size: $window_tokens
        tau_r: $max_share

flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithDiT
    input_size: $n_mels
    output_size: $n_mels
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: $n_speech_tokens
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: $lookahead_tokens
    pre_lookahead_layer: !new:cosyvoice.transformer.upsample_encoder.PreLookaheadLayer
        in_channels: $n_mels
        channels: $lookahead_channels
        pre_lookahead_len: $lookahead_tokens
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: $n_mels
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: $cfg_rate
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.DiT.dit.DiT
            dim: $dim
            depth: $depth
            heads: $n_heads
            dim_head: $head_dim
            ff_mult: $ff_mult
            mel_dim: $n_mels
            mu_dim: $n_mels
            spk_dim: $n_mels
            out_channels: $n_mels
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>

hift: !new:cosyvoice.hifigan.generator.CausalHiFTGenerator
    in_channels: $n_mels
    base_channels: $base_channels
    nb_harmonics: $n_harmonics
    sampling_rate: !ref <sample_rate>
    nsf_alpha: $sine_amplitude
    nsf_sigma: $noise_std
    nsf_voiced_threshold: $voiced_threshold_hz
    upsample_rates: $upsample_rates
    upsample_kernel_sizes: $upsample_kernel_sizes
    istft_params:
        n_fft: $n_fft
        hop_len: $hop_samples
    resblock_kernel_sizes: $resblock_kernel_sizes
    resblock_dilation_sizes: $resblock_dilations
    source_resblock_kernel_sizes: $source_kernel_sizes
    source_resblock_dilation_sizes: $source_dilations
    lrelu_slope: $lrelu_slope
    audio_limit: $audio_limit
    conv_pre_look_right: $lookahead_frames
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.CausalConvRNNF0Predictor
        num_class: 1
        in_channels: $n_mels
        cond_channels: $f0_channels

get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <qwen_pretrain_path>
    skip_special_tokens: True
    version: cosyvoice3
allowed_special: 'all'
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: $n_mels
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: null
    center: False
""")


def write_small_files(
    directory: Path, config: ModelConfig, tokenizer: Tokenizer, options: str
) -> None:
    """Everything that is neither weights nor ONNX; `options` say how the model was made."""
    _write(directory / "README.md", README.format(title=README_TITLE, options=options))
    _write(directory / "cosyvoice3.yaml", yaml_text(config))
    qwen = directory / "CosyVoice-BlankEN"
    qwen.mkdir()
    n_base = len(tokenizer.vocabulary)
    _write_json(qwen / "config.json", _qwen_config(config, n_base))
    _write_json(qwen / "generation_config.json", _generation_config(config, n_base))
    _write_json(qwen / "tokenizer_config.json", _tokenizer_config(config, n_base))
    _write(qwen / "vocab.json", json.dumps(tokenizer.vocabulary, ensure_ascii=False))
    merges = "".join(f"{a} {b}\n" for a, b in tokenizer.merges)
    _write(qwen / "merges.txt", f"#version: 0.2\n{merges}")


def is_ours(directory: Path) -> bool:
    """True where an earlier call has written this directory."""
    readme = directory / "README.md"
    return readme.is_file() and readme.read_bytes().startswith(README_TITLE.encode())


def yaml_text(config: ModelConfig) -> str:
    """`cosyvoice3.yaml` of these sizes, with the tags and references of the published one."""
    values: dict[str, Any] = vars(config.vocoder) | vars(config.llm.sampling) | vars(config.flow)
    lists = {key: _as_lists(value) for key, value in values.items()}
    return YAML.substitute(
        lists,
        hidden_size=config.llm.hidden_size,
        mix_ratio=_as_lists(config.llm.mix_ratio),
        block_tokens=config.flow.block_tokens,
    )


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _qwen_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    llm = config.llm
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_positions,
        "max_window_layers": llm.n_layers,
        "model_type": "qwen2",
        "num_attention_heads": llm.n_heads,
        "num_hidden_layers": llm.n_layers,
        "num_key_value_heads": llm.n_kv_heads,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_theta": llm.rope_theta,
        "sliding_window": llm.max_positions,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": llm.text_vocab_size,
    }


def _generation_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    return {
        "bos_token_id": end_of_text,
        "do_sample": False,
        "eos_token_id": end_of_text,
        "max_new_tokens": config.llm.max_positions // 16,
    }


def _tokenizer_config(config: ModelConfig, n_base: int) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(n_base + i): {"content": token, **flags, "special": True}
            for i, token in enumerate(FILE_SPECIALS)
        },
        "additional_special_tokens": list(FILE_SPECIALS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": FILE_SPECIALS[0],
        "errors": "replace",
        "model_max_length": config.llm.max_positions,
        "pad_token": FILE_SPECIALS[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(file: Path, values: dict[str, Any]) -> None:
    _write(file, json.dumps(values, indent=2) + "\n")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
