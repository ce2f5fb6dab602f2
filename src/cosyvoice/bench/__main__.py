"""`python -m cosyvoice.bench engine`: the same as `cosyvoice bench engine`, without typer.

In: arguments. Out: what `run` prints. For machines that have torch and little else.
"""

import argparse
import sys
from pathlib import Path

from cosyvoice.errors import SpeechError

from .run import Options, names, run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cosyvoice.bench")
    engine = parser.add_subparsers(dest="subject", required=True).add_parser("engine")
    engine.add_argument("--model-dir", type=Path)
    engine.add_argument("--device", default="auto")
    engine.add_argument("--dtype", default="auto")
    engine.add_argument("--only", default="")
    engine.add_argument("--prompt-seconds", "--prompt-s", dest="prompt_s", type=float)
    engine.add_argument("--tokens", dest="n_tokens", type=int)
    engine.add_argument("--concurrency", default="")
    engine.add_argument("--repeat", dest="n_repeats", type=int)
    engine.add_argument("--requests", dest="n_requests", type=int)
    engine.add_argument("--threads", dest="n_threads", type=int)
    engine.add_argument("--stream", dest="only_streaming", action="store_true")
    engine.add_argument("--long", dest="is_long", action="store_true")
    engine.add_argument("--json-only", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure; bad input is one line and exit code 2."""
    given = {k: v for k, v in vars(_arguments()).items() if v is not None and k != "subject"}
    given["only"] = names(given["only"])
    given["concurrency"] = tuple(int(n) for n in names(given["concurrency"]))
    try:
        run(Options(**given))
    except SpeechError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
