"""Where scripts written for the reference import from: `cosyvoice.cli.cosyvoice`."""

from cosyvoice.api import AutoModel, CosyVoice3

__all__ = ["AutoModel", "CosyVoice3"]
