"""Factorisation: is the label in z1 and the spurious attribute in z2? Trains, inspects, and keeps what was found.

    python benchmarks/factorisation.py --lab lab --out runs/factorisation --sets hutto-domains --seeds 1,2,42

adds what it found to studies/factorisation.jsonl.gz, a line for each run. The probes are those of `fvae-lora inspect`
on the test split, where label and attribute are independent. Started again, it does what is missing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.report.numbers import UNKNOWN, ci_half_width, signed
from fvae_lora_experiments.run.folder import write_atomically

STUDIES = Path(__file__).parents[1] / "studies"
FOUND = STUDIES / "factorisation.jsonl.gz"
SETS = {
    "hutto-domains": ("minilm-l6", "minilm-groups", "domain", {True: 1e-2, False: 3e-2}),
    "clipart-backgrounds": ("clip-vit-b16", "clip-groups", "background", {True: 1e-2, False: 3e-2}),
    "elpv-spurious": ("clip-vit-b16", "clip-groups", "cell", {True: 3e-2, False: 3e-2}),
}
"""Model, study whose recipe is used, attribute, and the learning rate with the gradient stopped and without, which that
study chose (on clipart-backgrounds the earlier choice, since the later one is at chance with other seeds)."""
STOPPED = "fvae.elbo_stop_gradient"
VARIANTS: dict[str, dict[str, Any]] = {
    "gradient stopped": {STOPPED: True},
    "gradient stopped, delta 0": {STOPPED: True, "fvae.factorization_weight": 0},
    "gradient stopped, prior's centre 0": {STOPPED: True, "fvae.residual_prior_mean": 0},
    "gradient stopped, KL weight 1": {STOPPED: True, "fvae.kl_weight": 1},
    "the paper's": {STOPPED: False},
    "the paper's, delta 0": {STOPPED: False, "fvae.factorization_weight": 0},
    "the paper's, prior's centre 0": {STOPPED: False, "fvae.residual_prior_mean": 0},
}
FIRST = next(iter(VARIANTS))
ASKED = {"label": "label", "group": "attribute"}
"""What was probed, by its name in an inspection and in the table."""
LATENTS = ("z1", "z2")

Line = dict[str, Any]


# Training and inspecting -------------------------------------------------------------------


def one_line(lab: Path, out: Path, dataset: str, variant: str, seed: int) -> Line:
    """Trains, inspects, and returns what is kept of it."""
    from fvae_lora_experiments.inspect.run import JSON, inspect
    from fvae_lora_experiments.inspect.source import find_source
    from fvae_lora_experiments.run.runner import run_recipe

    model, study, attribute, rates = SETS[dataset]
    changes = VARIANTS[variant]
    options = {"model": str(lab / model), "dataset": str(lab / dataset), "method": "fvae-lora", "seed": seed}
    settings = {**changes, "train.learning_rate": rates[changes[STOPPED]]}
    folder = out / f"{dataset}-{variant.replace(' ', '_')}-seed{seed}"
    record = run_recipe(load_recipe(str(STUDIES / study / "recipe.yaml"), (), options | settings), folder, quiet=True)
    source = find_source(folder, dataset=str(lab / dataset), overrides=[f"data.group_column={attribute}"])
    inspect(source, "test", 2000, folder)
    inspection = json.loads((folder / JSON).read_text(encoding="utf-8"))
    return {
        "dataset": dataset,
        "variant": variant,
        "seed": seed,
        "settings": settings,
        "attribute": attribute,
        "rows": inspection["data"],
        "chance": {ASKED[name]: asked["chance"] for name, asked in inspection["probes"].items()},
        "test": record.metrics.test,
        "layers": [_kept(layer) for layer in inspection["layers"]],
    }


def _kept(layer: Mapping[str, Any]) -> Line:
    kept = {key: layer[key] for key in ("name", "kl_z1", "gamma", "w2", "r2", "r2_z1", "r2_z2")}
    for latent in LATENTS:
        probes = {ASKED[name]: score["mean"] for name, score in layer[latent]["probes"].items() if score}
        kept[latent] = {"active": layer[latent]["active"], "units": layer[latent]["units"], **probes}
    return kept


def read_lines() -> list[Line]:
    """What was found so far."""
    if not FOUND.exists():
        return []
    with gzip.open(FOUND, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(lines: Iterable[Line]) -> None:
    """Writes them in the order of the sets, the variants and the seeds."""
    order = sorted(
        lines, key=lambda line: ([*SETS].index(line["dataset"]), [*VARIANTS].index(line["variant"]), line["seed"])
    )
    text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in order)
    write_atomically(FOUND, gzip.compress(text.encode(), mtime=0))


# Tables ------------------------------------------------------------------------------------


def score(line: Line, what: str, latent: str, reduce: Callable[[Sequence[float]], float]) -> float | None:
    """Balanced accuracy of `what` read from a latent, over the layers where it can be read at all."""
    scores = [layer[latent][what] for layer in line["layers"] if what in layer[latent]]
    return reduce(scores) if scores else None


def factorisation(line: Line, reduce: Callable[[Sequence[float]], float]) -> float | None:
    """How much more z1 knows of the label, and less of the attribute, than z2: positive if they are factorised."""
    label, attribute = (_gap(line, what, reduce) for what in ASKED.values())
    return None if label is None or attribute is None else label - attribute


def _gap(line: Line, what: str, reduce: Callable[[Sequence[float]], float]) -> float | None:
    first, second = (score(line, what, latent, reduce) for latent in LATENTS)
    return None if first is None or second is None else first - second


def probe_table(lines: Sequence[Line], reduce: Callable[[Sequence[float]], float]) -> str:
    """Balanced accuracies in percent, means over seeds, and differences with intervals over seeds."""
    headings = [f"{what} from {latent}" for what in ASKED.values() for latent in (*LATENTS, "z1 − z2")]
    last = ["factorisation", "change", "seeds"]
    table = [f"| data | variant | {' | '.join([*headings, *last])} |", "|---|---|" + "---:|" * (len(headings) + 3)]
    for dataset in dict.fromkeys(line["dataset"] for line in lines):
        of_set = [line for line in lines if line["dataset"] == dataset]
        values = {(line["variant"], line["seed"]): factorisation(line, reduce) for line in of_set}
        for variant in dict.fromkeys(line["variant"] for line in of_set):
            own = [line for line in of_set if line["variant"] == variant]
            cells = []
            for what in ASKED.values():
                cells += [_mean([score(line, what, latent, reduce) for line in own]) for latent in LATENTS]
                cells.append(_difference([_gap(line, what, reduce) for line in own]))
            compared = [
                value - other
                for line in own
                if (value := values[variant, line["seed"]]) is not None
                and (other := values.get((unchanged(variant), line["seed"]))) is not None
            ]
            cells.append(_difference([values[variant, line["seed"]] for line in own]))
            cells.append("" if variant == FIRST else _difference(compared))
            table.append(f"| {dataset} | {variant} | {' | '.join(cells)} | {len(own)} |")
    return "\n".join(table)


def unchanged(variant: str) -> str:
    """The variant that a variant changes: `gradient stopped, delta 0` is `gradient stopped` with another delta."""
    return variant.partition(",")[0] if "," in variant else FIRST


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * statistics.fmean(known):.1f}" if known else UNKNOWN


def _difference(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if not known:
        return UNKNOWN
    half = ci_half_width(known)
    return signed(f"{statistics.fmean(known):.1f}") + ("" if half is None else f" ± {half:.1f}")


def main() -> None:
    """Do what is missing, variant by variant of one seed before those of the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, required=True, help="the folder with the models and the data")
    parser.add_argument("--out", type=Path, required=True, help="where the runs are")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by semicolons")
    parser.add_argument("--seeds", default="1,2,42")
    chosen = parser.parse_args()
    silence_libraries()
    for seed in map(int, chosen.seeds.split(",")):
        for dataset in chosen.sets.split(","):
            for variant in chosen.variants.split(";"):
                lines = read_lines()
                if (dataset, variant, seed) not in {(line["dataset"], line["variant"], line["seed"]) for line in lines}:
                    write_lines([*lines, line := one_line(chosen.lab, chosen.out, dataset, variant, seed)])
                    print(probe_table([line], statistics.fmean).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
