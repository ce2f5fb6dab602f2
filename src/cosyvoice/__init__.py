"""Fun-CosyVoice3 text-to-speech. Public names are imported on first use."""

from .version import __version__
