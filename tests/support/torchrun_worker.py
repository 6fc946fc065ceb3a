"""One of the processes that torchrun starts for ``test_torchrun``: does the runs of a file, one after the other."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fvae_lora_experiments.run.distributed import disconnect
from fvae_lora_experiments.schema import Recipe
from processes import do_run


def main(jobs: Path) -> None:
    """Each run has a recipe, a folder and, for the second process, a place to die at."""
    for job in json.loads(jobs.read_text()):
        die = tuple(job["die"]) if job["die"] and os.environ["RANK"] == "1" else None
        do_run(Recipe.model_validate(job["recipe"]), Path(job["folder"]), die)
    disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
