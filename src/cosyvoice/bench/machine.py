"""The machine a figure was measured on, and the memory this process takes of it.

In: nothing but the system. Out: plain data. Knows no network.
"""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from cosyvoice.version import __version__

STATUS = Path("/proc/self/status")
CPU_INFO = Path("/proc/cpuinfo")
PEAK_RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what Linux wants written there
KIB_PER_MIB = 1024


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads, versions and device."""
    found = {
        "cpu": _cpu_model(),
        "n_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cosyvoice": __version__,
        "device": str(device),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_mib": gpu.total_memory >> 20}
    return found


def memory_mib(device: torch.device) -> dict[str, float]:
    """What this process holds now and held at most since `forget_peak`; nan where unknown."""
    held = {"present": _status_mib("VmRSS"), "peak": _status_mib("VmHWM")}
    if device.type == "cuda":
        held |= {
            "gpu_present": torch.cuda.memory_allocated(device) / 2**20,
            "gpu_peak": torch.cuda.max_memory_allocated(device) / 2**20,
        }
    return {key: round(value, 1) for key, value in held.items()}


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if os.access(PEAK_RESET, os.W_OK):
        PEAK_RESET.write_text(RESET_PEAK)


def _cpu_model() -> str:
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _status_mib(field: str) -> float:
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / KIB_PER_MIB
    return float("nan")
