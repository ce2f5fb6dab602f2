"""`cosyvoice voices`: keep recordings under names."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import ModelDir, VoicesDir, say

if TYPE_CHECKING:
    from cosyvoice.voicebook import VoiceBook

voices = typer.Typer(help="Add, list, show and remove stored voices.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the voice.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: one JSON document on stdout.")]


@voices.command()
def add(
    name: Name,
    prompt_wav: Annotated[Path, typer.Option(help="Recording of the voice, up to 30 s.")],
    prompt_text: Annotated[str, typer.Option(help="What is said in the recording.")] = "",
    consent: Annotated[
        str, typer.Option(help="Who agreed to the use of this voice, and how.")
    ] = "",
    model_dir: ModelDir = None,
    voices_dir: VoicesDir = None,
) -> None:
    """Store a voice.

    Example: cosyvoice voices add ada --prompt-wav ada.wav --prompt-text "What Ada says in it."
    """
    card = _book(model_dir, voices_dir).add(
        name, prompt_wav, transcript=prompt_text, consent=consent
    )
    say(f"stored: use it with --voice {card.name!r}")


@voices.command("list")
def list_voices(
    model_dir: ModelDir = None, voices_dir: VoicesDir = None, as_json: AsJson = False
) -> None:
    """List all stored voices. Example: cosyvoice voices list"""
    names = _book(model_dir, voices_dir).names()
    if as_json:
        typer.echo(json.dumps(names, ensure_ascii=False))
        return
    for name in names:
        typer.echo(name)
    if not names:
        say("no voices yet: cosyvoice voices add NAME --prompt-wav FILE --prompt-text TEXT")


@voices.command()
def show(name: Name, model_dir: ModelDir = None, voices_dir: VoicesDir = None) -> None:
    """Show what is known of a voice, as JSON. Example: cosyvoice voices show ada"""
    typer.echo(_book(model_dir, voices_dir).describe(name).to_json().decode().rstrip())


@voices.command()
def remove(name: Name, model_dir: ModelDir = None, voices_dir: VoicesDir = None) -> None:
    """Remove a voice for good. Example: cosyvoice voices remove ada"""
    _book(model_dir, voices_dir).remove(name)
    say(f"removed {name!r}")


def _book(model_dir: Path | None, voices_dir: Path | None) -> "VoiceBook":
    from cosyvoice.models.checkpoint import resolve_model_dir
    from cosyvoice.voice import VoiceEncoder
    from cosyvoice.voicebook import VoiceBook, default_voice_dir

    directory, _ = resolve_model_dir(model_dir)
    return VoiceBook(voices_dir or default_voice_dir(), VoiceEncoder(directory))
