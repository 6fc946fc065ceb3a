"""Differences to LoRA: the same seed on the same splits, one pair each."""

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from fvae_lora.experiments.methods import METHODS
from fvae_lora.experiments.record import Record
from fvae_lora.experiments.report.intervals import half_width
from fvae_lora.experiments.report.rows import Group, differing

BASELINE = "lora"


def set_differences(groups: Sequence[Group], gridded: Collection[str]) -> None:
    """Set the rows' differences to their baseline; a row without one keeps none.

    Args:
        groups: finished runs that were measured alike.
        gridded: the keys that a grid chose for each method.

    """
    baselines = [group for group in groups if group.row.method == BASELINE and not group.row.superseded]
    for group in groups:
        if group.row.method != BASELINE and (baseline := _baseline(group, baselines, gridded)):
            pairs = list(_pairs(group, baseline))
            group.row = replace(
                group.row,
                pairs=len(pairs),
                difference=statistics.fmean(pairs) if pairs else None,
                difference_half_width=half_width(pairs),
            )


def _baseline(group: Group, baselines: Sequence[Group], gridded: Collection[str]) -> Group | None:
    """Pick the baseline under the settings of `group`, apart from what a grid chose and what the method is.

    Where several are left, only a varied setting tells them apart: the one that shares it is picked, if there is one.
    """
    method = METHODS.get(group.row.method)
    own = {"train.learning_rate", *gridded, *(method.defaults if method else ())}
    alike = [
        baseline
        for baseline in baselines
        if all(
            key in own or key.startswith(("fvae.", "ablation.")) for key in differing([group.recipe, baseline.recipe])
        )
    ]
    if len(alike) > 1:
        varied = differing(baseline.recipe for baseline in alike) - set(gridded)
        alike = [baseline for baseline in alike if not varied & differing([group.recipe, baseline.recipe])]
    return alike[0] if len(alike) == 1 else None


def _pairs(group: Group, baseline: Group) -> Iterator[float]:
    for seed in group.runs.keys() & baseline.runs.keys():
        ours, theirs = group.runs[seed].record, baseline.runs[seed].record
        if ours and theirs and _splits(ours) == _splits(theirs) and ours.score is not None and theirs.score is not None:
            yield ours.score - theirs.score


def _splits(record: Record) -> tuple[object, ...]:
    data = record.dataset
    return data.fingerprint, data.protocol, data.splits, data.validation_from, data.test_from
