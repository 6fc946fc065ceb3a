"""Writes the tables of docs/paper.md: what each study would take, the paper's figures, and ours.

python benchmarks/paper.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fvae_lora_experiments.forecast import Cost, assumptions, costs
from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.recipe import shipped_studies
from fvae_lora_experiments.report.aggregate import aggregate
from fvae_lora_experiments.report.cells import score
from fvae_lora_experiments.report.numbers import UNKNOWN, memory, percent, quantity, title
from fvae_lora_experiments.report.paper import paper
from fvae_lora_experiments.run.archive import read_runs
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.study import load_study
from fvae_lora_experiments.sweep.plan import runs_of
from readme import fill_blocks, variant_of
from readme import runs_of as runs_file

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"


def cost_table(name: str) -> str:
    """What the study takes by method, as its `--dry-run` counts it, summed over its data sets."""
    study = load_study(name)
    runs = runs_of(study.contenders(Path("runs"), study.methods), study.seeds)
    found = costs(runs, None, published=True)
    lines = ["| method | runs | steps | trained parameters | memory | FLOPs | hours |", "|---|" + "---:|" * 6]
    for method in study.methods:
        lines.append(_line(method, [cost for cost in found if cost.recipe.method == method]))
    lines.append(_line("all", found, every=True))
    return "\n".join([*lines, "", *assumptions([run.recipe for run in runs])])


def _line(name: str, of: list[Cost], every: bool = False) -> str:
    trained = "" if every else _range([quantity(cost.trainable) for cost in sorted(of, key=lambda c: c.trainable)])
    most = memory(max(cost.bytes for cost in of) / 1e6)
    runs, steps = sum(cost.runs for cost in of), sum(cost.steps for cost in of)
    flops, hours = sum(cost.flops for cost in of), sum(cost.hours for cost in of)
    return f"| {name} | {runs} | {steps:,} | {trained} | {most} | {quantity(flops)} | {hours:.3g} |"


def _range(values: list[str]) -> str:
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def figures(name: str) -> str:
    """The paper's figures for a study."""
    (table,) = (table for table in paper()[1] if table.study == name)
    heads = [dataset.rpartition("/")[2] for dataset in table.datasets] + ["mean"] * bool(table.means)
    lines = [f"| paper | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for method in {**table.figures, **table.means}:
        cells = [percent(table.figure(method, dataset)) for dataset in table.datasets]
        cells += [percent(table.means.get(method))] * bool(table.means)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{table.setting[0].upper()}{table.setting[1:]}, %. Source: {paper()[0]}."])


NEAREST = {
    "paper/images": ["clip", "clip-fashion-mnist"],
    "paper/glue": ["minilm", "minilm-long", "minilm-spam"],
    "paper/commonsense": ["smollm2"],
    "paper/speech": ["whisper"],
    "paper/spurious": ["clip-groups", "minilm-groups"],
}
"""Which of our studies are of the same kind as one of the paper's."""

SHOWN = ("LoRA", "FVAE-LoRA", "... its gradient stopped at x")


def ours(name: str) -> str:
    """Our scores on other data of the same kind."""
    heads = ["ours, other data and models", "model", "test score", *SHOWN]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * len(SHOWN)]
    for study in NEAREST[name]:
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for group in aggregate(read_runs(runs_file(study))):
            row = group.row
            if row.state == "complete" and not row.superseded and (variant := variant_of(row.method, group.recipe)):
                where = f"[{row.hub_name}](../studies/{study}/README.md)", row.model, title(row.metric)
                found.setdefault(where, {})[variant] = score(row)
        for where, scores in found.items():
            lines.append(f"| {' | '.join([*where, *(scores.get(variant, UNKNOWN) for variant in SHOWN)])} |")
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {
    **{f"{name} cost": partial(cost_table, name) for name in shipped_studies()},
    **{f"{name} ours": partial(ours, name) for name in NEAREST},
    **{f"{table.study} figures": partial(figures, table.study) for table in paper()[1]},
}
"""The function that makes each block of the page."""


if __name__ == "__main__":
    silence_libraries()
    write_atomically(PAGE, fill_blocks(PAGE, BLOCKS))
