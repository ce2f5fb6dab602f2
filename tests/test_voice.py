"""Voices: golden tokens and speaker vectors, limits, the cache, broken model files."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosyvoice import pcm
from cosyvoice.audio import load_wav
from cosyvoice.config import FRAMES_PER_TOKEN, N_MELS
from cosyvoice.errors import BadRequest, ModelFilesError
from cosyvoice.features import mel_spectrogram, resample
from cosyvoice.voice import SPEAKER_FILE, TOKENIZER_FILE, Voice, VoiceCache, VoiceEncoder

STAGE = "2_features.safetensors"
PROMPTS = sorted(
    path.stem.removeprefix("prompt_")
    for path in (Path(__file__).parent / "golden").glob("prompt_*.wav")
)


@pytest.fixture(scope="module")
def encoder(golden_model: Path) -> VoiceEncoder:
    return VoiceEncoder(golden_model)


def hum(n_samples: int, rate_hz: int = 16000) -> bytes:
    rng = np.random.default_rng(n_samples)
    return pcm.wav_bytes(0.1 * rng.standard_normal(n_samples), rate_hz=rate_hz)


def a_voice(n_tokens: int = 5, n_frames: int = 11) -> Voice:
    mel = torch.arange(n_frames * N_MELS, dtype=torch.float32).view(n_frames, N_MELS)
    return Voice(
        embedding=torch.linspace(-1, 1, 192),
        tokens=torch.arange(n_tokens, dtype=torch.int32),
        mel=mel,
    )


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_golden_voice(golden: Path, encoder: VoiceEncoder, prompt: str) -> None:
    expected = load_file(golden / STAGE)
    rows = json.loads((golden / "goldens.json").read_text())["tensors"]
    voice = encoder.encode(golden / f"prompt_{prompt}.wav")
    assert torch.equal(voice.tokens[None], expected[f"{prompt}.speech_token"])
    embedding, mel = f"{prompt}.embedding", f"{prompt}.mel24k"
    assert (
        difference(voice.embedding[None], expected[embedding])
        <= (rows[f"{STAGE}:{embedding}"]["tolerance"])
    )
    assert difference(voice.mel.T[None], expected[mel]) <= rows[f"{STAGE}:{mel}"]["tolerance"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_golden_alignment(golden: Path, encoder: VoiceEncoder, prompt: str) -> None:
    expected = load_file(golden / STAGE)
    rows = json.loads((golden / "goldens.json").read_text())["tensors"]
    voice = encoder.encode(golden / f"prompt_{prompt}.wav").aligned()
    for part in ("llm_prompt_speech_token", "flow_prompt_speech_token"):
        assert torch.equal(voice.tokens[None], expected[f"{prompt}.zero_shot.{part}"])
    for part, ours in (("flow_embedding", voice.embedding), ("prompt_speech_feat", voice.mel)):
        name = f"{prompt}.zero_shot.{part}"
        assert difference(ours[None], expected[name]) <= rows[f"{STAGE}:{name}"]["tolerance"]


@pytest.mark.parametrize(
    ("n_tokens", "n_frames", "n_kept"), [(5, 11, 5), (5, 10, 5), (5, 9, 4), (4, 12, 4)]
)
def test_alignment_is_two_frames_a_token(n_tokens: int, n_frames: int, n_kept: int) -> None:
    whole = a_voice(n_tokens, n_frames)
    cut = whole.aligned()
    assert (len(cut.tokens), len(cut.mel)) == (n_kept, FRAMES_PER_TOKEN * n_kept)
    assert torch.equal(cut.mel, whole.mel[: len(cut.mel)])
    assert cut.aligned() is cut
    assert (len(whole.tokens), len(whole.mel)) == (n_tokens, n_frames)


def test_what_a_voice_can_do() -> None:
    bare = Voice(embedding=torch.zeros(192))
    assert (bare.can_clone, bare.is_embedding_only) == (False, True)
    assert bare.aligned() is bare
    assert (a_voice().can_clone, a_voice().is_embedding_only) == (True, False)


def test_digest_names_the_sound() -> None:
    assert a_voice().digest == a_voice().digest
    assert a_voice().digest != a_voice(4, 11).digest
    assert a_voice().digest != Voice(embedding=a_voice().embedding).digest


def test_misshapen_parts_are_our_mistake() -> None:
    with pytest.raises(AssertionError):
        Voice(embedding=torch.zeros(1, 192))
    with pytest.raises(AssertionError):
        Voice(embedding=torch.zeros(192), mel=torch.zeros(80, 4))


def test_the_older_tensor_takes_its_mel_from_16_khz(golden: Path, encoder: VoiceEncoder) -> None:
    path = golden / "prompt_b.wav"
    heard = load_wav(path, 16000)
    voice = encoder.encode(heard)
    assert torch.equal(voice.tokens, encoder.encode(path).tokens)
    assert torch.equal(voice.mel, mel_spectrogram(resample(heard, 16000, 24000))[0])
    assert not torch.equal(voice.mel, encoder.encode(path).mel)


def test_tokens_of_a_source_are_those_of_the_voice(golden: Path, encoder: VoiceEncoder) -> None:
    path = golden / "prompt_b.wav"
    assert torch.equal(encoder.tokens(path), encoder.encode(path.read_bytes()).tokens)


def test_thirty_seconds_are_allowed_and_no_sample_more(encoder: VoiceEncoder) -> None:
    assert len(encoder.tokens(hum(480_000))) == 750
    assert len(encoder.tokens(hum(30 * 22050, 22050))) == 750
    for call in (encoder.tokens, encoder.encode):
        with pytest.raises(BadRequest, match="at most 30 s"):
            call(hum(480_001))
        with pytest.raises(BadRequest, match="at most 30 s"):
            call(torch.full((1, 480_001), 0.1))


def test_one_token_is_the_shortest_voice(encoder: VoiceEncoder) -> None:
    for rate_hz in (16000, 22050, 44100):
        voice = encoder.encode(hum(rate_hz // 25, rate_hz)).aligned()
        assert len(voice.tokens) == 1
        with pytest.raises(BadRequest, match="at least 0.04 s"):
            encoder.encode(hum(rate_hz // 25 - 1, rate_hz))


def test_low_rates_are_not_upsampled(encoder: VoiceEncoder) -> None:
    for call in (encoder.tokens, encoder.encode):
        with pytest.raises(BadRequest, match="at least 16000 Hz"):
            call(hum(8000, 8000))


def test_equal_bytes_are_encoded_once(golden: Path, encoder: VoiceEncoder) -> None:
    path = golden / "prompt_a.wav"
    first, second = encoder.encode(path), encoder.encode(path.read_bytes(), "what was said")
    assert second.transcript == "what was said"
    assert first.transcript == ""
    assert second.mel is first.mel


def test_threads_that_ask_together_share_one_encoding() -> None:
    cache, release, calls = VoiceCache(2), threading.Event(), []

    def slow() -> Voice:
        calls.append(1)
        release.wait(10)
        return a_voice()

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(cache.get, "a", slow) for _ in range(4)]
        release.set()
        voices = [future.result() for future in asked]
    assert len(calls) == 1
    assert all(voice is voices[0] for voice in voices)


def test_a_failed_encoding_is_not_kept() -> None:
    cache = VoiceCache(2)

    def fails() -> Voice:
        raise BadRequest("not this one")

    for _ in range(2):
        with pytest.raises(BadRequest, match="not this one"):
            cache.get("a", fails)
    assert cache.get("a", a_voice).can_clone


def test_the_cache_forgets_the_oldest() -> None:
    cache = VoiceCache(2)
    first = cache.get("a", a_voice)
    cache.get("b", a_voice)
    assert cache.get("a", a_voice) is first
    cache.get("c", a_voice)
    assert cache.get("a", a_voice) is first
    second = a_voice()
    assert cache.get("b", lambda: second) is second


def test_a_directory_without_models_fails_when_used(tmp_path: Path) -> None:
    encoder = VoiceEncoder(tmp_path)
    for call in (lambda: encoder.encode(hum(16000)), lambda: encoder.fingerprint):
        with pytest.raises(ModelFilesError, match=r"campplus\.onnx .*download"):
            call()


@pytest.mark.parametrize("content", [b"", b"not a model", None])
@pytest.mark.parametrize("name", [SPEAKER_FILE, TOKENIZER_FILE])
def test_damaged_models_are_named(
    golden_model: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    for file in (SPEAKER_FILE, TOKENIZER_FILE):
        shutil.copyfile(golden_model / file, tmp_path / file)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ModelFilesError, match=name):
        VoiceEncoder(tmp_path).encode(hum(16000))


def test_swapped_models_are_noticed(golden_model: Path, tmp_path: Path) -> None:
    shutil.copyfile(golden_model / SPEAKER_FILE, tmp_path / TOKENIZER_FILE)
    shutil.copyfile(golden_model / TOKENIZER_FILE, tmp_path / SPEAKER_FILE)
    with pytest.raises(ModelFilesError, match="another model"):
        VoiceEncoder(tmp_path).encode(hum(16000))


def test_fingerprint_depends_on_both_files(golden_model: Path, tmp_path: Path) -> None:
    seen = {VoiceEncoder(golden_model).fingerprint}
    for name in (SPEAKER_FILE, TOKENIZER_FILE):
        for file in (SPEAKER_FILE, TOKENIZER_FILE):
            shutil.copyfile(golden_model / file, tmp_path / file)
        with (tmp_path / name).open("ab") as file:
            file.write(b"\0")
        seen.add(VoiceEncoder(tmp_path).fingerprint)
    assert len(seen) == 3
