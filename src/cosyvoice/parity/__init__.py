"""Parity: is what we compute what the reference computed? A golden set is compared row by row.

Comes in: a model directory and a golden set. Goes out: a `Report`, or a new set (`dump`). It runs
the parts that synthesis runs and computes nothing of its own. Knows no server.
"""

from .dump import dump
from .report import Report
from .run import run

__all__ = ["Report", "dump", "run"]
