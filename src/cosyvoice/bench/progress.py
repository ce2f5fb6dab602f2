"""Progress, for whoever waits at the terminal. In: a line. Out: the same, on stderr."""

import sys


def tell(line: str) -> None:
    """Say what is being measured."""
    sys.stderr.write(f"bench: {line}\n")
    sys.stderr.flush()
