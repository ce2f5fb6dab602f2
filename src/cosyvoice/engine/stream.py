"""A stream: audio on its way from the engine to whoever asked for it.

In: pieces of audio, an end or an error, put by the engine's thread. Out: the same, by `for` or
`async for`, in the caller's thread or event loop. Errors travel through the same queue as audio.
It knows no HTTP, no model and no scheduling.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cosyvoice.config import SAMPLE_RATE_HZ
from cosyvoice.errors import BadRequest, Cancelled

Audio = NDArray[np.float32]  # [n] samples at 24 kHz in [-1, 1]


class TextSource(Protocol):
    """Turns pieces of text, as they arrive, into text ids; what may still grow is held back."""

    def push(self, piece: str) -> list[int]:
        """Ids of all text that is final now."""
        ...

    def finish(self) -> list[int]:
        """Ids of what was held back."""
        ...


class Controls(Protocol):
    """What a stream tells its engine; each call returns at once."""

    def say(self, stream: "Stream", ids: list[int], *, last: bool) -> None:
        """More text ids for a text-in request."""
        ...

    def cancel(self, stream: "Stream") -> None:
        """The caller is gone."""
        ...


class Stream:
    """Audio of one request, sentence after sentence; closing it stops the work.

    Iterate it once. `say` and `end_text` are for requests whose text is still being written.
    """

    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, controls: Controls, *, seed: int, text: TextSource | None = None) -> None:
        self.seed = seed
        self.n_samples = 0  # put so far
        self.first_audio_at_s: float | None = None  # on time.monotonic's clock
        self.n_heard = 0  # sentences whose audio is complete
        self.is_closed = False
        self._has_ended = False  # its text
        self._controls = controls
        self._text = text
        self._items: deque[Audio | BaseException | None] = deque()
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []

    # The engine's side.

    def put(self, audio: Audio) -> None:
        """Hand over audio [n]."""
        if self.first_audio_at_s is None:
            self.first_audio_at_s = time.monotonic()
        self.n_samples += len(audio)
        self._append(audio)

    def end(self, error: BaseException | None = None) -> None:
        """No audio comes after this; `error` is raised where the audio would have come."""
        self._append(error)

    def _append(self, item: Audio | BaseException | None) -> None:
        with self._changed:
            if self.is_closed and item is not None:
                return  # nobody listens any more
            self._items.append(item)
            self._changed.notify_all()
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    # The caller's side.

    def say(self, piece: str) -> None:
        """Add text to a text-in request.

        Raises Cancelled once the stream is closed and BadRequest once its text has ended.
        """
        if self._has_ended:
            raise BadRequest("the text has ended: nothing can be said after end_text()")
        self._send(self._source().push(piece), last=False)

    def end_text(self) -> None:
        """No more text will come; calling it again does nothing. BadRequest if none came."""
        if not self._has_ended:
            self._has_ended = True
            self._send(self._source().finish(), last=True)

    def _source(self) -> TextSource:
        assert self._text is not None, "this request's text was complete when it was submitted"
        return self._text

    def _send(self, ids: list[int], *, last: bool) -> None:
        if self.is_closed:
            raise Cancelled("the stream is closed: no more text can be spoken on it")
        if ids or last:
            self._controls.say(self, ids, last=last)

    def close(self) -> None:
        """Stop. Audio not yet taken is dropped; calling it again does nothing."""
        with self._changed:
            if self.is_closed:
                return
            self.is_closed = True
            self._items.clear()
        self._append(None)
        self._controls.cancel(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Audio]:
        return self

    def __next__(self) -> Audio:
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            item = self._take()
        if item is None:
            raise StopIteration
        return item

    def __aiter__(self) -> AsyncIterator[Audio]:
        return self

    async def __anext__(self) -> Audio:
        while True:
            with self._changed:
                if self._items:
                    item = self._take()
                    break
                arrived = self._future()
            await arrived
        if item is None:
            raise StopAsyncIteration
        return item

    def _take(self) -> Audio | None:
        """The next item; an end or an error stays, for whoever asks again."""
        item = self._items[0]
        if isinstance(item, np.ndarray):
            return self._items.popleft()  # type: ignore[return-value]
        if item is not None:
            raise item
        return None

    def _future(self) -> "asyncio.Future[None]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def resolve() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed: it is gone
                loop.call_soon_threadsafe(resolve)

        self._wakers.append(wake)
        return future
