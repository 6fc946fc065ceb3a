"""Differences to LoRA: the same seed on the same splits, one pair each."""

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.report.numbers import ci_half_width
from fvae_lora_experiments.report.rows import Trials, differing
from fvae_lora_experiments.run.record import Record

BASELINE = "lora"


@dataclass(frozen=True)
class Difference:
    """How the test scores differ from the baseline's, over pairs of the same seed on the same splits."""

    pairs: int = 0
    mean: float | None = None
    half_width: float | None = None


def differences(
    results: Sequence[Trials], superseded: Collection[Trials], gridded: Collection[str]
) -> dict[Trials, Difference]:
    """Return the differences of those results that have a baseline.

    Args:
        results: finished runs of one comparison.
        superseded: those of them that cannot be a baseline.
        gridded: the keys that a grid chose for each method.

    """
    baselines = [each for each in results if each.measured.method == BASELINE and each not in superseded]
    found = {}
    for each in results:
        if each.measured.method != BASELINE and (baseline := _baseline(each, baselines, gridded)):
            pairs = list(_pairs(each, baseline))
            found[each] = Difference(len(pairs), statistics.fmean(pairs) if pairs else None, ci_half_width(pairs))
    return found


def _baseline(ours: Trials, baselines: Sequence[Trials], gridded: Collection[str]) -> Trials | None:
    """Pick the baseline with the settings of `ours`, apart from what a grid chose and what defines the method.

    If several are left, they only differ in a varied setting: the one that shares it is picked, if there is one.
    """
    method = METHODS.get(ours.measured.method)
    own = {"train.learning_rate", *gridded, *(method.defaults if method else ())}
    alike = [
        baseline
        for baseline in baselines
        if all(
            key in own or key.startswith(("fvae.", "ablation.")) for key in differing([ours.recipe, baseline.recipe])
        )
    ]
    if len(alike) > 1:
        varied = differing(baseline.recipe for baseline in alike) - set(gridded)
        alike = [baseline for baseline in alike if not varied & differing([ours.recipe, baseline.recipe])]
    return alike[0] if len(alike) == 1 else None


def _pairs(group: Trials, baseline: Trials) -> Iterator[float]:
    for seed in group.runs.keys() & baseline.runs.keys():
        ours, theirs = group.runs[seed].record, baseline.runs[seed].record
        if ours and theirs and _splits(ours) == _splits(theirs) and ours.score is not None and theirs.score is not None:
            yield ours.score - theirs.score


def _splits(record: Record) -> tuple[object, ...]:
    data = record.dataset
    return data.fingerprint, data.protocol, data.splits, data.validation_from, data.test_from
