"""Benchmarks: how fast is the engine, and how near to what this machine can do?

In: a model directory and what to measure. Out: a table, and last one line of JSON. The ceilings are
measured in the same run, before anything else. Seeds are fixed; weights may be random, because the
length of the speech is forced. Needs what the engine needs and nothing more (ruling 26), so that
`python -m cosyvoice.bench engine` runs on a bare machine. It knows no door and no server.
"""

from .run import PARTS, Options, run

__all__ = ["PARTS", "Options", "run"]
