"""Few examples and no early stopping: accuracy, NLL and ECE on test at the step chosen on validation, and at the last.

    python benchmarks/few_examples.py --model lab/minilm-l6 --dataset lab/hutto-sentiment

adds a line for each run to studies/few-examples.jsonl.gz. Learning rates are chosen once, at 20 rows a class, with
seeds of their own. A seed draws the training and validation rows, too. Started again, it does what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from calibration import calibration_error
from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.report.numbers import ci_half_width, shown, signed, spread
from records import Line, read_lines, write_lines
from short_training import STUDIES, Prepared, optimise, prepare

FOUND = STUDIES / "few-examples.jsonl.gz"
SETTINGS = {
    "data.train_rows": 600,  # from which a seed draws its rows
    "data.validation_rows": 320,
    "train.batch_size": 8,
    "train.precision": "fp32",
    "adapter.layers": [4, 5],
}
"""What differs from the recipe of studies/minilm."""
STEPS = {5: 60, 10: 90, 20: 120, 50: 200}
"""Rows a class, and steps."""
CHOOSING_AT = 20
VALIDATION = 100
"""Validation rows that a seed draws."""
EVALUATIONS = 8
"""How often they are looked at, at equal distances, the last step included."""
SELECTION = {101: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 102: (1e-3, 3e-3, 1e-2, 3e-2)}
"""The learning rates that each selection seed looks at: the second not at those where the first saw nothing learned."""
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "FVAE-LoRA, gradient stopped": ("fvae-lora", {"fvae.elbo_stop_gradient": True}),
    "without the ELBO": ("fvae-no-elbo", {}),
}
SCORES = {"accuracy": "accuracy %", "loss": "NLL", "ece": "ECE %"}
WHEN = ("chosen", "last")


# Training ----------------------------------------------------------------------------------


def one_line(places: dict[str, str], method: str, rows: int, rate: float, seed: int, purpose: str) -> Line:
    """Trains once, and returns what is kept of it; a run that only chooses a rate does not see the test split."""
    name, changes = COMPARED[method]
    settings = SETTINGS | changes | {"method": name, "train.learning_rate": rate}
    prepared = prepare("minilm", places | settings, seed)
    rng = np.random.default_rng(seed)
    train = _draw(prepared, "train", rows, rng)
    validation = _draw(prepared, "validation", VALIDATION // 2, rng)
    steps = STEPS[rows]
    curve: list[tuple[int, float, float]] = []
    best: list[torch.Tensor] = []

    def look(step: int) -> None:
        if step in {round(steps * n / EVALUATIONS) for n in range(1, EVALUATIONS + 1)}:
            scores = evaluate(prepared, validation)
            if all(scores["accuracy"] > accuracy for _, accuracy, _ in curve):
                best[:] = [parameter.detach().clone() for parameter in prepared.trained]
            curve.append((step, scores["accuracy"], scores["loss"]))

    optimise(prepared, train, steps, rng, look)
    line: Line = {"purpose": purpose, "method": method, "rows": rows, "seed": seed, "settings": settings}
    line |= {"steps": steps, "validation": curve}
    if purpose == "result":
        test = [prepared.items["test"][number] for number in range(0, len(prepared.items["test"]), 2)]
        line["training_loss"] = evaluate(prepared, train)["loss"]
        line["last"] = evaluate(prepared, test)
        with torch.no_grad():
            for parameter, chosen in zip(prepared.trained, best, strict=True):
                parameter.copy_(chosen)
        line["chosen"] = evaluate(prepared, test)
    return line


def _draw(prepared: Prepared, split: str, rows: int, rng: np.random.Generator) -> list[Any]:
    """`rows` items of each class."""
    labels = prepared.labels(split)
    chosen = [rng.choice(np.flatnonzero(labels == label), rows, replace=False) for label in np.unique(labels)]
    return [prepared.items[split][int(number)] for number in np.concatenate(chosen)]


@torch.no_grad()
def evaluate(prepared: Prepared, items: Sequence[Any]) -> dict[str, float]:
    """Accuracy, NLL and ECE in eval mode, in batches of rows of similar length."""
    prepared.model.eval()
    logits, labels = [], []
    in_order = sorted(items, key=lambda item: len(item["input_ids"]))
    for start in range(0, len(in_order), 32):
        batch = prepared.batch(in_order[start : start + 32])
        labels.append(batch.pop("labels"))
        logits.append(prepared.model(**batch).logits)
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    confidence, guess = all_logits.double().softmax(-1).max(-1)
    return {
        "accuracy": (guess == all_labels).double().mean().item(),
        "loss": nn.functional.cross_entropy(all_logits, all_labels).item(),
        "ece": calibration_error(confidence.numpy(), (guess == all_labels).numpy()),
    }


def choose_rate(lines: Iterable[Line]) -> float:
    """The lowest rate whose mean validation accuracy is within a standard error of the best.

    Each run counts with its best look. The standard error is that of an accuracy of a half on all validation rows.
    """
    scores: dict[float, list[float]] = defaultdict(list)
    for line in lines:
        scores[line["settings"]["train.learning_rate"]].append(max(accuracy for _, accuracy, _ in line["validation"]))
    means = {rate: statistics.fmean(found) for rate, found in scores.items()}
    best = max(means, key=lambda rate: means[rate])
    error = 0.5 / math.sqrt(VALIDATION * len(scores[best]))
    return min(rate for rate, mean in means.items() if mean >= means[best] - error)


# Tables ------------------------------------------------------------------------------------


def grid_table(lines: Iterable[Line]) -> str:
    """Mean validation accuracies over the selection seeds, by method and learning rate."""
    points: dict[tuple[str, float], list[float]] = defaultdict(list)
    for line in lines:
        if line["purpose"] == "selection":
            best = max(accuracy for _, accuracy, _ in line["validation"])
            points[line["method"], line["settings"]["train.learning_rate"]].append(best)
    rates = sorted({rate for _, rate in points})
    table = [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---:|" * len(rates)]
    for method in COMPARED:
        cells = [
            f"{100 * statistics.fmean(points[method, rate]):.1f}" if points[method, rate] else "" for rate in rates
        ]
        table.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(table)


def score_table(lines: Iterable[Line]) -> str:
    """Mean ± standard deviation over seeds, at the chosen and at the last step."""
    table = [f"{_heading('method')} training loss, last |", "|---:|---|" + "---:|" * 8]
    for rows, methods in _results(lines):
        for method in COMPARED:
            runs = list(methods[method].values())
            cells = [shown(score, statistics.fmean(v), spread(v)) for score, v in _columns(runs)]
            loss = statistics.fmean(run["training_loss"] for run in runs)
            table.append(f"| {rows} | {method} | {' | '.join(cells)} | {len(runs)} | {loss:.3f} |")
    return "\n".join(table)


def difference_table(lines: Iterable[Line]) -> str:
    """Mean differences over pairs of the same seed, and so of the same rows, with 95 % intervals."""
    table = [_heading("difference"), "|---:|---|" + "---:|" * 7]
    lora, ours, encoder = COMPARED
    for rows, methods in _results(lines):
        for one, other in ((ours, lora), (encoder, lora), (ours, encoder)):
            seeds = sorted(methods[one].keys() & methods[other].keys())
            both = [_columns([methods[method][seed] for seed in seeds]) for method in (one, other)]
            cells = []
            for (score, values), (_, others) in zip(*both, strict=True):
                pairs = [value - its_pair for value, its_pair in zip(values, others, strict=True)]
                cells.append(signed(shown(score, statistics.fmean(pairs), ci_half_width(pairs))))
            table.append(f"| {rows} | {one} − {other} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(table)


def _results(lines: Iterable[Line]) -> list[tuple[int, dict[str, dict[int, Line]]]]:
    """By rows a class, method and seed, where each method has two seeds."""
    found: dict[int, dict[str, dict[int, Line]]] = {}
    for line in lines:
        if line["purpose"] == "result":
            methods = found.setdefault(line["rows"], {method: {} for method in COMPARED})
            methods[line["method"]][line["seed"]] = line
    return [(rows, methods) for rows, methods in sorted(found.items()) if min(map(len, methods.values())) > 1]


def _heading(what: str) -> str:
    columns = [f"{title}, {when}" for title in SCORES.values() for when in WHEN]
    return f"| rows a class | {what} | {' | '.join(columns)} | seeds |"


def _columns(runs: Sequence[Line]) -> list[tuple[str, list[float]]]:
    return [(score, [run[when][score] for run in runs]) for score in SCORES for when in WHEN]


def _identity(line: Line) -> tuple[str, str, int, float, int]:
    return line["purpose"], line["method"], line["rows"], line["settings"]["train.learning_rate"], line["seed"]


def main() -> None:
    """Do all runs that are missing, those of the first seeds first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--rows", default="5,10,20,50", help="rows a class")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this number")
    chosen = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    places = {"model": chosen.model, "dataset": chosen.dataset}

    def do(method: str, rows: int, rate: float, seed: int, purpose: str) -> None:
        lines = read_lines(FOUND)
        if (purpose, method, rows, rate, seed) not in map(_identity, lines):
            line = one_line(places, method, rows, rate, seed, purpose)
            write_lines(FOUND, [*lines, line])
            print(line, flush=True)

    for seed, rates in SELECTION.items():
        for method, rate in itertools.product(COMPARED, rates):
            do(method, CHOOSING_AT, rate, seed, "selection")
    best = {}
    for method in COMPARED:
        own = [x for x in read_lines(FOUND) if x["purpose"] == "selection" and x["method"] == method]
        best[method] = choose_rate(own)
    for seed, rows, method in itertools.product(range(1, chosen.seeds + 1), map(int, chosen.rows.split(",")), COMPARED):
        do(method, rows, best[method], seed, "result")


if __name__ == "__main__":
    main()
