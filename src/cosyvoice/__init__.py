"""Fun-CosyVoice3 text-to-speech. Public names are imported on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import AutoModel, CosyVoice3
    from .engine.engine import Engine
    from .errors import (
        BadRequest,
        Cancelled,
        ModelFilesError,
        Overloaded,
        SpeechError,
        VoiceNotFound,
    )
    from .frontend import Order
    from .voice import Voice

_HOMES = {
    "AutoModel": "api",
    "BadRequest": "errors",
    "Cancelled": "errors",
    "CosyVoice3": "api",
    "Engine": "engine.engine",
    "ModelFilesError": "errors",
    "Order": "frontend",
    "Overloaded": "errors",
    "SpeechError": "errors",
    "Voice": "voice",
    "VoiceNotFound": "errors",
}

__all__ = [
    "AutoModel",
    "BadRequest",
    "Cancelled",
    "CosyVoice3",
    "Engine",
    "ModelFilesError",
    "Order",
    "Overloaded",
    "SpeechError",
    "Voice",
    "VoiceNotFound",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
