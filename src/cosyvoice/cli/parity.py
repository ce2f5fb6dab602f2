"""`cosyvoice parity`: are our numbers the reference's numbers?"""

from pathlib import Path
from typing import Annotated

import typer

from cosyvoice.errors import BadRequest

from .options import say

parity = typer.Typer(invoke_without_command=True)


@parity.callback()
def compare(
    context: typer.Context,
    model_dir: Annotated[Path | None, typer.Option(help="Model the set was recorded from.")] = None,
    goldens: Annotated[Path | None, typer.Option(help="Directory of the golden set.")] = None,
    stage: Annotated[
        list[int] | None, typer.Option(help="Only this stage; may be given again.")
    ] = None,
) -> None:
    """Compare every stage with recorded tensors, or record them.

    A row per tensor, one JSON object last; exit code 1 where a tolerance is exceeded.

    Example: cosyvoice parity --model-dir tests/golden/model --goldens tests/golden
    """
    if context.invoked_subcommand:
        return
    from cosyvoice.parity import run

    if model_dir is None or goldens is None:
        raise BadRequest("parity needs --model-dir and --goldens; see cosyvoice parity --help")
    report = run(model_dir, goldens, stages=stage)
    report.print()
    if not report.passed:
        raise typer.Exit(1)


@parity.command()
def dump(
    model_dir: Annotated[Path, typer.Option(help="Model to record from.")],
    prompt_wav: Annotated[Path, typer.Option(help="Recording of the voice.")],
    text: Annotated[str, typer.Option(help="What to say.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write.")],
    prompt_text: Annotated[str, typer.Option(help="What is said in the recording.")] = "",
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Record the same tensors from our own run, for others to compare with.

    Example: cosyvoice parity dump --model-dir M --prompt-wav me.wav --text "Hello." -o set
    """
    from cosyvoice.parity import dump as write

    write(model_dir, prompt_wav, text, prompt_text=prompt_text, out=output, seed=seed)
    say(f"wrote {output}")
