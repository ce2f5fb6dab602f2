"""Simulation: which scheduling rule serves listeners best? Compared without a model or a machine.

Comes in: what steps cost on a machine, as data. Goes out: a `Report` of all rules under all loads.
Scheduler, utterances, hops and scripts are the engine's own; the clock and the runner are not.
Knows no torch: nothing is computed, steps only take time.
"""

from .costs import Costs, read_costs
from .report import Report, print_report, run_rules

__all__ = ["Costs", "Report", "print_report", "read_costs", "run_rules"]
