"""A sweep: the runs of a plan, a process for each; what is done is not done again."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fvae_lora.experiments.plan import Planned

POLL_S = 0.5
LETTING_GO_S = 5.0
"""How long a process of an earlier, killed sweep may take to let go of its run's folder."""


def sweep(runs: Sequence[Planned], jobs: int, console: Console) -> list[str]:
    """Does the runs that are not done yet, `jobs` at a time.

    Args:
        runs: the plan.
        jobs: processes at once; the machine's cores, and its GPUs if it has any, are shared out among them.
        console: where progress is shown.

    Returns:
        A line for each run that failed.

    Raises:
        UserError: a folder of the plan is in use, holds another run or no whole record. Nothing was started.
    """
    waiting = [run for run in runs if not run.is_done()]
    for run in waiting:
        with run.folder.locked(LETTING_GO_S):
            pass
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", highlight=False)
    epochs = {run.name: run.epochs_done() for run in waiting}
    failures = []
    running: dict[int, _Job] = {}
    with _progress(console) as progress:
        total = sum(run.recipe.train.epochs for run in waiting)
        bar = progress.add_task("epochs", total=total, completed=sum(epochs.values()))
        try:
            while waiting or running:
                for slot in range(jobs):
                    if waiting and slot not in running:
                        running[slot] = _Job(waiting.pop(0), slot, jobs)
                time.sleep(POLL_S)
                for slot, job in list(running.items()):
                    epochs[job.run.name] = job.run.epochs_done()
                    if (code := job.process.poll()) is None:
                        continue
                    del running[slot]
                    epochs[job.run.name] = job.run.recipe.train.epochs
                    line = f"{job.run.name}: " + ("done" if code == 0 else job.last_words())
                    failures += [line] if code else []
                    progress.console.print(line, highlight=False, markup=False)
                progress.update(bar, completed=sum(epochs.values()))
        finally:
            for job in running.values():
                job.end()
    return failures


class _Job:
    """A run in a process of its own (`worker`)."""

    def __init__(self, run: Planned, slot: int, jobs: int):
        self.run = run
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "fvae_lora.experiments.worker", str(run.folder.path)],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=os.environ | _share(slot, jobs),
        )
        assert self.process.stdin is not None
        self.process.stdin.write(run.recipe.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    def last_words(self) -> str:
        """Why the run failed: what its record says, or else the last line that the process wrote."""
        record = self.run.folder.read()
        if record is not None and record["state"] == "failed":
            return f"failed: {record['reason']}"
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with code {self.process.returncode}"

    def end(self) -> None:
        """Lets the process go: it notices that its standard input is closed."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def _share(slot: int, jobs: int) -> dict[str, str]:
    """A job's share of the machine, in environment variables."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        share["CUDA_VISIBLE_DEVICES"] = (visible.split(",") if visible else list(map(str, range(gpus))))[slot % gpus]
    return share


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,
    )
