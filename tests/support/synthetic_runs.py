"""Invented records, to look at reports and to test them. Their numbers mean nothing."""

import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fvae_lora_experiments.report import print_table
from fvae_lora_experiments.report.rows import Row

# method: learning rate, trainable and inference parameters, seconds, accuracy
METHODS = {
    "fvae-lora": (5e-3, 1_204_224, 344_064, 61.0, 0.965),
    "lora": (1e-3, 294_912, 294_912, 48.0, 0.955),
    "linear-probe": (1e-2, 1_930, 1_930, 22.0, 0.88),
    "full": (1e-4, 2_800_000, 2_800_000, 95.0, 0.97),
}


def record(method: str = "lora", seed: int = 1, dataset: str = "digits", **changes: Any) -> dict[str, Any]:
    """A complete run.json; `changes` replace top-level entries, and None removes one."""
    rate, trainable, inference, seconds, _ = METHODS.get(method, METHODS["lora"])
    rng = random.Random(f"{method} {seed} {dataset}")
    accuracy = _reach(method, dataset) + rng.gauss(0, 0.006)
    complete = {
        "schema": 1,
        "state": "complete",
        "reason": None,
        "task": "image",
        "method": method,
        "model": {"name": "tiny-vit", "fingerprint": "0123456789abcdef"},
        "dataset": {
            "name": dataset,
            "fingerprint": "fedcba9876543210",
            "protocol": "clean",
            "splits": {"train": 1078, "validation": 359, "test": 360},
            "classes": [str(i) for i in range(10)],
            "validation_from": "train",
        },
        "seed": seed,
        "recipe": {
            "method": method,
            "seed": seed,
            "train": {"learning_rate": rate, "epochs": 20, "batch_size": 32},
            "adapter": {"r": 16},
        },
        "parameters": {"total": 3_000_000, "trainable": trainable, "inference": inference},
        "versions": {"fvae-lora": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "git_commit": "a" * 40,
        "hardware": {"device": "cpu", "threads": 2},
        "time": {"wall_s": seconds + rng.random(), "train_s": seconds - 3},
        "memory": {"peak_mb": 700 + trainable / 1e4 + rng.random()},
        "flops": {"train_step": 1e10, "eval_batch": 3e9, "train_total": 2e11 * seconds},
        "metrics": {
            "test": {"accuracy": accuracy, "loss": 0.1},
            "validation": {"accuracy": accuracy + 0.004, "loss": 0.09, "best_epoch": 17},
        },
    } | changes
    return {key: value for key, value in complete.items() if value is not None}


def metrics(
    method: str, seed: int = 1, dataset: str = "digits", epochs: int = 20, layers: int = 6
) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: 7 training lines an epoch, validation, and the ELBO's terms for fvae-lora."""
    rng = random.Random(f"{method} {seed} {dataset}")
    lines = []
    for step in range(1, 7 * epochs + 1):
        epoch = step / 7
        line = {"event": "train", "step": step, "epoch": epoch, "learning_rate": 1e-3, "grad_norm": 1.0}
        line["loss"] = 2.3 * math.exp(-epoch / (2 + len(method) / 5)) + rng.uniform(0, 0.06)
        if method == "fvae-lora":
            line["loss"] += 1
            line["elbo"] = {
                f"vit.layers.{layer}.attention.{part}": {
                    "reconstruction": -350 + 40 * layer * (1 - math.exp(-epoch / 4)) + rng.gauss(0, 3),
                    "kl_z1": 0.2 * layer * (1 - math.exp(-epoch / 2)) + abs(rng.gauss(0, 0.05)),
                    "gamma": -18 + 17 * (1 - math.exp(-epoch / (1 + layer))) + rng.gauss(0, 0.4),
                    "w2": 30 * (1 - math.exp(-epoch / 5)) + layer + rng.gauss(0, 0.5),
                }
                for layer in range(layers)
                for part in ("q_proj", "k_proj")
            }
        lines.append(line)
        if step % 7 == 0:
            accuracy = _reach(method, dataset) * (1 - 0.85 * math.exp(-epoch / 2.5)) + rng.gauss(0, 0.006)
            lines.append({"event": "validation", "step": step, "epoch": epoch, "loss": 0.1, "accuracy": accuracy})
    return lines


def _reach(method: str, dataset: str) -> float:
    return METHODS.get(method, METHODS["lora"])[-1] - random.Random(dataset).uniform(0, 0.2)


def write_run(folder: Path, run_json: dict[str, Any] | str, lines: Sequence[dict[str, Any]] = ()) -> Path:
    """A run's folder with that record; a string is written as it stands."""
    folder.mkdir(parents=True)
    text = run_json if isinstance(run_json, str) else json.dumps(run_json)
    (folder / "run.json").write_text(text, encoding="utf-8")
    curve = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(curve, encoding="utf-8")
    return folder


def write_demo(folder: Path) -> Path:
    """Four methods and three seeds, of which one run failed, one is running, and one cannot be read."""
    for method in METHODS:
        for seed in (1, 2, 42):
            run = record(method, seed)
            if (method, seed) == ("full", 42):
                run = record(method, seed, state="failed", reason="the loss is NaN at step 310", metrics=None)
            if (method, seed) == ("linear-probe", 42):
                run = record(method, seed, state="running", metrics=None, flops=None)
            write_run(folder / f"{method}-{seed}", run, metrics(method, seed))
    write_run(folder / "cut-off", json.dumps(record())[:300])
    return folder


def write_many(folder: Path) -> Path:
    """200 runs: five data sets, four methods, two ranks of fvae-lora, eight seeds."""
    for dataset in ("cars", "digits", "flowers", "pets", "textures"):
        for method, rank in (("fvae-lora", 8), ("fvae-lora", 16), ("lora", 16), ("linear-probe", 16), ("full", 16)):
            for seed in range(8):
                run = record(method, seed, dataset)
                run["recipe"]["adapter"]["r"] = rank
                lines = metrics(method, seed, dataset, epochs=8, layers=12)
                write_run(folder / f"{dataset}-{method}-{rank}-{seed}", run, lines)
    return folder


def printed(rows: Sequence[Row], width: int = 80) -> str:
    """The table of these rows as a terminal of that width shows it."""
    written = io.StringIO()
    print_table(rows, Console(width=width, file=written, color_system=None))
    return written.getvalue()
