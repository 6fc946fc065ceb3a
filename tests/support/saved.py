"""Whether a run's folder holds what was trained."""

from __future__ import annotations

import pytest

from fvae_lora_experiments.run.record import Record


def assert_saved(record: Record) -> None:
    """Compares the scores of the model in training with those of what was saved.

    Args:
        record: of a run of one epoch whose validation split is its test split, too.
    """
    in_training, loaded = record.metrics.validation, record.metrics.test
    assert record.dataset.splits["validation"] == record.dataset.splits["test"]
    for score in in_training.keys() - {"best_epoch"}:
        assert loaded[score] == pytest.approx(in_training[score], rel=1e-6), score
