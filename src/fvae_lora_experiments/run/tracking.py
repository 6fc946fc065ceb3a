"""Trackers, which transformers' own callbacks write to: a run has one track, however often it is resumed."""

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
    """Lets the trackers of a Trainer that is made and trains inside go on where those of this run's folder were.

    What somebody has set of their variables stays. The folder keeps the names that a track is found by, in
    `tracking.json`; TensorBoard's files lie in `tensorboard/`.

    Args:
        folder: the run's.
        arguments: the Trainer's; they get the track's name.

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
    """Keeps the name that MLflow has given to the run."""

    def __init__(self, remember: Callable[[str], None]):
        self.remember = remember

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The run is there now."""
        import mlflow

        if run := mlflow.active_run():
            self.remember(run.info.run_id)
