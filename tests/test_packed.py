"""Packed layers compute what the layers they replace compute."""

import pytest
import torch
from torch import nn

from cosyvoice.config import LLMConfig
from cosyvoice.models.layers import Joint, Projection
from cosyvoice.models.llm import KVSlots, SpeechLM
from cosyvoice.models.packed import Int8Linear, PackedLinear, pack


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (1, 1, 16)])
def test_packed_is_the_layer(has_bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = Projection(16, 24, bias=has_bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer.weight, layer.bias)(x), layer(x))
        half = Projection(16, 24, bias=has_bias).bfloat16()
        packed = PackedLinear(half.weight, half.bias)(x)
        assert packed.dtype == torch.bfloat16
        torch.testing.assert_close(packed, half(x), atol=2e-2, rtol=2e-2)


def test_int8_is_the_layer_within_two_percent() -> None:
    layer, x = Projection(256, 64), torch.randn(40, 256)
    with torch.inference_mode():
        error = Int8Linear(layer.weight, layer.bias)(x) - layer(x)
        assert error.square().mean().sqrt() < 0.02 * layer(x).std()


def test_int8_takes_a_row_of_zeros() -> None:
    weight = torch.randn(8, 16)
    weight[3] = 0
    y = Int8Linear(weight, None)(torch.randn(2, 16))
    assert torch.isfinite(y).all()
    assert (y[:, 3] == 0).all()


def test_a_joint_is_one_product_and_keeps_its_parts() -> None:
    joint = Joint({"a": Projection(16, 8), "b": Projection(16, 24)})
    network, x = nn.Sequential(joint), torch.randn(5, 16)
    want = torch.cat([joint["a"](x), joint["b"](x)], dim=-1)
    torch.testing.assert_close(joint(x), want)
    pack(network, PackedLinear)
    with torch.inference_mode():
        torch.testing.assert_close(network(x), want)


@pytest.mark.parametrize(("kind", "tolerance"), [(PackedLinear, 1e-5), (Int8Linear, 0.1)])
def test_a_packed_network_says_the_same(
    kind: type[PackedLinear] | type[Int8Linear], tolerance: float
) -> None:
    torch.manual_seed(0)
    config = LLMConfig(
        hidden_size=64, intermediate_size=96, n_layers=2, n_heads=4, n_kv_heads=2,
        text_vocab_size=50, n_speech_tokens=30, n_speech_rows=40,
    )  # fmt: skip
    lm = SpeechLM(config).eval()
    x = lm.embed(torch.arange(12)[None]).detach()

    def logits() -> torch.Tensor:
        cache = KVSlots(config, 1, 16, device="cpu", dtype=torch.float32)
        with torch.inference_mode():
            return lm.logits(lm(x, cache, [cache.take()]))

    want = logits()
    pack(lm, kind)
    assert (logits() - want).abs().max() < tolerance * want.std()
