"""The command line: `cosyvoice COMMAND`.

In: arguments. Out: results on stdout or in a file, progress and remarks on stderr, an exit code:
0 done, 1 a check failed, 2 bad input, 130 interrupted. Commands import what they need when they
run, so that `--help` is quick.
"""

import os
import sys
from typing import Annotated

import typer

from cosyvoice.errors import SpeechError
from cosyvoice.version import __version__

from .bench import bench
from .init_model import init_model
from .parity import parity
from .speak import convert, synthesize
from .voices import voices

INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="cosyvoice",
    help="Speak text in the voice of a recording (Fun-CosyVoice3).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cosyvoice {__version__}")
        raise typer.Exit


@app.callback()
def cosyvoice(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Speak text in the voice of a recording (Fun-CosyVoice3)."""


app.command()(synthesize)
app.command()(convert)
app.add_typer(voices, name="voices")
app.add_typer(parity, name="parity")
app.command("init-model")(init_model)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run a command; whatever is wrong with the input is one line and exit code 2."""
    try:
        app()
    except SpeechError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        typer.echo("interrupted", err=True)
        # At once: the engine's thread may be in the middle of a long step.
        sys.stderr.flush()
        os._exit(INTERRUPTED)
