"""The noise buffers: bit-equal to the published recipe, drawn without touching anyone's state."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.config import MAX_FLOW_FRAMES, ModelConfig, VocoderConfig
from cosyvoice.errors import BadRequest
from cosyvoice.models.model_config import read_config
from cosyvoice.models.noise import MAX_SOURCE_SAMPLES, SourceNoise, flow_noise

SMALL = ModelConfig(vocoder=VocoderConfig(f0_channels=4))


def test_the_flow_noise_has_the_published_values() -> None:
    noise = flow_noise()
    assert noise.shape == (80, MAX_FLOW_FRAMES)
    head = torch.tensor([-1.1258398, -1.1523602, -0.2505786, -0.4338788])
    torch.testing.assert_close(noise[0, :4], head, atol=1e-7, rtol=0)
    assert noise[1, 0].item() == pytest.approx(0.8691794, abs=1e-7)


def test_a_shorter_flow_noise_is_the_beginning_of_the_whole() -> None:
    assert torch.equal(flow_noise(7), flow_noise()[:, :7])


def test_the_source_noise_has_the_published_values() -> None:
    rows = SourceNoise.published(ModelConfig()).rows(0, 3)
    head = torch.tensor([0.9228, 0.4774, 0.8271])
    torch.testing.assert_close(rows[0, :3], head, atol=5e-5, rtol=0)
    column = torch.tensor([0.9228, 0.9203, 0.5090])
    torch.testing.assert_close(rows[:, 0], column, atol=5e-5, rtol=0)


def test_both_equal_the_recorded_ones(golden: Path, golden_model: Path) -> None:
    config = read_config(golden_model)
    normal = load_file(golden / "5_flow.safetensors")["rand_noise"][0]  # [80, T]
    assert (flow_noise(normal.shape[1]) - normal).abs().max() <= 2e-6
    uniform = load_file(golden / "noise.safetensors")["sine_waves"][0]  # [N, H]
    assert torch.equal(SourceNoise.published(config).rows(0, len(uniform)), uniform)


def test_the_default_layers_consume_what_we_skip() -> None:
    """The recipe is "build these layers and throw them away"; we only advance the generator."""
    config = SMALL
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.randn(1, 80, MAX_FLOW_FRAMES)
        torch.nn.Embedding(config.flow.n_speech_tokens, 80)
        torch.nn.Linear(192, 80)
        torch.nn.Conv1d(80, 4, 4)
        for _ in range(4):
            torch.nn.Conv1d(4, 4, 3)
        torch.nn.Linear(4, 1)
        torch.rand(1, 9)
        expected = torch.rand(1, 20, 9)[0]
    assert torch.equal(SourceNoise.published(config).rows(0, 20), expected)


def test_rows_drawn_in_pieces_are_those_drawn_at_once() -> None:
    pieces, whole = SourceNoise.published(SMALL), SourceNoise.published(SMALL)
    n_rows = 700_001  # beyond two drawings
    expected = whole.rows(0, n_rows)
    for start, stop in ((0, 5), (5, 300_000), (300_000, n_rows), (3, 9)):
        assert torch.equal(pieces.rows(start, stop), expected[start:stop])


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    flow_noise(1)
    SourceNoise.published(SMALL).rows(0, 10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_audio_beyond_the_buffer_is_refused() -> None:
    published = SourceNoise.published(SMALL)
    assert published.n_max_samples == MAX_SOURCE_SAMPLES
    with pytest.raises(BadRequest, match="300 s"):
        published.rows(MAX_SOURCE_SAMPLES - 10, MAX_SOURCE_SAMPLES + 1)
    with pytest.raises(BadRequest, match="0.001 s"):
        SourceNoise(torch.zeros(24, 9)).rows(0, 25)
