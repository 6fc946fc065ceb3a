"""What does runs: processes of this machine here, a job of a cluster in `launchers.slurm`."""

import os
import sys
import threading
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NoReturn

import torch

from fvae_lora.experiments import processes
from fvae_lora.experiments.cli import exit_code, hush
from fvae_lora.experiments.recipe import Recipe


def work(folder: str, recipe: str) -> NoReturn:
    """Runs a recipe, given as JSON, in the folder, and ends the process: see `cli.exit_code`."""
    processes.end(exit_code(lambda: _run(Recipe.model_validate_json(recipe), Path(folder))))


def _run(recipe: Recipe, folder: Path) -> None:
    from fvae_lora.experiments.runner import run

    hush()
    run(recipe, folder, quiet=True)


def serve(channel: Connection) -> None:
    """Does the runs that `channel` asks for, and answers each with its exit code.

    To import everything takes longer than a small run: that is done once, and each run is a fork of this process. What
    a GPU or macOS has in a process does not survive a fork; there the first run is this process, and its end.
    """
    from fvae_lora.experiments import runner  # noqa: F401

    while True:
        try:
            folder, recipe = channel.recv()
        except (EOFError, ConnectionError):
            return
        if torch.cuda.is_available() or not sys.platform.startswith("linux"):
            _live_with(lambda: wait([channel]))
            work(folder, recipe)
        run = get_context("fork").Process(target=_forked, args=(folder, recipe))
        run.start()
        if run.sentinel not in wait([channel, run.sentinel]):
            os._exit(1)  # nothing is asked for while a run is on: the sweep is gone
        run.join()
        channel.send(run.exitcode)


def _forked(folder: str, recipe: str) -> None:
    parent = parent_process()
    assert parent is not None
    _live_with(parent.join)
    work(folder, recipe)


def _live_with(end: Callable[[], object]) -> None:
    """Ends this process when `end` returns: however a sweep dies, no run outlives it and blocks the next one."""

    def die() -> None:
        end()
        os._exit(1)

    threading.Thread(target=die, daemon=True).start()


if __name__ == "__main__":
    serve(Connection(0))
