"""The cost of FVAE-LoRA relative to stock LoRA: time and memory of training, inference, size of files.

    make bench                                     # ViT-B/16, batch 8, fp32, two threads, q and v, r = 16
    python benchmarks/cost.py --out benchmarks/cost.json

Prints a table with targets, floors and quartiles, and the rows that miss their target; `--out` writes the record. The
floor is the ratio of the floating-point operations in a step's matrix products. `measure.peak_bytes` says how peak
memory is measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fvae_lora import export_for_inference
from measure import METHODS, OURS, Job, Steps, device_arguments, flops, in_turns, machine, peak_bytes, ratios

COMPARED = [name for name in METHODS if name == "lora" or name.startswith("fvae-lora")]
STEP, MEMORY, EVAL = "training step", "peak memory of a step", "eval forward"
FILE, OPTIMIZER, CHECKPOINT = "exported file", "optimizer's state", "adapter in a checkpoint"
TARGETS = {
    (STEP, OURS): 1.07,
    (STEP, "fvae-lora, decoder 3 x 128"): 1.08,
    (STEP, "fvae-lora, elbo_token_fraction 0.25"): 1.03,
    (MEMORY, OURS): 1.05,
    (EVAL, OURS): 1.00,
    (FILE, OURS): 1.02,
}
NOISE = 0.005  # a target counts as met up to this much above it: targets have two decimals


def timed(job: Job, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows for the training step and the eval forward."""
    built = {name: Steps(replace(job, method=name)) for name in COMPARED}
    floors = {name: flops(replace(job, method=name, batch=1)) for name in COMPARED}
    for what in (STEP, EVAL):
        actions = {name: steps.train if what == STEP else steps.evaluate for name, steps in built.items()}
        for name, found in ratios(in_turns(actions, repeats)).items():
            floor = {"floor": round(floors[name] / floors["lora"], 3)} if what == STEP else {}
            yield {"what": what, "method": name, **found, **floor}


def remembered(job: Job) -> Iterator[dict[str, Any]]:
    """Rows for peak memory."""
    found = {name: peak_bytes(replace(job, method=name)) for name in COMPARED}
    for name, size in found.items():
        yield {"what": MEMORY, "method": name, "bytes": size, "ratio": round(size / found["lora"], 3)}


def written(job: Job) -> Iterator[dict[str, Any]]:
    """Rows for the files of training and inference, without the trained head, which is the same for all methods."""
    sizes: dict[tuple[str, str], int] = {}
    for name in COMPARED:
        steps = Steps(replace(job, method=name, batch=1))
        steps.train()
        parameters = {p: "modules_to_save" in n for n, p in steps.model.named_parameters() if p.requires_grad}
        state = [t for p, head in parameters.items() if not head for t in steps.optimizer.state[p].values()]
        sizes[OPTIMIZER, name] = sum(t.nbytes for t in state)
        head = sum(p.nbytes for p, is_head in parameters.items() if is_head)
        with tempfile.TemporaryDirectory() as folder:
            steps.model.save_pretrained(f"{folder}/adapter")
            sizes[CHECKPOINT, name] = _weights(f"{folder}/adapter") - head
            if name == "lora":
                sizes[FILE, name] = sizes[CHECKPOINT, name]
            else:
                export_for_inference(steps.model, f"{folder}/exported")
                sizes[FILE, name] = _weights(f"{folder}/exported") - head
    for (what, name), size in sorted(sizes.items(), key=lambda item: COMPARED.index(item[0][1])):
        yield {"what": what, "method": name, "bytes": size, "ratio": round(size / sizes[what, "lora"], 3)}


def _weights(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in order, with their targets and whether they are met."""
    for row in rows:
        if (target := TARGETS.get((row["what"], row["method"]))) is not None:
            row |= {"target": target, "met": row["ratio"] < target + NOISE}
    return sorted(rows, key=lambda row: [STEP, MEMORY, EVAL, FILE, OPTIMIZER, CHECKPOINT].index(row["what"]))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows, then those that miss their targets."""
    print(f"{'':24}{'':38}{'absolute':>10}{'ratio':>8}{'quartiles':>16}{'floor':>8}{'target':>8}")
    for row in rows:
        absolute = f"{row['seconds']:.3f} s" if "seconds" in row else f"{row['bytes'] / 2**20:.1f} MB"
        spread = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        floor, target = (f"{row[key]:.2f}" if key in row else "" for key in ("floor", "target"))
        missed = "" if row.get("met", True) else "  misses"
        print(
            f"{row['what']:24}{row['method']:38}{absolute:>10}{row['ratio']:8.3f}{spread:>16}{floor:>8}{target:>8}{missed}"
        )
    missing = [f"{row['what']}, {row['method']}" for row in rows if not row.get("met", True)]
    print("\nmisses: " + ("; ".join(missing) or "none"))


def main() -> None:
    """Measure, print a table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device_arguments(parser)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="layers of the ViT (12: ViT-B/16)")
    parser.add_argument("--out", type=Path, help="where to write the record, as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    job = Job(layers=chosen.layers, batch=chosen.batch, device=chosen.device)
    # Memory first, while this process holds little.
    rows = judged([*remembered(job), *timed(job, chosen.repeats), *written(job)])
    print_table(rows)
    if chosen.out:
        settings = {name: value for name, value in vars(chosen).items() if name != "out"}
        record = {"settings": settings, "machine": machine(chosen.device), "rows": rows}
        chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
