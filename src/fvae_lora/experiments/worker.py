"""A process of a sweep: one run, its recipe read from standard input, its life tied to the sweep's.

When the sweep dies, however it dies, its end of the pipe closes and this process goes too: no run outlives its sweep
and blocks the next one.
"""

import os
import sys
import threading
from pathlib import Path

from fvae_lora.experiments.cli import exit_code, hush
from fvae_lora.experiments.recipe import Recipe


def main() -> None:
    """Runs the recipe on the first line of standard input in the folder that the command line names."""
    recipe = Recipe.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_die_with_the_sweep, daemon=True).start()
    sys.exit(exit_code(lambda: _run(recipe, Path(sys.argv[1]))))


def _run(recipe: Recipe, folder: Path) -> None:
    from fvae_lora.experiments.runner import run

    hush()
    run(recipe, folder, quiet=True)


def _die_with_the_sweep() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
