"""Writes the tables of README.md, docs/cost.md and of the studies' pages from the records.

make bench
python benchmarks/curve.py --out benchmarks/curve.json
python benchmarks/readme.py
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from factorisation import FOUND as PROBES
from factorisation import probe_table
from few_examples import FOUND as FEW
from few_examples import difference_table, grid_table, score_table
from fvae_lora_experiments.check import inspect_data
from fvae_lora_experiments.data.summary import print_summary
from fvae_lora_experiments.demo import RECIPE
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import flatten, load_recipe, load_yaml
from fvae_lora_experiments.report import cells, summary_rows, write_markdown
from fvae_lora_experiments.report.aggregate import aggregate
from fvae_lora_experiments.report.numbers import ci_half_width, duration, signed
from fvae_lora_experiments.run.archive import StoredRun, read_runs
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.schema import AblationSettings, FvaeSettings
from plateau import plateau, plateau_table
from records import read_lines
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
    """What the demo prints of its data before it trains."""
    console = Console(file=io.StringIO(), width=80)
    print_summary(inspect_data(load_recipe(RECIPE)), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(["```", *(line.rstrip() for line in lines), "```"])


def cost_table(only: Sequence[str] = ()) -> str:
    """What `make bench` measured last, or `only` some of it: LoRA's time, memory and files, and ratios to them."""
    rows = json.loads((PROJECT / "benchmarks" / "cost.json").read_text(encoding="utf-8"))["rows"]
    found = {(row["what"], row["method"]): row for row in rows}
    columns = only or list(dict.fromkeys(row["what"] for row in rows))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_cost_cell(found[what, method], method == "lora") for what in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost_cell(row: dict[str, Any], absolute: bool) -> str:
    if absolute:
        return f"{row['seconds']:.2f} s" if "seconds" in row else f"{row['bytes'] / 2**20:.3g} MB"
    spread = f" ({row['low']:.2f} to {row['high']:.2f})" if "low" in row else ""
    missed = "" if row.get("met", True) else ", missed"
    target = f", target {row['target']:.2f}{missed}" if "target" in row else ""
    return f"{row['ratio']:.2f}{spread}{target}"


def curve_table() -> str:
    """What `curve.py` measured last: ratios to LoRA of a training step and of its peak memory."""
    record = json.loads((PROJECT / "benchmarks" / "curve.json").read_text(encoding="utf-8"))
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    lines = [f"| adapted | {' | '.join(methods)} |", "|---|" + "---:|" * len(methods)]
    for point in dict.fromkeys(row["point"] for row in record["rows"]):
        rows = {row["method"]: row for row in record["rows"] if row["point"] == point}
        cells = [
            f"{row['seconds']:.2f} s, {row['bytes'] / 2**20:.0f} MB"
            if method == "lora"
            else f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}), {row['memory_ratio']:.2f}"
            for method, row in rows.items()
        ]
        lines.append(f"| {point} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
"""What the overview shows: a method, and in which keys its recipe differs from the usual."""


def search_cost(study: str) -> str:
    """What the search of a study took, for each method."""
    lines = ["| | trials | finished | pruned | epochs | time |", "|---|---:|---:|---:|---:|---:|"]
    trials: dict[str, list[StoredRun]] = {}
    for run in read_runs(runs_of(study)):
        if run.record and run.record.is_selection:
            trials.setdefault(run.record.method, []).append(run)
    for method, runs in trials.items():
        records = [run.record for run in runs if run.record]
        counts = [sum(record.state == state for record in records) for state in ("complete", "pruned")]
        epochs = sum(
            len(run.curve("validation", record.metric.name)) for run, record in zip(runs, records, strict=True)
        )
        time = duration(sum(record.time.wall_s or 0 for record in records))
        lines.append(f"| {method} | {len(runs)} | {counts[0]} | {counts[1]} | {epochs} | {time} |")
    return "\n".join(lines)


def found_against_others(study: str) -> str:
    """Test scores of the point that a search found minus those of each method's other point, over the same seeds."""
    best = load_yaml((STUDIES / study / "best.yaml").read_text(encoding="utf-8"))["per_method"]
    groups = [group for group in aggregate(read_runs(runs_of(study))) if group.row.state == "complete"]
    lines = ["| | found | recommended | difference ± 95% CI | pairs |", "|---|---:|---:|---:|---:|"]
    for method in ("fvae-lora", "lora"):
        of_method = [group for group in groups if group.row.method == method]
        (found,) = [g for g in of_method if all(g.recipe.get(key) == value for key, value in best[method].items())]
        (other,) = [group for group in of_method if group is not found]
        pairs = [
            100 * (ours.record.score - theirs.record.score)
            for seed in sorted(found.runs.keys() & other.runs.keys())
            if (ours := found.runs[seed]).record and (theirs := other.runs[seed]).record
        ]
        difference = f"{signed(f'{fmean(pairs):.2f}')} ± {ci_half_width(pairs):.2f}"
        scores = f"{cells.score(found.row)} | {cells.score(other.row)}"
        lines.append(f"| {method} | {scores} | {difference} | {len(pairs)} |")
    return "\n".join(lines)


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
"""The studies that it is made of, and what their columns say beside the data set."""

WITHOUT_PLATEAU = ("smollm2", "whisper")
"""Studies in which no rate of any method changes much, so that every low one is as good as the best."""

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
    """Which variant a flat recipe is, if any: the method with nothing changed but what the variant changes."""
    usual = flatten({"fvae": FvaeSettings().model_dump(), "ablation": AblationSettings().model_dump()})
    for variant, (its_method, changes) in VARIANTS.items():
        expected = usual | METHODS[method].defaults | changes
        if method == its_method and all(recipe.get(key) == expected[key] for key in VARIED):
            return variant
    return None


def plateaus() -> str:
    """How wide the range of good learning rates of every variant is on every data set."""
    grids: dict[str, dict[str, dict[float, float | None]]] = {variant: {} for variant in VARIANTS}
    for name, beside in OVERVIEW.items():
        for group in aggregate(read_runs(runs_of(name))) if name not in WITHOUT_PLATEAU else ():
            row = group.row
            if row.state == "selection" and (variant := variant_of(row.method, group.recipe)):
                grid = grids[variant].setdefault(row.hub_name + beside, {})
                grid[group.recipe["train.learning_rate"]] = row.validation_score
    return plateau_table({variant: {name: plateau(grid) for name, grid in of.items()} for variant, of in grids.items()})


PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    PROJECT / "README.md": {
        "demo": partial(report_of, "demo"),
        "cost": partial(cost_table, ("training step", "peak memory of a step", "eval forward")),
    },
    PROJECT / "docs" / "start.md": {"demo data": demo_data},
    PROJECT / "benchmarks" / "README.md": {"curve": curve_table},
    PROJECT / "docs" / "cost.md": {"cost": cost_table},
    STUDIES / "README.md": {"overview": overview},
    STUDIES / "plateau.md": {"plateau": plateaus},
    STUDIES / "few-examples.md": {
        name: lambda table=table: table(read_lines(FEW))  # type: ignore[misc]
        for name, table in {"scores": score_table, "differences": difference_table, "rates": grid_table}.items()
    },
    STUDIES / "factorisation.md": {
        name: lambda reduce=reduce: probe_table(read_lines(PROBES), reduce)  # type: ignore[misc]
        for name, reduce in {"mean over layers": statistics.fmean, "best layer": max}.items()
    },
    **{
        runs.with_name("README.md"): {"runs": partial(report_of, runs.parent.name)}
        for runs in STUDIES.glob("*/runs.jsonl.gz")
    },
    STUDIES / "uncertainty" / "README.md": dict(TABLES),
}
PAGES[STUDIES / "tune-demo" / "README.md"] |= {
    "budget": partial(search_cost, "tune-demo"),
    "found": partial(found_against_others, "tune-demo"),
}
"""The pages, and what makes each of their blocks."""


def filled(page: Path) -> str:
    """The page with its blocks replaced."""
    return fill_blocks(page, PAGES[page])


def fill_blocks(page: Path, blocks: Mapping[str, Callable[[], str]]) -> str:
    """The page with these blocks replaced, each by what its function makes."""
    text = page.read_text(encoding="utf-8")
    for name, table in blocks.items():
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
