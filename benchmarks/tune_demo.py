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
from fvae_lora.experiments.recipe import recipe_file
from fvae_lora.experiments.record import write_atomically
from fvae_lora.experiments.sweep import Planned, plan, sweep

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SELECTION_SEEDS = (7, 8)
KEY = "train.learning_rate"

Scores = dict[str, dict[str, float]]


def main(folder: Path) -> None:
    """Runs what is missing in `folder`, writes the scores, prints the choice."""
    runs = plan(RECIPE, folder, METHODS, SELECTION_SEEDS, variations={KEY: GRID})
    if failures := sweep(runs, 2, Console()):
        sys.exit("\n".join(failures))
    scores = {method: {f"{rate:g}": mean_scores(runs, method, rate) for rate in GRID} for method in METHODS}
    chosen = {method: best_rate(by_rate) for method, by_rate in scores.items()}
    table = {"key": KEY, "selection_seeds": SELECTION_SEEDS, "scores": scores, "chosen": chosen}
    write_atomically(recipe_file(RECIPE).with_name("demo_rates.json"), json.dumps(table, indent=1) + "\n")
    print(json.dumps(chosen, indent=1))


def mean_scores(runs: list[Planned], method: str, rate: float) -> dict[str, float]:
    """Validation accuracy and loss of the best epoch, means over the selection seeds."""
    of_rate = [r for r in runs if (r.recipe.method, r.recipe.train.learning_rate) == (method, rate)]
    found = [(run.folder.read() or {})["metrics"]["validation"] for run in of_rate]
    return {key: fmean(scores[key] for scores in found) for key in ("accuracy", "loss")}


def best_rate(scores: Scores) -> float:
    """The rate with the highest validation accuracy; among equals the one with the lowest validation loss."""
    return float(max(scores, key=lambda rate: (scores[rate]["accuracy"], -scores[rate]["loss"])))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tune-demo"))
