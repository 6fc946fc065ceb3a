"""What does one run of a sweep: a process of this machine here, a job of a cluster in `launchers.slurm`."""

import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

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


def _die_with_the_sweep() -> None:
    """When the sweep dies, however it dies, its end of the pipe closes: no run outlives it and blocks the next one."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    recipe_line = sys.stdin.readline()
    threading.Thread(target=_die_with_the_sweep, daemon=True).start()
    work(sys.argv[1], recipe_line)
