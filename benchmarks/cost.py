"""What FVAE-LoRA costs beside stock LoRA: a training step and an eval forward of ViT-B/16, as ratios.

    python benchmarks/cost.py                 # batch 8, fp32, two threads, modules q and v, r = 16, decoder 3 x 128

Random weights: the arithmetic does not depend on them. The methods take turns, so that a drift of the machine's speed
meets all of them; the table shows the median of each and the median of the ratios to LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fvae_lora import FVAELoraConfig

TARGETS = ["q_proj", "v_proj"]


def methods(r: int) -> dict[str, PeftConfig]:
    """The configurations that are compared, by name."""
    shared = {"r": r, "target_modules": TARGETS, "modules_to_save": ["classifier"]}
    return {
        "lora": LoraConfig(lora_alpha=r, **shared),
        "fvae-lora, decoder 3 x 128": FVAELoraConfig(decoder_hidden_dims=[128] * 3, **shared),
        "fvae-lora, decoder 1 x 128": FVAELoraConfig(**shared),
        "fvae-lora, elbo_stop_gradient": FVAELoraConfig(elbo_stop_gradient=True, **shared),
        "fvae-lora, no ELBO": FVAELoraConfig(elbo_weight=0, **shared),
    }


def steps(config: PeftConfig, batch: int, layers: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step (forward, backward, AdamW) and an eval forward of an adapted ViT-B/16."""
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_labels=10, num_hidden_layers=layers))
    model: nn.Module = get_peft_model(base, config)
    pixels, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 10, (batch,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()

    @torch.inference_mode()
    def evaluate() -> None:
        model.eval()
        model(pixel_values=pixels)

    return train, evaluate


def interleaved(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every action; the actions take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()  # warm-up
    for _ in range(repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=12, help="of the ViT; 12 is ViT-B/16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the medians and ratios as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    built = {name: steps(config, arguments.batch, arguments.layers) for name, config in methods(arguments.rank).items()}
    results = {}
    for index, kind in enumerate(("training step", "eval forward")):
        seconds = interleaved({name: both[index] for name, both in built.items()}, arguments.repeats)
        for name, values in seconds.items():
            ratios = [value / reference for value, reference in zip(values, seconds["lora"], strict=True)]
            results[f"{kind}: {name}"] = {
                "median_s": round(statistics.median(values), 4),
                "ratio_to_lora": round(statistics.median(ratios), 3),
                "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            }
    if arguments.json:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        print(json.dumps({"settings": vars(arguments), "versions": versions, "results": results}, indent=1))
        return
    print(f"{'':46}{'median':>9}{'ratio':>8}{'min':>8}{'max':>8}")
    for name, row in results.items():
        low, high = row["ratio_range"]
        print(f"{name:46}{row['median_s']:8.3f}s{row['ratio_to_lora']:8.3f}{low:8.3f}{high:8.3f}")


if __name__ == "__main__":
    main()
