"""Options that several commands share, so that they are spelt and explained alike."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosyvoice.errors import BadRequest

if TYPE_CHECKING:
    from cosyvoice.api import CosyVoice3

ModelDir = Annotated[
    Path | None,
    typer.Option(
        help="Model directory in the published layout. Else COSYVOICE_MODEL_DIR, else "
        "pretrained_models/Fun-CosyVoice3-0.5B, else the bundled voice model.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Weights: auto, fp32, bf16 or fp16.")]
Compat = Annotated[
    str, typer.Option(help="ours, or reference: the reference's behaviour to the letter.")
]
UseRL = Annotated[
    bool, typer.Option("--rl/--no-rl", help="Prefer llm.rl.pt where the model has one.")
]
VoicesDir = Annotated[
    Path | None,
    typer.Option("--voices", help="Directory of stored voices; else the user's data directory."),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="File to write: .wav .flac .mp3 .opus .ogg or .pcm; - for stdout."
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Same seed, same audio. Drawn and reported where it is left out.")
]
Speed = Annotated[float, typer.Option(help="0.25 to 4.")]


def say(line: str) -> None:
    """A remark for the person at the terminal; stdout is for results."""
    typer.echo(line, err=True)


def load(
    model_dir: Path | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    compat: str = "ours",
    use_rl: bool = True,
    voices_dir: Path | None = None,
) -> "CosyVoice3":
    """The model a command works with; says which one it took."""
    from cosyvoice.api import CosyVoice3

    if compat not in ("ours", "reference"):
        raise BadRequest(f"--compat is ours or reference, not {compat!r}")
    model = CosyVoice3(
        model_dir,
        device=device,
        dtype=dtype,
        compat="reference" if compat == "reference" else "ours",
        use_rl=use_rl,
        voices_dir=voices_dir,
    )
    say(model.model_note)
    return model
