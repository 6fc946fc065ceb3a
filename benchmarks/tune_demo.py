"""Chooses the demo's learning rates: one grid, one budget and one selection seed for every method, on validation.

    python benchmarks/tune_demo.py [FOLDER]

writes the scores beside the demo's recipe and prints the rates that the recipe must carry under `per_method`. The
selection seed is none of those that the demo reports; the test split is scored, as in any run, but not looked at.
"""

import json
import sys
from pathlib import Path

from rich.console import Console

from fvae_lora.experiments.demo import METHODS, RECIPE
from fvae_lora.experiments.recipe import recipe_file
from fvae_lora.experiments.record import write_atomically
from fvae_lora.experiments.sweep import plan, sweep

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SELECTION_SEED = 7
KEY = "train.learning_rate"


def main(folder: Path) -> None:
    """Runs what is missing in `folder`, writes the scores, prints the choice."""
    runs = plan(RECIPE, folder, METHODS, [SELECTION_SEED], variations={KEY: GRID})
    if failures := sweep(runs, 2, Console()):
        sys.exit("\n".join(failures))
    scores: dict[str, dict[str, dict[str, float]]] = {method: {} for method in METHODS}
    for run in runs:
        found = (run.folder.read() or {})["metrics"]["validation"]
        rate = f"{run.recipe.train.learning_rate:g}"
        scores[run.recipe.method][rate] = {"accuracy": found["accuracy"], "loss": found["loss"]}
    chosen = {method: best_rate(by_rate) for method, by_rate in scores.items()}
    table = {"key": KEY, "selection_seed": SELECTION_SEED, "scores": scores, "chosen": chosen}
    write_atomically(recipe_file(RECIPE).with_name("demo_rates.json"), json.dumps(table, indent=1) + "\n")
    print(json.dumps(chosen, indent=1))


def best_rate(scores: dict[str, dict[str, float]]) -> float:
    """The rate with the highest validation accuracy; among equals the one with the lowest validation loss."""
    return float(max(scores, key=lambda rate: (scores[rate]["accuracy"], -scores[rate]["loss"])))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tune-demo"))
