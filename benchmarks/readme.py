"""Writes the tables of README.md and docs/results/README.md from the records in docs/results: none is typed by hand.

fvae-lora demo --out runs/demo                    # its run.json and metrics.jsonl are kept in docs/results/demo
python benchmarks/cost.py --repeats 9 --json > docs/results/cost.json
python benchmarks/readme.py
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path

from fvae_lora.experiments.record import write_atomically
from fvae_lora.experiments.report import summary_rows, write_markdown

PROJECT = Path(__file__).parents[1]
RESULTS = PROJECT / "docs" / "results"


def report_of(name: str) -> str:
    """The tables that `fvae-lora report docs/results/NAME` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.md")
        write_markdown(summary_rows(RESULTS / name), file)
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


PAGES = {
    PROJECT / "README.md": {"demo": lambda: report_of("demo"), "cost": cost_table},
    RESULTS / "README.md": {name: partial(report_of, name) for name in ("clip", "clip-fashion-mnist")},
}
"""The pages, and what makes each of their blocks."""


def filled(page: Path) -> str:
    """The page with its blocks written anew."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{page}: no block {begin} ... {end}")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        write_atomically(page, filled(page))
