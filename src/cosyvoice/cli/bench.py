"""`cosyvoice bench`: how fast is it here, and how near to what the machine can do?"""

from typing import Annotated

import typer

from .options import Device, ModelDir

bench = typer.Typer(help="Measure speed, memory and accuracy.", no_args_is_help=True)


@bench.callback()
def benchmarks() -> None:
    """Measure speed, memory and accuracy; the last line on stdout is one JSON object."""


@bench.command()
def engine(
    model_dir: ModelDir = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16, int8, fp16 or tf32.")] = "auto",
    device: Device = "auto",
    only: Annotated[
        str,
        typer.Option(
            help="Parts, with commas: ceilings, llm, flow, vocoder, stream, concurrency, memory, "
            "errors, cancel."
        ),
    ] = "",
    prompt_s: Annotated[
        float,
        typer.Option("--prompt-seconds", "--prompt-s", min=1, max=30, help="Of the recording."),
    ] = 5.0,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Speech tokens of each request, 25 a second; else 4 and 16 s."),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(help="Streams at once, with commas; else 1,2,4,8.")
    ] = "",
    repeat: Annotated[int, typer.Option(min=1, help="Goes of everything that is timed.")] = 3,
    requests: Annotated[
        int, typer.Option(min=1, help="Short requests over which memory must not grow.")
    ] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch; else its own choice.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Leave offline requests out.")] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Also 10 minutes of sentences, and 60 s without a stop.")
    ] = False,
    json_only: Annotated[bool, typer.Option("--json-only", help="Print no tables.")] = False,
) -> None:
    """Time the engine and its parts beside the ceilings of this machine; random weights will do.

    Example: cosyvoice bench engine --model-dir M --dtype int8 --only ceilings,llm,flow
    """
    from cosyvoice.bench import Options, run
    from cosyvoice.bench.run import names

    run(
        Options(
            model_dir=model_dir,
            device=device,
            dtype=dtype,
            only=names(only),
            prompt_s=prompt_s,
            n_tokens=tokens,
            concurrency=_counts(names(concurrency)),
            n_repeats=repeat,
            n_requests=requests,
            n_threads=threads,
            only_streaming=stream,
            is_long=long,
            json_only=json_only,
        )
    )


def _counts(listed: tuple[str, ...]) -> tuple[int, ...]:
    if not all(name.isdigit() and int(name) > 0 for name in listed):
        raise typer.BadParameter(f"whole numbers with commas, not {','.join(listed)}")
    return tuple(int(name) for name in listed)


@bench.command()
def rules(
    seed: Annotated[int, typer.Option(help="Of arrivals and texts.")] = 0,
    requests: Annotated[int, typer.Option(min=10, help="Requests of each simulated load.")] = 240,
) -> None:
    """Compare scheduling rules in a simulation with assumed step costs; see docs/scheduling.md.

    Example: cosyvoice bench rules --requests 60
    """
    from cosyvoice.simulate import print_report, run_rules

    print_report(run_rules(n_lines=requests, seed=seed))
