"""Detecting foreign images with the demo's runs: AUROC of the detector's features and of what LoRA offers.

    fvae-lora demo --out runs/demo
    python benchmarks/detection.py runs/demo

Each detector is fitted on the training digits and calibrated on the validation digits (which chose the epoch as well);
the test digits are compared with corrupted copies of them and with noise. Means over the demo's seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.covariance import OAS
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fvae_lora import ForeignInputDetector
from fvae_lora.detector import FEATURES
from fvae_lora_experiments.models.pretrained import load_adapter
from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.run import runner
from fvae_lora_experiments.tasks import load_task

BATCH = 64


def foreign(digits: Tensor) -> dict[str, Tensor]:
    """Sets of images unlike the digits, made from them, each (n, channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    low, high = digits.min(), digits.max()
    noise = torch.randn(digits.shape, generator=generator) * (high - low)
    order = torch.randperm(digits[0, 0].numel(), generator=generator)
    return {
        "noise 0.1": (digits + 0.1 * noise).clamp(low, high),
        "noise 0.2": (digits + 0.2 * noise).clamp(low, high),
        "noise 0.4": (digits + 0.4 * noise).clamp(low, high),
        "turned by 90 degrees": digits.rot90(1, (2, 3)),
        "inverted": low + high - digits,
        "pixels shuffled": digits.flatten(2)[..., order].reshape(digits.shape),
        "noise alone": low + (high - low) * torch.rand(digits.shape, generator=generator),
    }


def batches(pixels: Tensor) -> Iterator[dict[str, Tensor]]:
    """The model's inputs, batch by batch."""
    for part in pixels.split(BATCH):
        yield {"pixel_values": part}


@torch.no_grad()
def states(model: nn.Module, pixels: Tensor) -> dict[str, np.ndarray]:
    """What any adapted model offers: confidence, last hidden state, mean of each adapted layer's input."""
    found = defaultdict(list)
    layers = [module for module in model.modules() if hasattr(module, "base_layer") and hasattr(module, "merge")]
    model.eval()
    for batch in batches(pixels):
        read: list[Tensor] = []
        handles = [
            layer.register_forward_pre_hook(lambda _, args, r=read: r.append(args[0].mean(1))) for layer in layers
        ]
        output = model(**batch, output_hidden_states=True)
        for handle in handles:
            handle.remove()
        found["confidence"].append(output.logits.softmax(-1).amax(-1))
        found["last state"].append(output.hidden_states[-1][:, 0])
        found["layers' inputs"].append(torch.cat(read, -1))
    return {name: torch.cat(parts).double().numpy() for name, parts in found.items()}


def of_any_model(model: nn.Module, sets: dict[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Scores of the sets by detectors that need no autoencoder."""
    found = {name: states(model, pixels) for name, pixels in sets.items()}
    scores = {"1 - confidence": {name: 1 - of_set["confidence"] for name, of_set in found.items()}}
    for features in ("last state", "layers' inputs"):
        scaler = StandardScaler().fit(found["train"][features])
        distance = OAS().fit(scaler.transform(found["train"][features])).mahalanobis
        scores[f"Mahalanobis, {features}"] = {
            name: distance(scaler.transform(of_set[features])) for name, of_set in found.items()
        }
    return scores


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the demo's folder")
    silence_libraries()
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    alarms: dict[str, list[float]] = defaultdict(list)
    for folder in sorted(parser.parse_args().runs.glob("*lora-seed*")):
        recipe, record = runner.read_finished_run(folder)
        base, processor = runner.open_base(recipe, record)
        rows = load_task(recipe).datasets(runner.open_data(recipe, record), base, processor)
        sets = {name: torch.stack([row["pixel_values"] for row in rows[name]]) for name in rows}
        kinds = foreign(sets["test"])
        model = load_adapter(base, folder / "adapter")
        scores = {f"{recipe.method}: {key}": value for key, value in of_any_model(model, sets | kinds).items()}
        for features in FEATURES if recipe.method == "fvae-lora" else ():
            detector = ForeignInputDetector.fit(model, batches(sets["train"]), batches(sets["validation"]), features)
            found = {
                name: [detector.score(**batch) for batch in batches(pixels)] for name, pixels in (sets | kinds).items()
            }
            key = f"ForeignInputDetector, {features}"
            scores[key] = {name: torch.cat([s.score for s in of_set]).numpy() for name, of_set in found.items()}
            p = torch.cat([s.p_value for s in found["test"]])
            alarms[key].append((p <= 0.05).double().mean().item())
        for key, of_sets in scores.items():
            for kind in kinds:
                truth = [0] * len(of_sets["test"]) + [1] * len(of_sets[kind])
                table[key][kind].append(roc_auc_score(truth, np.concatenate([of_sets["test"], of_sets[kind]])))
    columns = list(next(iter(table.values())))
    print(f"| AUROC | {' | '.join(columns)} | mean | test digits at p <= 0.05 |")
    print("|---|" + "---:|" * (len(columns) + 2))
    for key, of_kinds in table.items():
        means = [statistics.mean(of_kinds[kind]) for kind in columns]
        false = f"{100 * statistics.mean(alarms[key]):.1f} %" if key in alarms else ""
        print(f"| {key} | {' | '.join(f'{mean:.3f}' for mean in [*means, statistics.mean(means)])} | {false} |")


if __name__ == "__main__":
    main()
