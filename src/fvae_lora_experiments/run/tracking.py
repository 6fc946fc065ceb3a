"""Experiment trackers, which transformers' callbacks write to: a resumed run continues where its track ended."""

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fvae_lora_experiments.errors import RunError, UserError, first_line
from fvae_lora_experiments.run import distributed
from fvae_lora_experiments.run.folder import RunFolder, write_atomically

MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


def refuse_missing(trackers: Sequence[str]) -> None:
    """Raises a `UserError` for the first tracker that is not installed."""
    for tracker in trackers:
        if not any(map(importlib.util.find_spec, MODULES[tracker])):
            raise UserError(f"train.report_to: {tracker} is not installed; pip install {tracker}")


@contextmanager
def one_track(folder: RunFolder, arguments: TrainingArguments) -> Iterator[list[TrainerCallback]]:
    """Makes the trackers of a Trainer that is built and trained inside continue the track of this run's folder.

    Environment variables of the trackers that are already set stay. The folder keeps the identifiers of the track in
    `tracking.json`, and TensorBoard's files in `tensorboard/`.

    Args:
        folder: the run's.
        arguments: the Trainer's; the track's name is set in them.

    Yields:
        Callbacks for the Trainer.

    Raises:
        RunError: a tracker cannot write, or reach its server.
    """
    if not arguments.report_to or not distributed.is_main():
        yield []
        return
    file = folder.path / "tracking.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"run": uuid.uuid4().hex[:8]}
    write_atomically(file, json.dumps(known) + "\n")
    arguments.run_name, arguments.project = f"{folder.path.resolve().name}-{known['run']}", "fvae-lora"
    variables = {
        "TENSORBOARD_LOGGING_DIR": str(folder.path / "tensorboard"),
        "WANDB_PROJECT": "fvae-lora",
        "WANDB_RUN_ID": known["run"],
        "WANDB_RESUME": "allow",
        "MLFLOW_EXPERIMENT_NAME": "fvae-lora",
    } | ({"MLFLOW_RUN_ID": known["mlflow"]} if "mlflow" in known else {})
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)

    def remember(mlflow_run: str) -> None:
        write_atomically(file, json.dumps(known | {"mlflow": mlflow_run}) + "\n")

    try:
        yield [_MlflowRun(remember)] if "mlflow" in arguments.report_to else []
    except Exception as error:
        if (tracker := type(error).__module__.partition(".")[0]) in arguments.report_to:
            raise RunError(f"train.report_to: {tracker}: {first_line(error)}") from error
        raise
    finally:
        for name in ours:
            os.environ.pop(name, None)


class _MlflowRun(TrainerCallback):
    """Stores the id that MLflow gives to the run."""

    def __init__(self, remember: Callable[[str], None]):
        self.remember = remember

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """MLflow has started its run."""
        import mlflow

        if run := mlflow.active_run():
            self.remember(run.info.run_id)
