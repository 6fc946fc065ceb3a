"""Cost beside LoRA in a decoder language model, over the number of adapted layers and over width: time and memory.

    python benchmarks/curve.py --out benchmarks/curve.json     # some ten minutes on two quiet cores

Llama-shaped, 8 layers of width 1024, one text of 512 tokens, every linear layer adapted (seven a layer), r = 16, fp32;
FVAE-LoRA, LoRA, DoRA and PVeRA.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from measure import OURS, Job, Steps, device_arguments, in_turns, machine, peak_bytes, ratios

COMPARED = ("lora", OURS, "dora", "pvera")


def points(layers: int, width: int, length: int) -> list[tuple[str, Job]]:
    """The curve's points: of all layers fewer and fewer are adapted, and all are in narrower models."""
    whole = Job(model="llama", layers=layers, width=width, length=length, batch=1)
    fewer = [replace(whole, adapted=n) for n in (layers // 4, layers // 2, layers) if n]
    narrower = [replace(whole, width=width // n) for n in (4, 2) if width // n >= 64]
    return [(f"{7 * (job.adapted or layers)} modules, width {job.width}", job) for job in (*fewer, *narrower)]


def measured(name: str, job: Job, repeats: int) -> list[dict[str, Any]]:
    """The rows of one point."""
    memory = {method: peak_bytes(replace(job, method=method)) for method in COMPARED}
    built = {method: Steps(replace(job, method=method)) for method in COMPARED}
    times = ratios(in_turns({method: steps.train for method, steps in built.items()}, repeats))
    return [
        {
            "point": name,
            "method": method,
            **times[method],
            "bytes": memory[method],
            "memory_ratio": round(memory[method] / memory["lora"], 3),
        }
        for method in COMPARED
    ]


def main() -> None:
    """Measure what the record lacks, write it point by point, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device_arguments(parser)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, help="the record, as JSON; points that are there already are kept")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = {name: value for name, value in vars(chosen).items() if name != "out"}
    record = {"settings": settings, "machine": machine(chosen.device), "rows": []}
    if chosen.out and chosen.out.exists():
        earlier = json.loads(chosen.out.read_text(encoding="utf-8"))
        if {**earlier, "rows": []} != record:
            raise SystemExit(f"{chosen.out}: measured with other settings or on another machine; name another file")
        record = earlier
    print(f"{'':26}{'':30}{'step':>9}{'ratio':>8}{'quartiles':>16}{'memory':>10}{'ratio':>8}")
    for name, point in points(chosen.layers, chosen.width, chosen.length):
        rows = [row for row in record["rows"] if row["point"] == name]
        if not rows:
            rows = measured(name, replace(point, device=chosen.device), chosen.repeats)
            record["rows"] += rows
            if chosen.out:
                chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for row in rows:
            spread, size = f"{row['low']:.3f} to {row['high']:.3f}", f"{row['bytes'] / 2**20:.0f} MB"
            print(
                f"{name:26}{row['method']:30}{row['seconds']:7.3f} s{row['ratio']:8.3f}{spread:>16}{size:>10}"
                f"{row['memory_ratio']:8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
