"""The prompt convention: every text the LLM hears has a head that ends in `<|endofprompt|>`.

Comes in: transcripts, instructions and segments as clients sent them. Goes out: the same with a
head. Called where prompts are assembled and nowhere else; under the reference's rules it calls
`require_head` in place of the two `complete_` functions. Knows no ids and no modes.
"""

from cosyvoice.errors import BadRequest

from .special_tokens import SEPARATOR

ROLE = "You are a helpful assistant."
PREFIX = ROLE + SEPARATOR


def complete_transcript(text: str) -> str:
    """Put the prefix before a transcript, or before a text to speak, that has no head."""
    return text if SEPARATOR in text else PREFIX + text


def complete_instruction(text: str) -> str:
    """Make a head of a bare instruction such as `Please speak slowly.`"""
    if SEPARATOR in text:
        return text
    instruction = text.strip().removeprefix(ROLE).lstrip()
    return f"{ROLE} {instruction}{SEPARATOR}" if instruction else PREFIX


def split_head(text: str) -> tuple[str, str]:
    """Part a text after its first separator; the head is empty where there is none."""
    head, separator, rest = text.partition(SEPARATOR)
    return (head + separator, rest) if separator else ("", text)


def require_head(text: str, field: str) -> str:
    """Pass a text on as it is; BadRequest where its separator is missing."""
    if SEPARATOR not in text:
        raise BadRequest(f"{field} has no {SEPARATOR}; begin it with {PREFIX!r}")
    return text
