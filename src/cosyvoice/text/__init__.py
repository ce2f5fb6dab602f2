"""Text: what a client wrote -> what is spoken -> segments -> ids.

Comes in: strings. Goes out: strings and lists of ids. `TextFrontEnd` normalises and cuts,
`Tokenizer` makes ids, `PieceBuffer` joins text that arrives in pieces, and `prompt_text` keeps
the convention of heads. Knows no audio, no voice and no network.
"""

from .normalize import TextFrontEnd, is_speakable
from .pieces import PieceBuffer
from .prompt_text import (
    PREFIX,
    complete_instruction,
    complete_transcript,
    require_head,
    split_head,
)
from .special_tokens import SEPARATOR
from .spoken import Spoken, Wetext
from .tokenizer import Tokenizer

__all__ = [
    "PREFIX",
    "SEPARATOR",
    "PieceBuffer",
    "Spoken",
    "TextFrontEnd",
    "Tokenizer",
    "Wetext",
    "complete_instruction",
    "complete_transcript",
    "is_speakable",
    "require_head",
    "split_head",
]
