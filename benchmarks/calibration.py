"""Calibration of finished runs on their whole test splits: one record for each run and way to predict.

    python benchmarks/calibration.py runs/uncertainty --out studies/uncertainty/calibration.jsonl.gz

What a run predicts is kept in its folder, so that the command may be repeated while further runs are trained.

Ways to predict: the mean of z1, as in eval mode; the same with a temperature that is fitted on the validation split
(which chose the epoch as well); 1, 4 and 16 draws of z1; as many passes with the adapter's own dropout at the recipe's
rate; ensembles of three runs, without and with a temperature: each with the next two seeds, of five in a circle, so
that they are not independent.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, log_loss

from fvae_lora import predict_with_uncertainty
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.process import silence_libraries
from readings import Run, adapter_dropout, finished_runs, logits_of, open_run, rounded
from records import write_lines

BINS = 15
PASSES = 16
COUNTS = (1, 4, 16)
MEMBERS = 3
KEPT = "calibration.npz"


def scores(p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and calibration of probabilities, (rows, classes), of labels, (rows,)."""
    p = p / p.sum(-1, keepdims=True)  # in single precision they are almost one
    confidence, right = p.max(-1), p.argmax(-1) == labels
    return {
        "accuracy": accuracy_score(labels, p.argmax(-1)),
        "nll": log_loss(labels, p, labels=range(p.shape[-1])),
        "brier": float(np.square(p - np.eye(p.shape[-1])[labels]).sum(-1).mean()),
        "ece": calibration_error(confidence, right),
        "adaptive_ece": calibration_error(confidence, right, equal_mass=True),
    }


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = BINS, equal_mass: bool = False) -> float:
    """The mean over rows of |accuracy - mean confidence| of their bin.

    Args:
        confidence: Of the predicted class, (rows,).
        right: Whether it is the row's class, (rows,).
        bins: Their number.
        equal_mass: Whether bins hold equally many rows, or are equally wide.
    """
    if equal_mass:
        parts = np.array_split(confidence.argsort(kind="stable"), bins)
    else:
        of_row = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
        parts = [np.flatnonzero(of_row == number) for number in range(bins)]
    return sum(abs((right[part] - confidence[part]).sum()) for part in parts) / len(confidence)


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which logits, (rows, classes), are likeliest to give labels, (rows,)."""

    def nll(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), -1)
        return -float(scaled[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(nll, bounds=(-4, 4), method="bounded").x))


def predictions(run: Run) -> dict[str, np.ndarray]:
    """Logits and labels of validation and test; of the test also each pass, (passes, rows, classes)."""
    items = run.items(run.splits)
    rows = run.ready({name: items[name] for name in ("validation", "test")})
    found = {}
    for name in rows:
        found[f"{name}_logits"], found[f"{name}_labels"] = logits_of(run, rows[name])
    accuracy = accuracy_score(found["test_labels"], found["test_logits"].argmax(-1))
    if abs(accuracy - run.record.metrics.test["accuracy"]) > 0.01:
        raise SystemExit(f"{run.path}: accuracy {accuracy:.4f}, the record says {run.record.metrics.test}")
    if METHODS[run.recipe.method].draws_z1:
        found["draws"] = np.stack([_draw(run, rows["test"], seed) for seed in range(PASSES)])
    if not run.has_decoder:
        with adapter_dropout(run.model):
            found["dropout"] = np.stack([_pass(run, rows["test"], seed) for seed in range(PASSES)])
    return found


def _draw(run: Run, items: Any, seed: int) -> np.ndarray:
    found = []
    for number, (batch, _) in enumerate(run.batches(items)):
        drawn = predict_with_uncertainty(run.model, draws=1, seed=1000 * number + seed, **batch)
        found.append(drawn.mean.double().numpy())
    return np.concatenate(found)


def _pass(run: Run, items: Any, seed: int) -> np.ndarray:
    torch.manual_seed(seed)
    return softmax(logits_of(run, items)[0], -1)


def kept_predictions(path: Path) -> dict[str, Any]:
    """A run's predictions, made once, and what it is."""
    file = path / KEPT
    if not file.exists():
        run = open_run(path)
        part = file.with_suffix(".part.npz")
        about = {"data": run.record.dataset.name, "method": run.method, "seed": run.recipe.seed}
        np.savez_compressed(part, **predictions(run), **about)
        part.replace(file)
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def ways(found: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, dict[str, float]]]:
    """Each way to predict, the probabilities, (rows, classes), and what else its record says."""
    logits = found["test_logits"]
    yield "mean", softmax(logits, -1), {}
    fitted = temperature(found["validation_logits"], found["validation_labels"])
    yield "mean, temperature", softmax(logits / fitted, -1), {"temperature": rounded(fitted)}
    for kind, unit in (("draws", "draw"), ("dropout", "dropout pass")):
        for count in COUNTS if kind in found else ():
            plural = "" if count == 1 else "es" if unit.endswith("ss") else "s"
            yield f"{count} {unit}{plural}", found[kind][:count].mean(0), {}


def ensemble(members: Sequence[dict[str, Any]]) -> Iterator[tuple[str, np.ndarray, dict[str, float]]]:
    """As `ways`, of several runs together."""
    held_out, p = (
        np.mean([softmax(member[f"{split}_logits"], -1) for member in members], axis=0)
        for split in ("validation", "test")
    )
    yield f"ensemble of {MEMBERS}", p, {}
    fitted = temperature(np.log(held_out), members[0]["validation_labels"])
    yield f"ensemble of {MEMBERS}, temperature", softmax(np.log(p) / fitted, -1), {"temperature": rounded(fitted)}


def records(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records of runs with their predictions, ensembles among them."""
    alike: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    for found in runs:
        alike[str(found["data"]), str(found["method"])][int(found["seed"])] = found
    for (data, method), by_seed in sorted(alike.items()):
        seeds = sorted(by_seed)
        for place, seed in enumerate(seeds):
            about = {"data": data, "method": method, "seed": seed}
            found, labels = by_seed[seed], by_seed[seed]["test_labels"]
            for way, p, more in ways(found):
                yield about | {"prediction": way} | _rounded(scores(p, labels)) | more
            if len(seeds) > MEMBERS:
                members = [by_seed[seeds[(place + step) % len(seeds)]] for step in range(MEMBERS)]
                for way, p, more in ensemble(members):
                    yield about | {"prediction": way} | _rounded(scores(p, labels)) | more


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: rounded(value) for name, value in found.items()}


def main() -> None:
    """Write the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder with finished runs at any depth")
    parser.add_argument("--out", type=Path, help="the file of records; without it predictions are only made and kept")
    arguments = parser.parse_args()
    silence_libraries()
    found = [kept_predictions(path) for path in finished_runs(arguments.runs)]
    if arguments.out is not None:
        write_lines(arguments.out, records(found))


if __name__ == "__main__":
    main()
