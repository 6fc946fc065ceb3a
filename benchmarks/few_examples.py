"""Few examples and no early stopping: accuracy, NLL and ECE on test at the epoch chosen on validation, and at the last.

    python benchmarks/few_examples.py --model lab/minilm-l6 --dataset lab/hutto-sentiment --out runs/few-examples
    fvae-lora pack runs/few-examples studies/few-examples/runs.jsonl.gz

Learning rates are chosen once, at 20 rows a class, with seeds of their own. A seed draws the training and validation
rows, too. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fvae_lora_experiments.errors import RunError
from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.report.numbers import UNKNOWN, ci_half_width, shown, signed, spread
from fvae_lora_experiments.run.archive import StoredRun
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.sweep.select import GridPoint, best_point, mean_score
from fvae_lora_experiments.tasks import Task, load_task

RECIPE = Path(__file__).parents[1] / "studies" / "few-examples" / "recipe.yaml"
EPOCHS = {5: 40, 10: 40, 20: 30, 50: 20}
"""Rows a class, and epochs: 80 to 260 steps."""
CHOOSING_AT = 20
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SELECTION_SEEDS = (101, 102)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "FVAE-LoRA, gradient stopped": ("fvae-lora", {"fvae.elbo_stop_gradient": True}),
    "without the ELBO": ("fvae-no-elbo", {}),
}
BINS = 15
LAST = "last_"
"""Begins the names of a run's scores at the last epoch."""
SCORES = ("accuracy", "loss", "ece")
COLUMNS = {"accuracy": "accuracy %", "loss": "NLL", "ece": "ECE %"}


# Training ----------------------------------------------------------------------------------


def one_run(places: dict[str, str], out: Path, method: str, rows: int, rate: float, seed: int, purpose: str) -> Record:
    """Does a run, unless it is done already, and returns its record."""
    from fvae_lora_experiments.run.runner import run_recipe

    name, changes = METHODS[method]
    settings = {
        "method": name,
        "train.learning_rate": rate,
        "train.epochs": EPOCHS[rows],
        "data.train_rows": 2 * rows,
        "data.split_seed": seed,
        "seed": seed,
        "purpose": purpose,
    }
    folder = RunFolder(out / purpose / f"{name}-rows={rows}-rate={rate:g}-seed{seed}")
    with suppress(RunError):  # a rate at which it diverges has no score
        run_recipe(load_recipe(str(RECIPE), (), places | changes | settings), folder.path, quiet=True)
    record = folder.read()
    assert record is not None
    if purpose == "result" and LAST + "ece" not in record.metrics.test:
        score_last_epoch(folder)
    elif folder.checkpoints.exists():
        shutil.rmtree(folder.checkpoints)
    print(f"{folder.path.name}: {record.state}, {record.score}", flush=True)
    return record


def choose_rate(run: Callable[[float, int], Record]) -> float:
    """The rate with the best mean validation score over the selection seeds."""
    points = [
        GridPoint({"rate": rate}, mean_score([run(rate, seed).score for seed in SELECTION_SEEDS])) for rate in RATES
    ]
    best = best_point(points, greater_is_better=True)
    if best is None or best.edge:
        raise SystemExit(f"the best of {RATES} is on the edge: {[point.score for point in points]}")
    return RATES[best.index]


def score_last_epoch(folder: RunFolder) -> None:
    """Adds to a run's test scores the ECE of the chosen epoch, and all scores of the last one.

    The ELBO's terms are taken out of the learning curve, of which they are the greater part.
    """
    from fvae_lora_experiments.run.finished import read_finished_run
    from fvae_lora_experiments.run.runner import open_base, open_data, with_adapter
    from fvae_lora_experiments.run.state_cache import use_cached_states

    recipe, record = read_finished_run(folder.path)
    task = load_task(recipe)
    last = folder.last_checkpoint()
    assert last is not None
    found = {}
    for prefix, adapter in (("", folder.adapter), (LAST, last)):
        base, processor = open_base(recipe, record)
        rows = task.datasets(open_data(recipe, record), base, processor)["test"]
        model = with_adapter(base, adapter, is_trainable=True).eval()
        device = torch.device("cpu")
        items = use_cached_states(model, {"test": rows}, task, record, device, quiet=True)["test"]
        found |= {prefix + name: score for name, score in test_scores(model, items, task).items()}
    if abs(found["accuracy"] - record.metrics.test["accuracy"]) > 0.005:
        raise SystemExit(f"{folder.path}: {found['accuracy']} is not the run's own {record.metrics.test['accuracy']}")
    record.metrics.test = found | record.metrics.test
    folder.restore(record, [event.model_copy(update={"elbo": {}}) for event in folder.events()])
    shutil.rmtree(folder.checkpoints)


@torch.no_grad()
def test_scores(model: Any, items: Any, task: Task) -> dict[str, float]:
    """Accuracy, NLL and ECE of an adapted model on prepared rows."""
    from fvae_lora_experiments.run.state_cache import collate

    logits, labels = [], []
    size = task.recipe.train.batch_size
    for start in range(0, len(items), size):
        batch = collate(task, [items[number] for number in range(start, min(start + size, len(items)))])
        with task.autocast(torch.device("cpu")):
            logits.append(model(**batch).logits.float())
        labels.append(batch["labels"])
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    probabilities = all_logits.softmax(-1)
    return {
        "accuracy": (all_logits.argmax(-1) == all_labels).double().mean().item(),
        "loss": torch.nn.functional.cross_entropy(all_logits, all_labels).item(),
        "ece": calibration_error(probabilities.double().numpy(), all_labels.numpy()),
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error: |accuracy - confidence| in bins of equal width, weighted by their rows.

    Args:
        probabilities: (rows, classes).
        labels: (rows,).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((BINS * confidence).astype(int), BINS - 1)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(labels))


# Tables ------------------------------------------------------------------------------------

Measured = dict[int, dict[str, dict[int, dict[str, float]]]]
"""By rows a class, method and seed: the scores."""


def measured(runs: Iterable[StoredRun]) -> Measured:
    """The test scores of the results; and `training_loss`, the mean over the last epoch, where it holds no ELBO."""
    found: Measured = defaultdict(lambda: defaultdict(dict))
    names = {name: method for method, (name, _) in METHODS.items()}
    for run in runs:
        record = run.record
        if record and not record.is_selection and record.state == "complete":
            rows = record.recipe["data"]["train_rows"] // 2
            method = names[record.method]
            found[rows][method][record.seed] = dict(record.metrics.test)
            if record.method != "fvae-lora":
                found[rows][method][record.seed]["training_loss"] = run.curve("train", "loss")[-1][1]
    return found


def score_table(found: Measured) -> str:
    """Mean ± standard deviation over seeds, at the chosen and at the last epoch."""
    lines = [f"{_heading('method')} training loss, last |", "|---:|---|" + "---:|" * 8]
    for rows, methods in sorted(found.items()):
        for method in METHODS:
            runs = list(methods[method].values())
            cells = [shown(name, statistics.fmean(values), spread(values)) for name, values in _columns(runs)]
            losses = [run["training_loss"] for run in runs if "training_loss" in run]
            training = f"{statistics.fmean(losses):.3f}" if losses else UNKNOWN
            lines.append(f"| {rows} | {method} | {' | '.join(cells)} | {len(runs)} | {training} |")
    return "\n".join(lines)


def difference_table(found: Measured) -> str:
    """Mean differences over pairs of the same seed, and so of the same rows, with 95 % intervals."""
    lines = [_heading("difference"), "|---:|---|" + "---:|" * 7]
    lora, ours, encoder = METHODS
    for rows, methods in sorted(found.items()):
        for one, other in ((ours, lora), (encoder, lora), (ours, encoder)):
            seeds = sorted(methods[one].keys() & methods[other].keys())
            pairs = [
                {name: score - methods[other][seed].get(name, 0) for name, score in methods[one][seed].items()}
                for seed in seeds
            ]
            cells = [
                signed(shown(name, statistics.fmean(values), ci_half_width(values))) for name, values in _columns(pairs)
            ]
            lines.append(f"| {rows} | {one} − {other} | {' | '.join(cells)} | {len(pairs)} |")
    return "\n".join(lines)


def _heading(what: str) -> str:
    columns = [f"{title}, {when}" for title in COLUMNS.values() for when in ("chosen", "last")]
    return f"| rows a class | {what} | {' | '.join(columns)} | seeds |"


def _columns(runs: Sequence[dict[str, float]]) -> Iterable[tuple[str, list[float]]]:
    for name in SCORES:
        for prefix in ("", LAST):
            yield name, [run[prefix + name] for run in runs]


def main() -> None:
    """Do all runs that are missing, those of the first seeds first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this number")
    chosen = parser.parse_args()
    silence_libraries()
    places = {"model": chosen.model, "dataset": chosen.dataset}

    def run(method: str, rows: int, rate: float, seed: int, purpose: str = "result") -> Record:
        return one_run(places, chosen.out, method, rows, rate, seed, purpose)

    rates = {
        method: choose_rate(lambda rate, seed, m=method: run(m, CHOOSING_AT, rate, seed, "selection"))  # type: ignore[misc]
        for method in METHODS
    }
    print(rates, flush=True)
    for seed in range(1, chosen.seeds + 1):
        for rows in EPOCHS:
            for method, rate in rates.items():
                run(method, rows, rate, seed)


if __name__ == "__main__":
    main()
