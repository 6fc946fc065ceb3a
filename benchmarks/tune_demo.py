"""Chooses the demo's learning rates: one grid, one budget and the same selection seeds for every method, on validation.

    python benchmarks/tune_demo.py [FOLDER]

writes the scores, means over the selection seeds, beside the demo's recipe, and prints the rates that the recipe must
carry under `per_method`. None of the seeds is one that the demo reports; test scores play no part.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from rich.console import Console

from fvae_lora.experiments.demo import METHODS, RECIPE
from fvae_lora.experiments.plan import Planned, plan
from fvae_lora.experiments.recipe import recipe_file
from fvae_lora.experiments.run_folder import write_atomically
from fvae_lora.experiments.sweep import sweep

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SELECTION_SEEDS = (7, 8)
KEY = "train.learning_rate"

Scores = dict[str, float]


def main(folder: Path) -> None:
    """Runs what is missing in `folder`, writes the scores, prints the choice."""
    runs = plan(RECIPE, folder, METHODS, SELECTION_SEEDS, variations={KEY: GRID})
    sweep(runs, 2, Console())
    scores = {method: {f"{rate:g}": mean_scores(runs, method, rate) for rate in GRID} for method in METHODS}
    chosen = {method: best_rate(by_rate) for method, by_rate in scores.items()}
    table = {"key": KEY, "selection_seeds": SELECTION_SEEDS, "scores": scores, "chosen": chosen}
    write_atomically(recipe_file(RECIPE).with_name("demo_rates.json"), json.dumps(table, indent=1) + "\n")
    print(json.dumps(chosen, indent=1))


def mean_scores(runs: list[Planned], method: str, rate: float) -> Scores | None:
    """Validation accuracy and loss of the best epoch, means over the selection seeds; None if a run diverged."""
    of_rate = [r for r in runs if (r.recipe.method, r.recipe.train.learning_rate) == (method, rate)]
    records = [run.folder.read() or {} for run in of_rate]
    for run, record in zip(of_rate, records, strict=True):
        if record["state"] == "failed" and "the loss is" in record["reason"]:
            return None
        if record["state"] != "complete":
            sys.exit(f"{run.name}: {record['reason']}")
    found = [record["metrics"]["validation"] for record in records]
    return {key: fmean(scores[key] for scores in found) for key in ("accuracy", "loss")}


def best_rate(scores: dict[str, Scores | None]) -> float:
    """The rate with the highest validation accuracy; among equals the one with the lowest validation loss."""
    return float(max((found["accuracy"], -found["loss"], rate) for rate, found in scores.items() if found)[2])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tune-demo"))
