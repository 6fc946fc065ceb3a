"""Runs as processes of this machine, which is shared out among them."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import IO

import torch

from fvae_lora.experiments.launchers import Ended, News, ending, refuse_folders_in_use
from fvae_lora.experiments.plan import Planned
from fvae_lora.experiments.surroundings import cores

POLL_S = 0.5
OUTPUT_BYTES = 2**16


class LocalLauncher:
    """Does runs in processes whose life is tied to this one's.

    Args:
        jobs: processes at once; the machine's cores, and its GPUs if it has any, are shared out among them.
    """

    parting = ""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def launch(self, runs: Sequence[Planned]) -> Generator[News, None, None]:
        """See `Launcher`."""
        refuse_folders_in_use(runs)
        waiting = list(runs)
        processes: dict[int, _Process] = {}
        try:
            while waiting or processes:
                for slot in range(self.jobs):
                    if waiting and slot not in processes:
                        processes[slot] = _Process(waiting.pop(0), _share(slot, self.jobs))
                time.sleep(POLL_S)
                ended = {slot: end for slot, process in processes.items() if (end := process.ended())}
                for slot in ended:
                    del processes[slot]
                yield News([process.run for process in processes.values()], list(ended.values()))
        finally:
            for process in processes.values():
                process.end()


class _Process:
    """A run in a process of its own (`worker`)."""

    def __init__(self, run: Planned, share: dict[str, str]):
        self.run = run
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "fvae_lora.experiments.worker", str(run.folder.path)],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=os.environ | share,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(run.recipe.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def ended(self) -> Ended | None:
        """How it ended, or None if it has not."""
        code = self.process.poll()
        if code is None:
            return None
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
        return Ended(self.run, code, ending(code), self.output.read().decode(errors="replace"))

    def end(self) -> None:
        """Lets the process go: it notices that its standard input is closed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _share(slot: int, jobs: int) -> dict[str, str]:
    """A process's share of the machine, in environment variables."""
    share = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        share["CUDA_VISIBLE_DEVICES"] = (visible.split(",") if visible else list(map(str, range(gpus))))[slot % gpus]
    return share
