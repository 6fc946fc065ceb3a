"""How well a linear model reads what is known of a row from a latent, and where the rows lie in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fvae_lora_experiments.inspect.inputs import Known

FOLDS = 5
"""Of the cross-validation; what is known of fewer rows is not probed."""


@dataclass(frozen=True)
class Score:
    """The mean over folds, and the sample standard deviation: balanced accuracy of classes, R^2 of numbers."""

    mean: float
    std: float


@dataclass(frozen=True)
class Question:
    """What is to be read from the latents: the rows that are asked about, and what a guess would score."""

    known: Known
    rows: np.ndarray
    """Which rows, (rows,) of bool."""
    chance: float
    metric: str
    reason: str = ""
    """Why nothing is asked."""


def question(known: Known) -> Question:
    """What can be asked of what is known: of classes those with a row for each fold, if there are two."""
    if not known.classes:
        reason = "" if len(known.values) >= 2 * FOLDS else f"{len(known.values)} rows; {2 * FOLDS} are needed"
        return Question(known, np.isfinite(known.values), 0.0, "R\N{SUPERSCRIPT TWO}", reason)
    counts = np.bincount(known.values, minlength=len(known.classes))
    asked = int((counts >= FOLDS).sum())
    reason = "" if asked >= 2 else f"only {asked} of {len(known.classes)} classes have {FOLDS} rows; 2 must have"
    return Question(known, counts[known.values] >= FOLDS, 1 / max(asked, 1), "balanced accuracy", reason)


def probe(latents: np.ndarray, asked: Question) -> Score | None:
    """How well a linear model reads it from latents, cross-validated.

    Classes are told apart by linear discriminants with a covariance that is shrunk (Ledoit and Wolf, 2004), which works
    with fewer rows than units, and with every class as likely as any other; numbers by ridge regression.

    Args:
        latents: (rows, units).
        asked: of the same rows.

    Returns:
        None if nothing is asked, if the rows are others, or if no unit varies.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if asked.reason or len(latents) != len(asked.rows):
        return None
    rows = asked.rows & np.isfinite(latents).all(1)
    x, y = latents[rows], asked.known.values[rows]
    x = x[:, np.ptp(x, 0) > 0] if len(x) else x
    if not x.size or len(y) < 2 * FOLDS:
        return None
    if asked.known.classes:
        classes, counts = np.unique(y, return_counts=True)
        if len(classes) < 2 or counts.min() < FOLDS:
            return None
        model: Any = LinearDiscriminantAnalysis(
            solver="lsqr", shrinkage="auto", priors=np.full(len(classes), 1 / len(classes))
        )
        folds: Any = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
        scoring = "balanced_accuracy"
    else:
        model, folds, scoring = Ridge(), KFold(FOLDS, shuffle=True, random_state=0), "r2"
    found = cross_val_score(make_pipeline(StandardScaler(), model), x, y, cv=folds, scoring=scoring)
    return Score(float(found.mean()), float(found.std(ddof=1)))


@dataclass(frozen=True)
class Projection:
    """Rows along the two directions in which a latent varies most, and the share of its variance that they hold."""

    points: Sequence[tuple[float, float] | None]
    """One for each row that is shown; None where the row has no token that counts."""
    explained: tuple[float, float]


def project(latents: np.ndarray, shown: np.ndarray) -> Projection | None:
    """The principal components of latents.

    Args:
        latents: (rows, units).
        shown: indices of rows, (shown,).

    Returns:
        None where fewer than two rows have latents, or none differs.
    """
    from sklearn.decomposition import PCA

    finite = np.isfinite(latents).all(1)
    if finite.sum() < 2 or not np.ptp(latents[finite], 0).any():
        return None
    kept = min(2, int(finite.sum()), latents.shape[1])
    pca = PCA(kept, svd_solver="full").fit(latents[finite])
    places = np.full((len(shown), 2), np.nan)
    has = finite[shown]
    places[has] = 0
    places[has, :kept] = pca.transform(latents[shown[has]])
    explained = [*pca.explained_variance_ratio_.tolist(), 0.0][:2]
    points = [None if np.isnan(x) else (round(float(x), 4), round(float(y), 4)) for x, y in places]
    return Projection(points, (explained[0], explained[1]))
