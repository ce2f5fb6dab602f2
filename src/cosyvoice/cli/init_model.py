"""`cosyvoice init-model`: a random model in the published layout, to try and test things with."""

from pathlib import Path
from typing import Annotated

import typer

from .options import say


def init_model(
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    preset: Annotated[
        str, typer.Option(help="nano: the bundled model's sizes; full: the published ones.")
    ] = "nano",
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    storage: Annotated[str, typer.Option(help="fp32, or fp16 for half the size.")] = "fp32",
    force: Annotated[
        bool, typer.Option("--force", help="Replace a model that init-model wrote.")
    ] = False,
) -> None:
    """Write a seeded random checkpoint in the published layout: it makes noise, not speech.

    Example: cosyvoice init-model --preset nano --seed 1 -o /tmp/nano
    """
    from cosyvoice.init_model import Writing, write_model

    write_model(output, preset, seed=seed, writing=Writing(storage, force=force, report=say))
    typer.echo(str(output))
