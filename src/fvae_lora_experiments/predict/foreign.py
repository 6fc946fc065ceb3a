"""How foreign a row is to a run: its score and its p-value, by the detector that was fitted to the run."""

from collections.abc import Mapping
from typing import Any

from fvae_lora import ForeignInputDetector
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.predict.predictors import number
from fvae_lora_experiments.predict.trained import Trained
from fvae_lora_experiments.run.folder import RunFolder

COLUMNS = ("foreign_score", "foreign_p_value")


def load_detector(run: RunFolder, trained: Trained) -> ForeignInputDetector:
    """The detector beside a run's adapter.

    Raises:
        UserError: it is truncated, or of another adapter.
    """
    try:
        return ForeignInputDetector.load(run.adapter, trained.model)
    except ValueError as error:
        raise UserError(f"{error}; fvae-lora inspect {run.path} --detector makes a new one") from error


def foreign(detector: ForeignInputDetector, trained: Trained, batch: Mapping[str, Any]) -> list[dict[str, float]]:
    """What a detector says of each row of a batch."""
    with trained.task.autocast(trained.device):
        found = detector.score(**batch)
    return [dict(zip(COLUMNS, map(number, pair), strict=True)) for pair in zip(found.score, found.p_value, strict=True)]
