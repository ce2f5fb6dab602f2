"""The errors a user of this package can meet.

Each message is one line and says what to do. Doors map the class to a status code
(bad input 400, unknown voice 404, too busy 429, our fault 500); nothing here knows how.
"""


class SpeechError(Exception):
    """Anything this package raises on purpose."""


class BadRequest(SpeechError):
    """The input cannot be spoken: empty text, a broken recording, a number out of range."""


class VoiceNotFound(SpeechError):
    """No voice is stored under that name."""


class Overloaded(SpeechError):
    """Too many requests wait already; try again later."""


class Cancelled(SpeechError):
    """The stream was closed before its audio was complete."""


class ModelFilesError(SpeechError):
    """A file of the model directory is missing, truncated, of the wrong shape or hostile."""
