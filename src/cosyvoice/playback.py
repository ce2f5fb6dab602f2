"""Playback: audio to the loudspeaker while more of it is made.

In: float samples at 24 kHz. It needs the extra `play` and a sound library, and says so.
"""

from types import TracebackType
from typing import Any, Self

from cosyvoice.config import SAMPLE_RATE_HZ
from cosyvoice.errors import BadRequest


class Player:
    """The default output device, open while in use. `play` returns once the device has room."""

    def __init__(self) -> None:
        try:
            import sounddevice
        except ModuleNotFoundError as error:
            raise BadRequest("--play needs sounddevice: pip install 'cosyvoice[play]'") from error
        except OSError as error:  # the package is there, the system's library is not
            raise BadRequest(
                "--play needs the PortAudio library (Debian: apt install libportaudio2)"
            ) from error
        try:
            self._device: Any = sounddevice.OutputStream(
                samplerate=SAMPLE_RATE_HZ, channels=1, dtype="float32"
            )
        except sounddevice.PortAudioError as error:
            raise BadRequest(f"--play finds no sound device ({error}): leave it out") from error

    def __enter__(self) -> Self:
        self._device.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._device.stop()  # plays what is buffered
        else:
            self._device.abort()
        self._device.close()

    def play(self, samples: Any) -> None:
        """Hand over samples [n]."""
        self._device.write(samples[:, None])
