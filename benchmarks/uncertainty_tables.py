"""The tables of studies/uncertainty/README.md, from the records of `calibration.py` and `detection.py`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_lora_experiments.report.numbers import ci_half_width, signed
from records import Line, read_lines

STUDY = Path(__file__).parents[1] / "studies" / "uncertainty"
CALIBRATION, DETECTION = (STUDY / f"{name}.jsonl.gz" for name in ("calibration", "detection"))

METHODS = {
    "lora": "LoRA",
    "dora": "DoRA",
    "fvae-no-elbo": "no ELBO",
    "fvae-lora": "FVAE-LoRA",
    "fvae-lora-paper": "FVAE-LoRA, paper's weights",
}
SCORES = {
    "accuracy": "accuracy %",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "adaptive_ece": "ECE, equal mass",
}


@dataclass(frozen=True)
class Claim:
    """A difference that was predicted before it was measured; a side is a method and a way to predict or to detect."""

    what: str
    score: str
    ours: tuple[str, str]
    theirs: tuple[str, str]
    predicted: str


FITTED = "mean, temperature"
CALIBRATION_CLAIMS = [
    Claim("ECE as trained", "ece", ("fvae-lora", "mean"), ("lora", "mean"), "−0.02 to 0"),
    Claim("ECE, both with a temperature", "ece", ("fvae-lora", FITTED), ("lora", FITTED), "−0.01 to +0.01"),
    Claim("NLL, both with a temperature", "nll", ("fvae-lora", FITTED), ("lora", FITTED), "0 to +0.03"),
    Claim("NLL, 16 draws, beside 16 passes of LoRA with dropout", "nll", ("fvae-lora", "16 draws"),
          ("lora", "16 dropout passes"), "0 to +0.03"),
    Claim("NLL, 16 draws, beside its own mean", "nll", ("fvae-lora", "16 draws"), ("fvae-lora", "mean"), "0 to +0.02"),
    Claim("ECE, 16 draws, beside its own mean", "ece", ("fvae-lora", "16 draws"), ("fvae-lora", "mean"),
          "not predicted"),
    Claim("ECE, 16 draws, beside LoRA with a temperature", "ece", ("fvae-lora", "16 draws"), ("lora", FITTED),
          "not predicted"),
    Claim("NLL, 16 draws, beside LoRA with a temperature", "nll", ("fvae-lora", "16 draws"), ("lora", FITTED),
          "not predicted"),
    Claim("NLL, with a temperature, beside three LoRAs", "nll", ("fvae-lora", FITTED), ("lora", "ensemble of 3"),
          "+0.01 to +0.06"),
]  # fmt: skip

SHIPPED, INPUTS = "detector: both", "layers' inputs: Mahalanobis"
PLAIN = "without a model"
TOKENS = "layers' tokens: Mahalanobis"
LIKELIHOOD = "lead: likelihood, one-sided"
COMBINED = "lead: detector and layers' inputs"
DETECTION_CLAIMS = [
    Claim("beside LoRA's confidence", "auroc", ("fvae-lora", SHIPPED), ("lora", "1 - confidence"), "+0.1 to +0.3"),
    Claim("beside Mahalanobis on LoRA's layers' inputs", "auroc", ("fvae-lora", SHIPPED), ("lora", INPUTS),
          "−0.05 to +0.02"),
    Claim("beside Mahalanobis on its own layers' inputs", "auroc", ("fvae-lora", SHIPPED), ("fvae-lora", INPUTS),
          "−0.05 to +0.02"),
    Claim("beside a Gaussian of LoRA's layers' tokens", "auroc", ("fvae-lora", SHIPPED), ("lora", TOKENS),
          "not predicted"),
    Claim("its likelihood, one-sided, beside a Gaussian of LoRA's layers' tokens", "auroc", ("fvae-lora", LIKELIHOOD),
          ("lora", TOKENS), "not predicted"),
    Claim("beside what needs no model", "auroc", ("fvae-lora", SHIPPED), ("lora", PLAIN), "not predicted"),
    Claim("detector and layers' inputs, beside LoRA's layers' inputs", "auroc", ("fvae-lora", COMBINED),
          ("lora", INPUTS), "−0.01 to +0.02"),
]  # fmt: skip


def calibration_claims() -> str:
    """Paired differences on each data set."""
    return _claims(CALIBRATION_CLAIMS, read_lines(CALIBRATION), "prediction")


def detection_claims() -> str:
    """Paired differences of the mean AUROC over the foreign kinds of each data set."""
    return _claims(DETECTION_CLAIMS, read_lines(DETECTION), "detector")


def _claims(claims: Sequence[Claim], records: Sequence[Line], way: str) -> str:
    by_data = {name: _with_one_variant(of_data) for name, of_data in _by(records, "data").items()}
    lines = [_row(["difference", "predicted", *by_data]), _rule(2, len(by_data))]
    for claim in claims:
        lines.append(_row([claim.what, claim.predicted, *(_paired(claim, found, way) for found in by_data.values())]))
    return "\n".join(lines)


def _with_one_variant(records: Sequence[Line]) -> list[Line]:
    """A data set's records, FVAE-LoRA's with the paper's weights if there are no others."""
    if any(record["method"] == "fvae-lora" for record in records):
        return list(records)
    return [r | {"method": "fvae-lora"} if r["method"] == "fvae-lora-paper" else r for r in records]


def _paired(claim: Claim, records: Iterable[Line], way: str) -> str:
    by_side: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_side[record["method"], record[way]][record["seed"]].append(record[claim.score])
    ours, theirs = by_side[claim.ours], by_side[claim.theirs]
    differences = [statistics.mean(ours[seed]) - statistics.mean(theirs[seed]) for seed in sorted(ours.keys() & theirs)]
    return _interval(differences, lambda value: signed(f"{value:.3f}")) if differences else ""


def calibration_table() -> str:
    """Every way to predict of every method, by data set."""
    blocks = []
    for data, records in _by(read_lines(CALIBRATION), "data").items():
        lines = [f"**{data}**", "", _row(["", "prediction", *SCORES.values()]), _rule(2, len(SCORES))]
        for method, of_method in _methods(records):
            for way, of_way in _by(of_method, "prediction").items():
                cells = [
                    _interval([r[score] for r in of_way], _percent if score == "accuracy" else _three)
                    for score in SCORES
                ]
                lines.append(_row([METHODS[method], way, *cells]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def detection_table() -> str:
    """AUROC and FPR at 95 % TPR of every detector, by data set."""
    blocks = []
    for data, records in _by(read_lines(DETECTION), "data").items():
        kinds = list(dict.fromkeys(record["foreign"] for record in records))
        for score, title in (("auroc", "AUROC"), ("fpr95", "FPR at 95 % TPR")):
            lines = [f"**{data}, {title}**", "", _row(["", "detector", *kinds]), _rule(2, len(kinds))]
            for method, detector, of_detector in _detectors(records):
                found = _by(of_detector, "foreign")
                cells = [_interval([r[score] for r in found[kind]], _three) for kind in kinds]
                lines.append(_row([method, detector, *cells]))
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _detectors(records: Sequence[Line]) -> list[tuple[str, str, list[Line]]]:
    """Methods, detectors and their records; what needs no model is the same for all methods, and first."""
    found = [(METHODS[m], detector, r) for m, of in _methods(records) for detector, r in _by(of, "detector").items()]
    plain = next(each for each in found if each[1] == PLAIN)
    return [("", *plain[1:]), *(each for each in found if each[1] != PLAIN)]


def alarms_table() -> str:
    """The share of the test's rows with a p-value of at most 0.05, where detectors are the shipped one's features."""
    by_data = {
        data: [r for r in _with_one_variant(of_data) if r["method"] == "fvae-lora"]
        for data, of_data in _by(read_lines(DETECTION), "data").items()
    }
    lines = [_row(["test rows at p <= 0.05", *by_data]), _rule(1, len(by_data))]
    for detector in ALARMED:
        cells = []
        for of_data in by_data.values():
            by_seed = _by([r for r in of_data if r["detector"] == detector], "seed")
            cells.append(_interval([of_seed[0]["alarms"] for of_seed in by_seed.values()], _percent))
        lines.append(_row([detector, *cells]))
    return "\n".join(lines)


ALARMED = ("detector: likelihood", "detector: latents", SHIPPED, INPUTS)


def _methods(records: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    found = _by(records, "method")
    return [(method, found[method]) for method in METHODS if method in found]


def _by(records: Iterable[Line], key: str) -> dict[Any, list[Line]]:
    found: dict[Any, list[Line]] = defaultdict(list)
    for record in records:
        found[record[key]].append(record)
    return found


def _interval(values: Sequence[float], shown: Callable[[float], str]) -> str:
    """The mean and half the width of its 95 % interval."""
    half = ci_half_width(values)
    mean = shown(statistics.mean(values))
    return mean if half is None else f"{mean} ± {shown(half).lstrip('+')}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(names: int, numbers: int) -> str:
    return "|" + "---|" * names + "---:|" * numbers


TABLES: Mapping[str, Callable[[], str]] = {
    "calibration claims": calibration_claims,
    "detection claims": detection_claims,
    "calibration": calibration_table,
    "detection": detection_table,
    "alarms": alarms_table,
}
"""The page's blocks."""
