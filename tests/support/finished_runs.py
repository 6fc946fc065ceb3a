"""Checks of finished runs: what was trained is saved, two runs are the same to rounding; and a run cut short."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fvae_lora_experiments.errors import RunError
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.run.trainer import FolderCallback
from fvae_lora_experiments.schema import Recipe


def events(folder: Path) -> list[dict[str, Any]]:
    """The learning curve of the run in a folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_saved(record: Record) -> None:
    """Compares the scores of the model in training with those of what was saved.

    Args:
        record: of a run of one epoch whose validation split is its test split, too.
    """
    in_training, loaded = record.metrics.validation, record.metrics.test
    assert record.dataset.splits["validation"] == record.dataset.splits["test"]
    for score in in_training.keys() - {"best_epoch"}:
        assert loaded[score] == pytest.approx(in_training[score], rel=1e-6), score


def assert_same_to_rounding(first: Path, second: Path) -> dict[str, Any]:
    """Learning curves, ELBO terms and scores are the same to rounding; returns the second's record."""
    for one, other in zip(_numbers(events(first)), _numbers(events(second)), strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-5)
    records = [json.loads((run / "run.json").read_text()) for run in (first, second)]
    assert records[0]["parameters"] == records[1]["parameters"]
    return records[1]


def _numbers(tree: Any) -> list[float]:
    """The numbers in a tree, in its order."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _numbers(tree[key])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in _numbers(item)]
    return [tree] if isinstance(tree, int | float) else []


@contextmanager
def stopping_after_first_epoch() -> Iterator[None]:
    """Within it a run fails once its first checkpoint is saved, and can be resumed."""
    on_save = FolderCallback.on_save

    def stop(self: FolderCallback, *arguments: Any, **options: Any) -> None:
        on_save(self, *arguments, **options)
        raise RunError("stopped after the first epoch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderCallback, "on_save", stop)
        yield


def stop_after_first_epoch(recipe: Recipe, folder: Path) -> None:
    """Runs a recipe until its first checkpoint is saved; the run then fails and can be resumed."""
    with stopping_after_first_epoch(), pytest.raises(RunError, match="stopped"):
        run_recipe(recipe, folder, quiet=True)
