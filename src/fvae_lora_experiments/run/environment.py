"""What a run ran on: packages, commit, hardware; nothing that identifies the machine or its user."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fvae_lora_experiments.run import distributed

PACKAGES = ("fvae-lora", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy", "pillow")
MISSING = "not installed"
"""The version of a package that is not there."""


def versions(others: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that a result depends on, and of `others`."""
    found = {"python": platform.python_version()}
    for package in (name for name in (*PACKAGES, *others) if name not in found):
        try:
            found[package] = importlib.metadata.version(package)
        except (importlib.metadata.PackageNotFoundError, ValueError):  # not a name
            found[package] = MISSING
    return found


def git_commit() -> str | None:
    """The commit of this package's checkout (with `-dirty` if changed); None if it is installed."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)  # noqa: S603, S607
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def hardware() -> dict[str, Any]:
    """The training device, the number of processes (each with one device), and the machine."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "processes": distributed.process_count(),
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "machine": platform.machine(),
    }


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_mb() -> float:
    """The peak memory of this process in MB: of its GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include what the parent process used before the fork
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
