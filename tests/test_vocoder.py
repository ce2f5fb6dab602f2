"""The vocoder: whole whatever the cuts, and equal to the reference's tensors."""

import json
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cosyvoice.config import FRAME_SAMPLES, VocoderConfig
from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.models.model_config import read_config
from cosyvoice.models.noise import SourceNoise
from cosyvoice.models.vocoder import MAX_PIECE_FRAMES, Vocoder
from cosyvoice.models.weight_norm import fold_weight_norm

STAGE = "6_hift.safetensors"
TINY = VocoderConfig(base_channels=16, f0_channels=8)
EARLY_EDGE = 4  # samples that wait for the next column
TOLERANCE = 1e-5  # of a law, on audio between -1 and 1


@pytest.fixture(scope="module")
def tiny() -> Vocoder:
    torch.manual_seed(0)
    vocoder = Vocoder(TINY).eval().requires_grad_(requires_grad=False)
    # Loud enough to tell, and voiced now and then.
    vocoder.f0_predictor.classifier.weight.mul_(200)
    vocoder.f0_predictor.classifier.bias.fill_(100)
    vocoder.conv_post.weight.mul_(3)
    return vocoder


@pytest.fixture(scope="module")
def noise() -> SourceNoise:
    draw = torch.Generator().manual_seed(1)
    return SourceNoise(torch.rand(300 * FRAME_SAMPLES, TINY.n_sines, generator=draw))


def mel_of(n_frames: int) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(n_frames, TINY.n_mels, generator=draw)  # [T, 80]


def cut(n_frames: int, rng: random.Random) -> list[int]:
    """Lengths of pieces, some of them empty."""
    marks = sorted(rng.randint(0, n_frames) for _ in range(rng.randint(0, 9)))
    edges = [0, *marks, n_frames]
    return [b - a for a, b in zip(edges, edges[1:], strict=False)]


def speak(
    vocoder: Vocoder, noise: SourceNoise, pieces: list[Tensor], *, early: bool = True
) -> list[Tensor]:
    state = vocoder.start(noise, early=early)
    n_last = len(pieces) - 1
    return [vocoder.extend(state, mel, last=i == n_last) for i, mel in enumerate(pieces)]


def whole(vocoder: Vocoder, noise: SourceNoise, mel: Tensor) -> Tensor:
    """In one pass of the network, without any state carried."""
    f0 = vocoder.pitch(mel.T[None])
    source = vocoder.excite(f0, noise.rows(0, len(mel) * FRAME_SAMPLES)[None])
    return vocoder.decode(mel.T[None], source)[0]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("n_frames", [1, 2, 4, 5, 8, 9, 31])
def test_any_cut_gives_the_audio_of_one_call(
    tiny: Vocoder, noise: SourceNoise, n_frames: int, early: bool
) -> None:
    mel = mel_of(n_frames)
    expected = whole(tiny, noise, mel)
    assert expected.shape == (n_frames * FRAME_SAMPLES,)
    assert expected.std() > 0.01
    rng = random.Random(n_frames)
    cuts = [[n_frames], [1] * n_frames, [n_frames, 0], *(cut(n_frames, rng) for _ in range(8))]
    for lengths in cuts:
        audio = torch.cat(speak(tiny, noise, list(mel.split(lengths)), early=early))
        assert audio.shape == expected.shape, lengths
        assert (audio - expected).abs().max() < TOLERANCE, lengths


def test_long_mel_in_one_call_equals_one_pass(tiny: Vocoder, noise: SourceNoise) -> None:
    mel = mel_of(2 * MAX_PIECE_FRAMES + 3)
    (audio,) = speak(tiny, noise, [mel])
    assert (audio - whole(tiny, noise, mel)).abs().max() < TOLERANCE


def test_early_audio_is_four_frames_behind_the_mel(tiny: Vocoder, noise: SourceNoise) -> None:
    state = tiny.start(noise)
    n_samples = 0
    for n_frames, frame in enumerate(mel_of(12).split(1), start=1):
        n_samples += len(tiny.extend(state, frame, last=False))
        assert n_samples == max(FRAME_SAMPLES * (n_frames - 4) - EARLY_EDGE, 0)


def test_late_audio_is_as_late_as_the_references(tiny: Vocoder, noise: SourceNoise) -> None:
    state = tiny.start(noise, early=False)
    n_samples = 0
    for n_frames, frame in enumerate(mel_of(12).split(1), start=1):
        n_samples += len(tiny.extend(state, frame, last=False))
        assert n_samples == max(FRAME_SAMPLES * (n_frames - 8), 0)


def test_no_mel_at_all_is_silence_of_no_length(tiny: Vocoder, noise: SourceNoise) -> None:
    audio = speak(tiny, noise, [mel_of(0), mel_of(0)])
    assert [len(part) for part in audio] == [0, 0]


def test_states_do_not_mix(tiny: Vocoder, noise: SourceNoise) -> None:
    mel, other = mel_of(20), -mel_of(20)
    state, other_state = tiny.start(noise), tiny.start(noise)
    parts = []
    for i, pair in enumerate(zip(mel.split(5), other.split(5), strict=True)):
        parts.append(tiny.extend(state, pair[0], last=i == 3))
        tiny.extend(other_state, pair[1], last=i == 3)
    assert (torch.cat(parts) - whole(tiny, noise, mel)).abs().max() < TOLERANCE


def tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))


@pytest.mark.parametrize("early", [True, False])
def test_the_state_does_not_grow(tiny: Vocoder, noise: SourceNoise, early: bool) -> None:
    state = tiny.start(noise, early=early)
    shapes = [tensor.shape for tensor in tensors_of(state)]
    assert all(shape[0] == 1 for shape in shapes)
    for n_frames in (1, 3, 20, 120, 7):
        tiny.extend(state, mel_of(n_frames), last=False)
        assert [tensor.shape for tensor in tensors_of(state)] == shapes
        # No view that keeps a longer tensor alive.
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors_of(state))


def test_a_batch_is_what_each_row_is_alone(tiny: Vocoder) -> None:
    draw = torch.Generator().manual_seed(3)
    mel = torch.randn(3, 80, 6, generator=draw)
    noise = torch.rand(3, 6 * FRAME_SAMPLES, TINY.n_sines, generator=draw)
    together = tiny.decode(mel, tiny.excite(tiny.pitch(mel), noise))
    for i in range(3):
        row = slice(i, i + 1)
        alone = tiny.decode(mel[row], tiny.excite(tiny.pitch(mel[row]), noise[row]))
        assert (together[row] - alone).abs().max() < TOLERANCE


def test_gradients_reach_the_trunk_from_the_audio_and_the_predictor_from_the_pitch() -> None:
    torch.manual_seed(0)
    vocoder = Vocoder(TINY)
    mel = torch.randn(2, 80, 6)
    f0 = vocoder.pitch(mel)
    audio = vocoder.decode(mel, vocoder.excite(f0, torch.randn(2, 6 * FRAME_SAMPLES, 9)))
    audio.square().mean().backward(retain_graph=True)
    parameters = dict(vocoder.named_parameters())
    reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    predictor = {name for name in parameters if name.startswith("f0_predictor.")}
    assert reached == parameters.keys() - predictor
    f0.mean().backward()
    assert all(parameters[name].grad is not None for name in predictor)


def test_speech_longer_than_the_noise_is_refused(tiny: Vocoder) -> None:
    short = SourceNoise(torch.zeros(10 * FRAME_SAMPLES, TINY.n_sines))
    with pytest.raises(BadRequest, match="split the text"):
        speak(tiny, short, [mel_of(11)])


# Equal to the reference.


@pytest.fixture(scope="module")
def stored(golden_model: Path) -> dict[str, Tensor]:
    return torch.load(golden_model / "hift.pt", weights_only=True)


@pytest.fixture(scope="module")
def published(golden_model: Path, stored: dict[str, Tensor]) -> Vocoder:
    vocoder = Vocoder(read_config(golden_model).vocoder)
    vocoder.load_state_dict(fold_weight_norm(stored))
    return vocoder.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def expected(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / STAGE)


@pytest.fixture(scope="module")
def recorded_noise(golden: Path) -> SourceNoise:
    return SourceNoise(load_file(golden / "noise.safetensors")["sine_waves"][0])


def layer_outputs(vocoder: Vocoder, mel: Tensor, source: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[f"final.{name}"] = output

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in vocoder.named_modules()]
    outputs["wav_final"] = vocoder.decode(mel, source)
    for hook in hooks:
        hook.remove()
    return outputs


def source_outputs(vocoder: Vocoder, mel: Tensor, noise: SourceNoise) -> dict[str, Tensor]:
    f0_f64 = vocoder.pitch(mel)
    f0 = f0_f64.float()
    source = vocoder.excite(f0, noise.rows(0, f0.shape[1] * FRAME_SAMPLES)[None])
    margin = vocoder.fourier.margin_samples
    padded = nn.functional.pad(source, (margin, margin), mode="reflect")
    real, imaginary = vocoder.fourier.analyse(padded).chunk(2, dim=1)
    n_known = f0.shape[1] - vocoder.config.f0_lookahead_frames
    return {
        "f0_f64": f0_f64,
        "f0": f0,
        "f0_nofinal": f0[:, :n_known],
        "source": source,
        "source_nofinal": source[..., : n_known * FRAME_SAMPLES],
        "sine_per_frame": vocoder.m_source.sines(f0, vocoder.m_source.start()),
        "uv": vocoder.m_source.voiced(f0),
        "stft_real": real,
        "stft_imag": imaginary,
    }


def chunked_outputs(
    vocoder: Vocoder, noise: SourceNoise, expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """In the pieces that were recorded; those but the last end 8 frames after their audio."""
    mel = expected["mel"][0].T
    names = sorted(name for name in expected if name.startswith("chunked."))
    n_samples = torch.tensor([expected[name].shape[1] for name in names[:-1]]).cumsum(0)
    edges = (n_samples // FRAME_SAMPLES + 8).tolist()
    pieces = mel.tensor_split(edges)
    return dict(zip(names, speak(vocoder, noise, list(pieces), early=False), strict=True))


def test_every_recorded_tensor_is_met(
    golden: Path, published: Vocoder, expected: dict[str, Tensor], recorded_noise: SourceNoise
) -> None:
    notes = json.loads((golden / "goldens.json").read_text())
    mel = expected["mel"]
    ours = source_outputs(published, mel, recorded_noise)
    ours |= layer_outputs(published, mel, ours["source"])
    ours |= chunked_outputs(published, recorded_noise, expected)
    state = published.start(recorded_noise, early=False)
    ours["wav_nofinal"] = published.extend(state, mel[0].T, last=False)
    ours["extreme.wav"] = published.decode(expected["extreme.mel"], expected["extreme.source"])
    for name, tensor in expected.items():
        tolerance = notes["tensors"][f"{STAGE}:{name}"]["tolerance"]
        if tolerance == "input":
            continue
        difference = (ours[name].reshape(tensor.shape) - tensor).abs()
        assert difference.max() <= (0 if tolerance == "exact" else tolerance), name
        if "wav" in name:
            limit = notes["params"]["waveform_rms"]["max_rms_difference"]
            assert difference.square().mean().sqrt() < limit, name


# Weights as they are stored.


def renamed(stored: dict[str, Tensor], gain: str, direction: str) -> dict[str, Tensor]:
    return {
        name.replace("parametrizations.weight.original0", gain).replace(
            "parametrizations.weight.original1", direction
        ): value
        for name, value in stored.items()
    }


def test_all_forms_of_stored_weights_fold_alike(stored: dict[str, Tensor]) -> None:
    folded = fold_weight_norm(stored)
    older = fold_weight_norm(renamed(stored, "weight_g", "weight_v"))
    again = fold_weight_norm(folded)
    assert folded.keys() == older.keys() == again.keys()
    for name, value in folded.items():
        assert torch.equal(value, older[name])
        assert torch.equal(value, again[name])
        wanted = torch.float64 if name.startswith("f0_predictor.") else torch.float32
        assert value.dtype == wanted, name


def test_folding_is_torchs_weight_norm() -> None:
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 5, 7))
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)
    folded = fold_weight_norm(nn.ModuleDict({"conv": conv}).state_dict())
    torch.testing.assert_close(folded["conv.weight"], conv.weight)


def test_a_trainers_checkpoint_gives_its_generator(stored: dict[str, Tensor]) -> None:
    trained = {f"generator.{name}": value for name, value in stored.items()}
    trained |= {"discriminator.0.weight": torch.zeros(1), "epoch": 3, "step": 1000}
    assert fold_weight_norm(trained).keys() == fold_weight_norm(stored).keys()


def test_half_of_a_weight_is_refused(stored: dict[str, Tensor]) -> None:
    half = dict(stored)
    del half["conv_pre.parametrizations.weight.original0"]
    with pytest.raises(ModelFilesError, match="conv_pre"):
        fold_weight_norm(half)
