"""Scores by class, and the predictions for the test split, row by row."""

import csv
import io
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from fvae_lora_experiments.run.record import ByClass, ClassScores


def by_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ByClass:
    """Precision, recall and F1 of each class, their means, and the confusion matrix.

    Args:
        predicted: the predicted class of each row, (rows,).
        labels: the true class of each row, (rows,).
        names: of the classes, in the order of their numbers.
    """
    numbers = range(len(names))
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    counts = confusion_matrix(labels, predicted, labels=numbers)
    scores = zip(precision.tolist(), recall.tolist(), f1.tolist(), support.tolist(), strict=True)
    return ByClass(
        macro_f1=float(f1_score(labels, predicted, average="macro", zero_division=0)),
        balanced_accuracy=float(recall[support > 0].mean()),
        classes={
            name: ClassScores(precision=p, recall=r, f1=f, support=n)
            for name, (p, r, f, n) in zip(names, scores, strict=True)
        },
        confusion={
            name: {names[i]: int(row[i]) for i in np.flatnonzero(row).tolist()}
            for name, row in zip(names, counts, strict=True)
        },
    )


def predictions_csv(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """CSV of label and prediction for each row, numbered from 1: classes or, without `names`, numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("row", "label", "predicted"))
    for row, pair in enumerate(zip(labels.tolist(), predicted.tolist(), strict=True), 1):
        writer.writerow((row, *((names[value] for value in pair) if names else pair)))
    return out.getvalue()
