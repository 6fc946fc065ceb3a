"""Factorisation: is the label in z1 and the spurious attribute in z2? Trains, inspects, and keeps what was found.

    python benchmarks/factorisation.py --model lab/minilm-l6 --dataset lab/hutto-domains

adds a line for each run to studies/factorisation.jsonl.gz. The probes are those of `fvae-lora inspect`, on every second
row of the test split, where label and attribute are independent. Started again, it does what is missing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.inspect.inputs import Known
from fvae_lora_experiments.inspect.probes import Question, probe, question
from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.report.numbers import UNKNOWN, ci_half_width, signed
from records import Line, read_lines, write_lines
from short_training import STUDIES, optimise, prepare

BATCH = 32
FOUND = STUDIES / "factorisation.jsonl.gz"
SETTINGS = {"adapter.layers": [4, 5], "train.batch_size": 16, "train.precision": "fp32", "method": "fvae-lora"}
"""What differs from the recipe of studies/minilm-groups."""
STEPS = 120
RATES = {True: 1e-2, False: 3e-2}
"""The learning rates that that study chose with the gradient stopped and without."""
STOPPED = "fvae.elbo_stop_gradient"
VARIANTS: dict[str, dict[str, Any]] = {
    "gradient stopped": {STOPPED: True},
    "gradient stopped, delta 0": {STOPPED: True, "fvae.factorization_weight": 0},
    "the paper's": {STOPPED: False},
    "the paper's, delta 0": {STOPPED: False, "fvae.factorization_weight": 0},
    "gradient stopped, prior's centre 0": {STOPPED: True, "fvae.residual_prior_mean": 0},
    "gradient stopped, KL weight 1": {STOPPED: True, "fvae.kl_weight": 1},
}
FIRST = next(iter(VARIANTS))
ASKED = ("label", "attribute")
LATENTS = ("z1", "z2")


# Training and inspecting -------------------------------------------------------------------


def one_line(places: dict[str, str], variant: str, seed: int) -> Line:
    """Trains, looks into the autoencoders, and returns what is kept of it."""
    from fvae_lora import summarise_layers

    changes = VARIANTS[variant]
    settings = SETTINGS | changes | {"train.learning_rate": RATES[changes[STOPPED]]}
    prepared = prepare("minilm-groups", places | settings, seed)
    rows = [prepared.items["train"][number] for number in range(len(prepared.items["train"]))]
    optimise(prepared, rows, STEPS, np.random.default_rng(seed), look=lambda step: None)
    prepared.model.eval()
    chosen = list(range(0, len(prepared.items["test"]), 2))
    batches = (
        prepared.batch([prepared.items["test"][number] for number in chosen[start : start + BATCH]])
        for start in range(0, len(chosen), BATCH)
    )
    groups = np.array([int(name) for name in class_names(prepared.splits.test, "group")])
    group = groups[np.array(prepared.splits.test["group"][:])[chosen]]  # 2 * label + attribute
    questions = {
        "label": question(Known(group // 2, ["negative", "positive"])),
        "attribute": question(Known(group % 2, ["movie", "amazon"])),
    }
    layers = [
        {key: getattr(summary, key) for key in ("kl_z1", "gamma", "w2", "r2", "r2_z1", "r2_z2")}
        | {"name": name}
        | {latent: _probed(getattr(summary, f"{latent}_mean").numpy(), questions) for latent in LATENTS}
        for name, summary in summarise_layers(prepared.model, map(_without_labels, batches)).items()
    ]
    return {"variant": variant, "seed": seed, "settings": settings, "rows": len(chosen), "layers": layers}


def _without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _probed(means: np.ndarray, questions: Mapping[str, Question]) -> dict[str, float]:
    found = {what: probe(means, asked) for what, asked in questions.items()}
    return {what: score.mean for what, score in found.items() if score is not None}


# Tables ------------------------------------------------------------------------------------


def score(line: Line, what: str, latent: str, reduce: Callable[[Sequence[float]], float]) -> float | None:
    """Balanced accuracy of `what` read from a latent, over the layers where it can be read at all."""
    scores = [layer[latent][what] for layer in line["layers"] if what in layer[latent]]
    return reduce(scores) if scores else None


def factorisation(line: Line, reduce: Callable[[Sequence[float]], float]) -> float | None:
    """How much more z1 knows of the label, and less of the attribute, than z2: positive if they are factorised."""
    label, attribute = (_gap(line, what, reduce) for what in ASKED)
    return None if label is None or attribute is None else label - attribute


def _gap(line: Line, what: str, reduce: Callable[[Sequence[float]], float]) -> float | None:
    first, second = (score(line, what, latent, reduce) for latent in LATENTS)
    return None if first is None or second is None else first - second


def probe_table(lines: Sequence[Line], reduce: Callable[[Sequence[float]], float]) -> str:
    """Balanced accuracies in percent, means over seeds, and differences with intervals over seeds."""
    headings = [f"{what} from {latent}" for what in ASKED for latent in (*LATENTS, "z1 − z2")]
    headings += ["factorisation", "change", "seeds"]
    table = [f"| variant | {' | '.join(headings)} |", "|---|" + "---:|" * len(headings)]
    values = {(line["variant"], line["seed"]): factorisation(line, reduce) for line in lines}
    for variant in VARIANTS:
        own = sorted((line for line in lines if line["variant"] == variant), key=lambda line: line["seed"])
        if not own:
            continue
        cells = []
        for what in ASKED:
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
        table.append(f"| {variant} | {' | '.join(cells)} | {len(own)} |")
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
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seeds", default="1,2,42")
    chosen = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    places = {"model": chosen.model, "dataset": chosen.dataset}
    for seed in map(int, chosen.seeds.split(",")):
        for variant in VARIANTS:
            lines = read_lines(FOUND)
            if (variant, seed) not in {(line["variant"], line["seed"]) for line in lines}:
                line = one_line(places, variant, seed)
                write_lines(FOUND, [*lines, line])
                print(probe_table([line], statistics.fmean).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
