"""Waveforms to what the models hear: resampled audio, 24 kHz mel, Whisper mel, Kaldi fbank.

Comes in: float32 samples `[B, n]` (the fbank: `[n]`). Goes out: float32 tensors, equal to the
reference's within rounding. Formulas and traps: docs/spec/frontend.md sections 2 to 5.
Knows no file, no model and no limit but the shortest clip a frame needs.

B batch, n samples, T frames, F bins of a spectrum, M mel bands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import ceil, gcd, log

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cosyvoice.config import FRAME_SAMPLES, N_MELS, PROMPT_RATE_HZ, SAMPLE_RATE_HZ
from cosyvoice.errors import BadRequest

# Resampler: a sinc under a Hann window, the defaults of torchaudio.
SINC_ZEROS = 6
SINC_ROLLOFF = 0.99
MAX_DENSE_TAPS = 1 << 20  # beyond it (44 101 Hz has a kernel of 2.8 GB) only the nonzero band

# 24 kHz mel of the flow and the vocoder.
MEL_FFT = 4 * FRAME_SAMPLES  # 1920
MEL_PAD = (MEL_FFT - FRAME_SAMPLES) // 2  # 720
MEL_MAX_HZ = SAMPLE_RATE_HZ / 2
MEL_FLOOR = 1e-5
MEL_EPS = 1e-9  # under the root
MIN_MEL_SAMPLES = MEL_PAD + 1  # a reflection needs one sample more than it copies

# Whisper mel of the speech tokenizer.
WHISPER_MELS = 128
WHISPER_FFT = PROMPT_RATE_HZ * 25 // 1000  # 400
WHISPER_HOP = PROMPT_RATE_HZ // 100  # 160
WHISPER_FLOOR = 1e-10
WHISPER_RANGE = 8.0  # decades below the loudest bin of the clip
MIN_WHISPER_SAMPLES = WHISPER_FFT // 2 + 1

# Kaldi fbank of the speaker model.
FBANK_FRAME = WHISPER_FFT
FBANK_HOP = WHISPER_HOP
FBANK_FFT = 1 << (FBANK_FRAME - 1).bit_length()  # 512
FBANK_MIN_HZ = 20.0
FBANK_MAX_HZ = PROMPT_RATE_HZ / 2
FBANK_PREEMPHASIS = 0.97
FBANK_FLOOR = 1.1920928955078125e-07  # float32 epsilon
MIN_FBANK_SAMPLES = FBANK_FRAME


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch works on this thread alone in here.

    Each thread that ever shares its work out keeps helpers of its own. Where these and the
    engine's are more than the cores, OpenMP puts them all to sleep between any two operations,
    which slows the engine by a half; what is done here is small.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def resample(samples: Tensor, source_hz: int, target_hz: int) -> Tensor:
    """`[B, n]` at `source_hz` -> `[B, ceil(n * target / source)]` at `target_hz`."""
    if source_hz == target_hz:
        return samples
    common = gcd(source_hz, target_hz)
    step, n_phases = source_hz // common, target_hz // common
    n_out = -(-samples.shape[-1] * n_phases // step)
    dense = step * n_phases <= MAX_DENSE_TAPS
    return (_resample_dense if dense else _resample_band)(samples, step, n_phases)[:, :n_out]


def _resample_dense(samples: Tensor, step: int, n_phases: int) -> Tensor:
    """One strided convolution: the arithmetic of the reference, bit for bit."""
    kernel = _dense_kernel(step, n_phases).to(samples.device)
    width = _sinc_width(step, n_phases)
    padded = F.pad(samples, (width, width + step))  # [B, width + n + width + step]
    phases = F.conv1d(padded[:, None], kernel, stride=step)  # [B, n_phases, n // step + 1]
    return phases.transpose(1, 2).flatten(1)


def _resample_band(samples: Tensor, step: int, n_phases: int) -> Tensor:
    """The same sums without the zeros of the kernel, for rates with no common divisor."""
    width = _sinc_width(step, n_phases)
    first = torch.arange(n_phases) * step // n_phases  # [n_phases], left neighbour of each phase
    taps = first[:, None] + torch.arange(-width, width + 2)  # [n_phases, K]
    kernel = _sinc_kernel(step, n_phases, taps.double()).to(samples.device)
    n_steps = samples.shape[-1] // step + 1
    padded = F.pad(samples, (width, 2 * (width + step)))
    windows = padded.unfold(-1, taps.shape[1], 1)  # [B, ., K], a view
    rows = [
        (windows[:, j * step + first.to(samples.device)] * kernel).sum(-1)  # [B, n_phases]
        for j in range(n_steps)
    ]
    return torch.cat(rows, dim=1)


def _sinc_width(step: int, n_phases: int) -> int:
    return ceil(SINC_ZEROS * step / (SINC_ROLLOFF * min(step, n_phases)))


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)  # a cached inference tensor would break a later training step
def _dense_kernel(step: int, n_phases: int) -> Tensor:
    width = _sinc_width(step, n_phases)
    taps = torch.arange(-width, width + step, dtype=torch.float64)[None]  # [1, K]
    return _sinc_kernel(step, n_phases, taps)[:, None]  # [n_phases, 1, K]


def _sinc_kernel(step: int, n_phases: int, taps: Tensor) -> Tensor:
    """Weights `[n_phases, K]` of the input samples at the float64 positions `taps`."""
    cutoff = SINC_ROLLOFF * min(step, n_phases)
    # The reference rounds the fraction to float32 before it adds it to the float64 grid.
    fraction = (torch.arange(0, -n_phases, -1)[:, None] / n_phases).float()
    time = ((fraction + taps / step) * cutoff).clamp(-SINC_ZEROS, SINC_ZEROS)
    window = torch.cos(time * torch.pi / SINC_ZEROS / 2) ** 2
    angle = time * torch.pi
    sinc = torch.where(angle == 0, 1.0, angle.sin() / angle)
    return (sinc * (window * (cutoff / step))).float()


def mel_spectrogram(samples: Tensor) -> Tensor:
    """24 kHz samples `[B, n]` -> natural-log mel magnitudes `[B, n // 480, 80]`."""
    _require(samples, MIN_MEL_SAMPLES, SAMPLE_RATE_HZ)
    padded = F.pad(samples[:, None], (MEL_PAD, MEL_PAD), mode="reflect")[:, 0]
    spectrum = torch.stft(
        padded,
        MEL_FFT,
        FRAME_SAMPLES,
        window=_hann(MEL_FFT).to(samples.device),
        center=False,
        return_complex=True,
    )  # [B, F, T]
    magnitude = torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + MEL_EPS)
    bank = slaney_filters(SAMPLE_RATE_HZ, MEL_FFT, N_MELS, MEL_MAX_HZ).to(samples.device)
    return torch.log((bank @ magnitude).clamp(min=MEL_FLOOR)).transpose(1, 2)


def whisper_mel(samples: Tensor) -> Tensor:
    """16 kHz samples `[B, n]` -> Whisper's scaled log10 mel `[B, 128, n // 160]`."""
    _require(samples, MIN_WHISPER_SAMPLES, PROMPT_RATE_HZ)
    spectrum = torch.stft(
        samples,
        WHISPER_FFT,
        WHISPER_HOP,
        window=_hann(WHISPER_FFT).to(samples.device),
        return_complex=True,
    )  # [B, F, T + 1]
    power = spectrum[..., :-1].abs() ** 2
    bank = slaney_filters(PROMPT_RATE_HZ, WHISPER_FFT, WHISPER_MELS, PROMPT_RATE_HZ / 2)
    decades = torch.log10((bank.to(samples.device) @ power).clamp(min=WHISPER_FLOOR))
    loudest = decades.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(decades, loudest - WHISPER_RANGE) + 4.0) / 4.0


def kaldi_fbank(samples: Tensor) -> Tensor:
    """16 kHz samples `[n]` -> natural-log mel energies `[T, 80]`, no dither, no energy."""
    _require(samples, MIN_FBANK_SAMPLES, PROMPT_RATE_HZ)
    frames = samples.unfold(0, FBANK_FRAME, FBANK_HOP)  # [T, 400]
    frames = frames - frames.mean(dim=1, keepdim=True)
    previous = F.pad(frames[:, None], (1, 0), mode="replicate")[:, 0, :-1]
    frames = (frames - FBANK_PREEMPHASIS * previous) * _povey().to(samples.device)
    power = torch.fft.rfft(frames, n=FBANK_FFT).abs() ** 2.0  # [T, F]
    energies = power @ kaldi_filters(PROMPT_RATE_HZ, FBANK_FFT, N_MELS).to(samples.device)
    return torch.log(energies.clamp(min=FBANK_FLOOR))


def speaker_features(samples: Tensor) -> Tensor:
    """What the speaker model hears: the fbank `[T, 80]` less its mean over time."""
    fbank = kaldi_fbank(samples)
    return fbank - fbank.mean(dim=0, keepdim=True)


def _require(samples: Tensor, n_min_samples: int, rate_hz: int) -> None:
    if samples.shape[-1] < n_min_samples:
        raise BadRequest(
            f"the recording is too short: {samples.shape[-1]} samples at {rate_hz} Hz; "
            f"give at least {n_min_samples} ({1000 * n_min_samples / rate_hz:.0f} ms)"
        )


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def _hann(n_samples: int) -> Tensor:
    return torch.hann_window(n_samples)  # periodic


@lru_cache(maxsize=1)
@torch.inference_mode(mode=False)
def _povey() -> Tensor:
    return torch.hann_window(FBANK_FRAME, periodic=False).pow(0.85)


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def slaney_filters(rate_hz: int, n_fft: int, n_mels: int, max_hz: float) -> Tensor:
    """Triangles of unit area on the Slaney scale, from 0 Hz: `[M, F]`."""
    edges = _slaney_hz(np.linspace(0.0, _slaney_mel(max_hz), n_mels + 2))  # [M + 2]
    bins = np.linspace(0.0, rate_hz / 2, n_fft // 2 + 1)  # [F]
    ramps = edges[:, None] - bins  # [M + 2, F]
    widths = np.diff(edges)[:, None]
    triangles = np.maximum(0.0, np.minimum(-ramps[:-2] / widths[:-1], ramps[2:] / widths[1:]))
    areas = 2.0 / (edges[2:] - edges[:-2])
    # rounded before and after the areas, as librosa does
    return torch.from_numpy((triangles.astype(np.float32) * areas[:, None]).astype(np.float32))


# The Slaney scale: linear up to 1 kHz (15 mel), then 27 mel for each factor of 6.4.
_LINEAR_HZ = 200.0 / 3.0
_KNEE_HZ = 1000.0
_KNEE_MEL = _KNEE_HZ / _LINEAR_HZ
_LOG_STEP = log(6.4) / 27.0


def _slaney_mel(hz: float) -> float:
    return hz / _LINEAR_HZ if hz < _KNEE_HZ else _KNEE_MEL + log(hz / _KNEE_HZ) / _LOG_STEP


def _slaney_hz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _KNEE_HZ * np.exp(_LOG_STEP * (mels - _KNEE_MEL))
    return np.where(mels < _KNEE_MEL, mels * _LINEAR_HZ, above)


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def kaldi_filters(rate_hz: int, n_fft: int, n_mels: int) -> Tensor:
    """Kaldi's triangles, linear in mel, computed in float32 as Kaldi does: `[F, M]`."""
    low, high = (1127.0 * log(1.0 + hz / 700.0) for hz in (FBANK_MIN_HZ, FBANK_MAX_HZ))
    spacing = (high - low) / (n_mels + 1)
    band = torch.arange(n_mels)[:, None]  # [M, 1]
    left, centre, right = (low + (band + edge) * spacing for edge in (0.0, 1.0, 2.0))
    bins_hz = rate_hz / n_fft * torch.arange(n_fft // 2)  # without the Nyquist bin
    mels = 1127.0 * (1.0 + bins_hz / 700.0).log()
    rising, falling = (mels - left) / (centre - left), (right - mels) / (right - centre)
    bank = torch.minimum(rising, falling).clamp(min=0.0)  # [M, F - 1]
    return F.pad(bank, (0, 1)).T.contiguous()
