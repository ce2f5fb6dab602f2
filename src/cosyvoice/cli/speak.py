"""`cosyvoice synthesize` and `cosyvoice convert`: a text or a recording in, a sound file out.

The file appears whole or not at all. It knows no tensor.
"""

import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from cosyvoice.errors import BadRequest

from .options import (
    CfgRate,
    Compat,
    Device,
    Dtype,
    FlowSteps,
    ModelChoice,
    ModelDir,
    Output,
    Seed,
    Speed,
    Streaming,
    UseRL,
    VoicesDir,
    say,
)

if TYPE_CHECKING:
    from cosyvoice.engine.stream import Audio, Stream
    from cosyvoice.frontend import Mode, Order
    from cosyvoice.playback import Player

MAX_TEXT_BYTES = 16 << 20
SAMPLE_VOICE = "the bundled sample voice"
MODE_HELP = "zero_shot, cross_lingual, instruct2 or sft; else it follows from the inputs."
MAX_TOKENS_HELP = "Most speech tokens per sentence; 25 are a second."


def synthesize(
    text: Annotated[str | None, typer.Argument(help="What to say; - reads it from stdin.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="Read the text from a file.")] = None,
    voice: Annotated[str, typer.Option(help="Name of a stored voice.")] = "",
    prompt_wav: Annotated[Path | None, typer.Option(help="Recording of the voice.")] = None,
    prompt_text: Annotated[str, typer.Option(help="What is said in the recording.")] = "",
    instruct: Annotated[str, typer.Option(help="How to say it: 'Speak slowly.'")] = "",
    mode: Annotated[str, typer.Option(help=MODE_HELP)] = "",
    stream: Streaming = False,
    play: Annotated[bool, typer.Option("--play", help="Play it while it is made.")] = False,
    speed: Speed = 1.0,
    seed: Seed = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help=MAX_TOKENS_HELP)] = None,
    model_dir: ModelDir = None,
    voices_dir: VoicesDir = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compat: Compat = "ours",
    use_rl: UseRL = True,
    flow_steps: FlowSteps = None,
    cfg: CfgRate = None,
    output: Output = Path("out.wav"),
) -> None:
    """Speak a text.

    Example: cosyvoice synthesize "Good morning!" --prompt-wav me.wav --prompt-text "What I say in
    it." -o hello.wav
    """
    from cosyvoice.frontend import Order

    _check_output(output)
    order = Order(
        text=_text(text, text_file),
        seed=secrets.randbits(32) if seed is None else seed,
        voice=voice,
        recording=prompt_wav,
        transcript=prompt_text,
        instruction=instruct,
        mode=_mode(mode),
        streaming=stream or play,
        speed=speed,
        max_tokens=max_tokens,
    )
    choice = ModelChoice(
        model_dir, device, dtype, compat, use_rl, voices_dir, flow_steps=flow_steps, cfg_rate=cfg
    )
    with _player(wanted=play) as player:
        model = choice.load()
        started_s = time.monotonic()
        audio = model.speak(_with_voice(order))
        say(f"seed: {order.seed}")
        _write(audio, output, started_s, player)
    model.close()


def convert(
    source: Annotated[Path, typer.Option(help="Recording of the words, up to 30 s.")],
    prompt_wav: Annotated[Path, typer.Option(help="Recording of the voice, up to 30 s.")],
    stream: Streaming = False,
    speed: Speed = 1.0,
    model_dir: ModelDir = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    compat: Compat = "ours",
    output: Output = Path("out.wav"),
) -> None:
    """Say what one recording says in the voice of another.

    Example: cosyvoice convert --source words.wav --prompt-wav voice.wav -o out.wav
    """
    _check_output(output)
    model = ModelChoice(model_dir, device, dtype, compat).load()
    started_s = time.monotonic()
    _write(model.convert(source, prompt_wav, streaming=stream, speed=speed), output, started_s)
    model.close()


def _check_output(output: Path) -> None:
    """Refuse a file that could not be written before the work is done, not after."""
    from cosyvoice.pcm import format_of

    if str(output) == "-":
        return
    format_of(output)
    if not output.absolute().parent.is_dir():
        raise BadRequest(f"there is no directory {output.parent}: make it, or choose another -o")
    if output.is_dir():
        raise BadRequest(f"{output} is a directory: give -o a file name, such as {output}/out.wav")


def _text(text: str | None, text_file: Path | None) -> str:
    if (text is None) == (text_file is None):
        raise BadRequest('give the text once: as an argument, as "-" for stdin, or by --text-file')
    if text is not None and text != "-":
        return text
    try:
        data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1) if text_file is None else _read(text_file)
        if len(data) > MAX_TEXT_BYTES:
            raise BadRequest(f"the text is larger than {MAX_TEXT_BYTES >> 20} MB: cut it in parts")
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the text is not UTF-8 ({error.reason}): save it as UTF-8") from error


def _read(text_file: Path) -> bytes:
    try:
        with text_file.open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"cannot read {text_file}: {error.strerror}") from error


def _mode(name: str) -> "Mode | None":
    from cosyvoice.frontend import Mode

    for mode in get_args(Mode):
        if mode == name:
            return mode
    if name:
        raise BadRequest(f"unknown mode {name!r}: use {', '.join(get_args(Mode))}")
    return None


def _with_voice(order: "Order") -> "Order":
    """Somebody has to speak: without a voice it is the bundled recording's."""
    from dataclasses import replace

    if order.voice or order.recording is not None:
        return order
    assets = files("cosyvoice") / "assets"
    say(f"voice: {SAMPLE_VOICE}; give --prompt-wav or --voice for another")
    transcript = "" if order.instruction else (assets / "sample.txt").read_text("utf-8").strip()
    return replace(order, recording=(assets / "sample.wav").read_bytes(), transcript=transcript)


@contextmanager
def _player(*, wanted: bool) -> "Iterator[Player | None]":
    from cosyvoice.playback import Player

    with Player() if wanted else nullcontext() as player:
        yield player


def _write(
    stream: "Stream", output: Path, started_s: float, player: "Player | None" = None
) -> None:
    """Take all audio, show how it goes, write the file and say what came of it."""
    import numpy as np

    from cosyvoice import pcm

    pieces: list[Audio] = []
    with stream:
        for audio in _progress(stream):
            pieces.append(audio)
            if player is not None:
                player.play(audio)
    took_s = time.monotonic() - started_s
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(samples):
        raise BadRequest("the model said nothing: try another seed or a longer text")
    if str(output) == "-":
        _write_stdout(pcm.wav_bytes(samples))
    else:
        pcm.save(output, samples)
        typer.echo(str(output))
    seconds = len(samples) / stream.sample_rate_hz
    assert stream.first_audio_at_s is not None
    say(
        f"{seconds:.2f} s of audio in {took_s:.2f} s (RTF {took_s / seconds:.2f}), "
        f"first audio after {stream.first_audio_at_s - started_s:.2f} s"
    )


def _write_stdout(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise  # whoever listened has left, and needs no explanation
    except OSError as error:
        raise BadRequest(
            f"cannot write to stdout: {error.strerror}; give -o a file name"
        ) from error


def _progress(stream: "Stream") -> "Iterator[Audio]":
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    is_hidden = not console.is_terminal  # a log would get an empty line of it
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as progress:
        task = progress.add_task("speaking")
        for audio in stream:
            seconds = stream.n_samples / stream.sample_rate_hz
            progress.update(task, description=f"speaking: {seconds:.1f} s of audio")
            yield audio
