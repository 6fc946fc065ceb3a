"""Writes the README's tables from the records in docs/results, so that no number there is typed by hand.

fvae-lora demo --out runs/demo                    # its run.json and metrics.jsonl are kept in docs/results/demo
python benchmarks/cost.py --repeats 9 --json > docs/results/cost.json
python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from fvae_lora.experiments.record import write_atomically
from fvae_lora.experiments.report import summary_rows, write_markdown

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "docs" / "results"


def demo_table() -> str:
    """The table that the demo prints."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "demo.md")
        write_markdown(summary_rows(RESULTS / "demo"), file)
        return file.read_text(encoding="utf-8").strip()


def cost_table() -> str:
    """Ratios to LoRA of a training step and of an eval forward."""
    results = json.loads((RESULTS / "cost.json").read_text(encoding="utf-8"))["results"]
    methods = list(dict.fromkeys(name.partition(": ")[2] for name in results))
    lines = ["| | training step | eval forward |", "|---|---:|---:|"]
    for method in methods:
        cells = []
        for kind in ("training step", "eval forward"):
            row = results[f"{kind}: {method}"]
            low, high = row["ratio_range"]
            cells.append(
                f"{row['median_s']:.2f} s"
                if method == "lora"
                else f"{row['ratio_to_lora']:.2f} ({low:.2f} to {high:.2f})"
            )
        lines.append(f"| {method} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


BLOCKS = {"demo": demo_table, "cost": cost_table}


def filled(readme: str) -> str:
    """The README with its blocks written anew."""
    for name, table in BLOCKS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        readme = re.sub(
            f"{begin}.*?{end}", lambda _, t=table, b=begin, e=end: f"{b}\n{t()}\n{e}", readme, flags=re.DOTALL
        )
    return readme


if __name__ == "__main__":
    path = PROJECT / "README.md"
    write_atomically(path, filled(path.read_text(encoding="utf-8")))
