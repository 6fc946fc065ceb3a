"""Writes the tables of README.md and of the studies' pages from the records.

make bench
python benchmarks/readme.py
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fvae_lora_experiments.check import inspect_data
from fvae_lora_experiments.data.summary import print_summary
from fvae_lora_experiments.demo import RECIPE
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import flatten, load_recipe
from fvae_lora_experiments.report import cells, summary_rows, write_markdown
from fvae_lora_experiments.report.aggregate import aggregate
from fvae_lora_experiments.run.archive import read_runs
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.schema import AblationSettings, FvaeSettings
from uncertainty_tables import TABLES

PROJECT = Path(__file__).parents[1]
STUDIES = PROJECT / "studies"


def runs_of(study: str) -> Path:
    """The runs of a study."""
    return STUDIES / study / "runs.jsonl.gz"


def report_of(study: str) -> str:
    """The tables that `fvae-lora report studies/NAME` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "report.md")
        write_markdown(summary_rows(runs_of(study)), file)
        return file.read_text(encoding="utf-8").strip()


def demo_data() -> str:
    """The summary of its data that the demo prints before training."""
    console = Console(file=io.StringIO(), width=80)
    print_summary(inspect_data(load_recipe(RECIPE)), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


def cost_table() -> str:
    """Ratios to LoRA of a training step, of its peak memory and of an eval forward, with targets."""
    rows = json.loads((PROJECT / "benchmarks" / "cost.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["what"], row["method"]): row for row in rows}
    columns = {"training step": "seconds", "peak memory of a step": "bytes", "eval forward": "seconds"}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_cost_cell(found[what, method], unit, method == "lora") for what, unit in columns.items()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost_cell(row: dict[str, Any], unit: str, absolute: bool) -> str:
    if absolute:
        return f"{row['seconds']:.2f} s" if unit == "seconds" else f"{row['bytes'] / 2**20:.0f} MB"
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
    target = f", target {row['target']:.2f}" if "target" in row else ""
    return f"{row['ratio']:.2f}{spread}{target}"


LINEAR = {"fvae.encoder_hidden_dims": []}
LEFT = {"ablation.noise": False, "ablation.start": "lora", **LINEAR}

VARIANTS = {
    "LoRA": ("lora", {}),
    "DoRA": ("dora", {}),
    "linear probe": ("linear-probe", {}),
    "FVAE-LoRA": ("fvae-lora", {}),
    "... its gradient stopped at x": ("fvae-lora", {"fvae.elbo_stop_gradient": True}),
    "... its weight 1e-5 instead of 1e-3": ("fvae-lora", {"fvae.elbo_weight": 1e-5}),
    "... without the ELBO": ("fvae-no-elbo", {}),
    "... without ELBO and noise": ("fvae-no-elbo", {"ablation.noise": False}),
    "... without ELBO and ReLU": ("fvae-no-elbo", LINEAR),
    "... without ELBO, started like LoRA": ("fvae-no-elbo", {"ablation.start": "lora"}),
    "... without all four": ("fvae-no-elbo", LEFT),
    "the reference's profile": ("fvae-lora-reference", {}),
    "VAE2LAT": ("vae2lat", {}),
}
"""The rows of the overview: a method, and the keys in which its recipe differs from the method's defaults."""

OVERVIEW = {
    "clip": "",
    "clip-fashion-mnist": "",
    "minilm": "",
    "minilm-long": ", 256 steps",
    "minilm-spam": "",
    "clip-groups": "",
    "minilm-groups": "",
    "smollm2": "",
    "whisper": ", errors ↓",
}
"""The studies in the overview, and what the headings of their columns add to the data set's name."""

VARIED = {key for _, changes in VARIANTS.values() for key in changes}


def overview() -> str:
    """Test scores of every variant on every data set."""
    found: dict[str, dict[str, str]] = {}
    for name, beside in OVERVIEW.items():
        for group in aggregate(read_runs(runs_of(name))):
            row = group.row
            if row.state == "complete" and not row.superseded and (variant := variant_of(row.method, group.recipe)):
                found.setdefault(row.hub_name + beside, {})[variant] = cells.score(row)
    lines = [f"| | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    lines += [f"| {v} | {' | '.join(scores.get(v, '') for scores in found.values())} |" for v in VARIANTS]
    return "\n".join(lines)


def variant_of(method: str, recipe: dict[str, Any]) -> str | None:
    """The variant that a flat recipe is, if any: its method with exactly the changes of the variant."""
    usual = flatten({"fvae": FvaeSettings().model_dump(), "ablation": AblationSettings().model_dump()})
    for variant, (its_method, changes) in VARIANTS.items():
        expected = usual | METHODS[method].defaults | changes
        if method == its_method and all(recipe.get(key) == expected[key] for key in VARIED):
            return variant
    return None


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    PROJECT / "README.md": {"demo data": demo_data, "demo": partial(report_of, "demo"), "cost": cost_table},
    STUDIES / "README.md": {"overview": overview},
    **{
        runs.with_name("README.md"): {"runs": partial(report_of, runs.parent.name)}
        for runs in STUDIES.glob("*/runs.jsonl.gz")
    },
    STUDIES / "uncertainty" / "README.md": dict(TABLES),
}
"""The pages, and the function that makes each of their blocks."""


def filled(page: Path) -> str:
    """The page with its blocks replaced."""
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
