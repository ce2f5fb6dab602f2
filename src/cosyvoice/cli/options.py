"""Options that several commands share, so that they are spelt and explained alike."""

from dataclasses import dataclass
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
Dtype = Annotated[
    str, typer.Option(help="Linear layers: auto, fp32, bf16, int8 (x86), or on a GPU tf32, fp16.")
]
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
Streaming = Annotated[
    bool, typer.Option("--stream", help="Make the audio in chunks, as a listener would get it.")
]
Speed = Annotated[float, typer.Option(help="0.25 to 4.")]


FlowSteps = Annotated[
    int | None, typer.Option(min=1, max=100, help="Euler steps of the flow: fewer are worse.")
]
CfgRate = Annotated[
    float | None, typer.Option("--cfg", min=0, max=5, help="Strength of the flow's guidance.")
]


def say(line: str) -> None:
    """A remark for the person at the terminal; stdout is for results."""
    typer.echo(line, err=True)


@dataclass(frozen=True)
class ModelChoice:
    """Which model a command works with, and how."""

    model_dir: Path | None
    device: str = "auto"
    dtype: str = "auto"
    compat: str = "ours"
    use_rl: bool = True
    voices_dir: Path | None = None
    flow_steps: int | None = None
    cfg_rate: float | None = None

    def load(self) -> "CosyVoice3":
        """The model; says on stderr which one it is."""
        from cosyvoice.api import CosyVoice3
        from cosyvoice.config import EngineConfig

        if self.compat not in ("ours", "reference"):
            raise BadRequest(f"--compat is ours or reference, not {self.compat!r}")
        model = CosyVoice3(
            self.model_dir,
            device=self.device,
            dtype=self.dtype,
            compat="reference" if self.compat == "reference" else "ours",
            use_rl=self.use_rl,
            voices_dir=self.voices_dir,
            engine=EngineConfig(flow_steps=self.flow_steps, cfg_rate=self.cfg_rate),
        )
        say(model.model_note)
        return model
