"""A sweep: methods x seeds x variations in one folder, a process for each run; what is done is not done again."""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.recipe import Recipe, load_recipe, parse_override
from fvae_lora.experiments.record import RunFolder

POLL_S = 0.5
LETTING_GO_S = 5.0
"""How long a process of an earlier, killed sweep may take to let go of its run's folder."""


@dataclass(frozen=True)
class Planned:
    """A run of a sweep."""

    recipe: Recipe
    folder: RunFolder

    @property
    def name(self) -> str:
        """The run's name inside its sweep."""
        return self.folder.path.name

    def is_done(self) -> bool:
        """Whether a finished run of this recipe is there.

        Raises:
            UserError: the folder holds another recipe's run, or no whole record.
        """
        record = self.folder.read_for(self.recipe)
        return record is not None and record["state"] == "complete"

    def epochs_done(self) -> int:
        """How many epochs its learning curve, read from its end, tells of."""
        try:
            with self.folder.metrics_file.open("rb") as file:
                file.seek(max(0, self.folder.metrics_file.stat().st_size - 2**16))
                tail = file.read().decode(errors="replace")
        except OSError:
            return 0
        epochs = re.findall(r'"epoch": ([0-9.]+)', tail)
        return int(float(epochs[-1])) if epochs else 0


def plan(
    recipe: str,
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    variations: Mapping[str, Sequence[Any]] | None = None,
) -> list[Planned]:
    """Every combination of a method, a seed and a value of each varied key; `overrides` and `options` hold for all.

    Raises:
        UserError: an unknown key, a bad value, the same combination twice.
    """
    runs = {}
    keys = list(variations or {})
    for seed, values in itertools.product(seeds, itertools.product(*(variations or {}).values())):
        varied = dict(zip(keys, values, strict=True))
        for method in methods:
            asked = dict(options or {}) | varied | {"method": method, "seed": seed}
            settings = "".join(f"-{key.rpartition('.')[2]}={value}" for key, value in varied.items())
            name = re.sub(r"[^\w.=+-]+", "_", f"{method}{settings}-seed{seed}")
            if name in runs:
                raise UserError(f"compare: {name} is asked for twice")
            runs[name] = Planned(load_recipe(recipe, overrides, asked), RunFolder(out / name))
    return list(runs.values())


def parse_list(option: str, text: str) -> list[Any]:
    """`1,2,42` as a list of YAML values.

    Raises:
        UserError: nothing between two commas.
    """
    values = [yaml.safe_load(part) for part in text.split(",")]
    if None in values:
        raise UserError(f"{option}: expected values separated by commas, got {text!r}")
    return values


def parse_variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`train.learning_rate=[1e-3,1e-2]`, several times, as a dict.

    Raises:
        UserError: not a list.
    """
    variations = dict(parse_override(text) for text in texts)
    for key, values in variations.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"--vary {key}: expected a list, for example {key}=[1,2]")
    return variations


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
