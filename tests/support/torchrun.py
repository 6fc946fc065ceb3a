"""Two processes, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python file, or with ``--no-python`` a program, with its arguments in two processes at once."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
