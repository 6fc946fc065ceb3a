"""How well each class was predicted, and which classes were taken for which."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from fvae_lora_experiments.report.numbers import percent
from fvae_lora_experiments.report.rows import Group
from fvae_lora_experiments.report.tables import Table
from fvae_lora_experiments.run.record import ByClass, ClassScores

MOST_IN_A_MATRIX = 20
"""With more classes the most frequent confusions are listed instead."""
SCORES = ("precision", "recall", "f1")
MEANS = {"Macro F1": "macro_f1", "balanced accuracy": "balanced_accuracy"}


@dataclass(frozen=True)
class Classes:
    """The classes of one row: their scores, and their confusion matrix or the most frequent confusions."""

    label: str
    tables: Sequence[Table]


def classes_of(group: Group) -> Classes | None:
    """Put together what the seeds of a row say of each class; None where they say nothing."""
    runs = [run.record.by_class for run in group.runs.values() if run.record and run.record.by_class]
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in run.classes))
    rows = [_scores(name, [run.classes[name] for run in runs if name in run.classes]) for name in names]
    seeds = f"Means over {len(runs)} seeds." if len(runs) > 1 else "One seed."
    means = (f"{what} {_mean([getattr(run, key) for run in runs])}%" for what, key in MEANS.items())
    scores = Table(
        "Classes", ("class", "precision %", "recall %", "F1 %", "rows"), rows, [f"{', '.join(means)}. {seeds}"]
    )
    return Classes(group.row.label, [scores, _confusion(runs, names)])


def _scores(name: str, seeds: Sequence[ClassScores]) -> list[str]:
    rows = [scores.support for scores in seeds if scores.support is not None]
    means = [_mean([getattr(scores, score) for scores in seeds]) for score in SCORES]
    return [name, *means, f"{fmean(rows):g}" if rows else percent(None)]


def _mean(fractions: Sequence[float | None]) -> str:
    known = [fraction for fraction in fractions if fraction is not None]
    return percent(100 * fmean(known) if known else None)


def _confusion(runs: Sequence[ByClass], names: Sequence[str]) -> Table:
    counts: Counter[tuple[str, str]] = Counter()
    for run in runs:
        for label, row in run.confusion.items():
            counts.update({(label, predicted): count for predicted, count in row.items()})
    summed = "Rows of the test split, summed over seeds." if len(runs) > 1 else "Rows of the test split."
    if len(names) <= MOST_IN_A_MATRIX:
        matrix = [[label, *(str(counts[label, predicted] or "") for predicted in names)] for label in names]
        return Table("Predicted", ("class", *names), matrix, [f"{summed} Across: what was predicted."])
    wrong = [(label, other, n) for (label, other), n in counts.most_common() if label != other][:MOST_IN_A_MATRIX]
    lines = [[label, predicted, str(n)] for label, predicted, n in wrong]
    return Table("Most frequent confusions", ("class", "predicted", "rows"), lines, [summed])
