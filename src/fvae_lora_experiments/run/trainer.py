"""transformers' Trainer as runs use it: it stops at the first NaN or infinite number, and keeps the run's folder."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import AdaLoraModel, PeftModel
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import EvalLoopOutput

from fvae_lora import FVAELoraTrainer, elbo_terms
from fvae_lora_experiments.errors import DivergenceError, UserError
from fvae_lora_experiments.models.pretrained import load_model
from fvae_lora_experiments.run import distributed
from fvae_lora_experiments.run.adalora import RankSchedule, orthogonality
from fvae_lora_experiments.run.environment import cores
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.progress import ProgressLines
from fvae_lora_experiments.run.record import Event
from fvae_lora_experiments.run.state_cache import collate
from fvae_lora_experiments.run.timing import is_terminal
from fvae_lora_experiments.run.tracking import refuse_missing
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Metric, Task

TIMINGS = ("runtime", "samples_per_second", "steps_per_second")
"""Timings that a Trainer adds to the scores."""

ScoredBatch = tuple[float, torch.Tensor, torch.Tensor]
"""A batch's loss, the task's outputs and the labels."""


class RunTrainer(FVAELoraTrainer):
    """A Trainer for a task. A loss that is NaN or infinite raises `DivergenceError`, before it reaches a parameter.

    Args:
        task: collates batches and scores the model's outputs.
        quiet: whether to show no progress.
        sampler: draws the rows of an epoch; None shuffles them.
        kwargs: the Trainer's.

    Attributes:
        scored: the task's outputs and the labels of the split that was scored last, in the main process.
    """

    scored: tuple[np.ndarray, np.ndarray] | None = None

    def __init__(self, task: Task, quiet: bool, sampler: Sampler[int] | None = None, **kwargs: Any):
        super().__init__(data_collator=partial(collate, task), **kwargs)
        self.task, self.quiet, self.sampler = task, quiet, sampler
        self.remove_callback(PrinterCallback)  # the default of a Trainer without progress bars
        if not quiet and not is_terminal():
            self.add_callback(ProgressLines(task.metric.name))
        self.is_adalora = isinstance(getattr(self.model, "base_model", None), AdaLoraModel)
        if self.is_adalora:
            self.add_callback(RankSchedule())

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its loss."""
        loss = super().training_step(model, *args, **kwargs)
        if not torch.isfinite(loss):
            raise DivergenceError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}: {locate_divergence(self.model)}"
            )
        if self.is_adalora and self.accelerator.sync_gradients:  # once per step, whatever the number of micro-batches
            regulariser = orthogonality(self.model)
            self.accelerator.backward(regulariser * self.accelerator.gradient_accumulation_steps)
            loss = loss + regulariser.detach()
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every n-th batch of a split, n being the number of processes.

        The batches are those of a single process. The Trainer's own dataloader would repeat rows if the processes
        cannot get equally many.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        return DataLoader(
            rows,
            batch_sampler=batches[self.args.process_index :: self.args.world_size],
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Scores a split: its mean loss, and the task's scores from outputs and from generation.

        The main process combines the results of all processes and broadcasts the scores.

        Raises:
            DivergenceError: the mean loss is NaN or infinite.
        """
        self.callback_handler.eval_dataloader = dataloader  # for the progress bar
        self.model.eval()
        found: list[ScoredBatch] = []
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad():
                output = self.model(**inputs)
            labels = inputs["labels"]
            found.append((output.loss.item(), self.task.outputs(output.logits, labels).cpu(), labels.cpu()))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        turns = zip_longest(*gather_object([found]))
        batches = [batch for turn in turns for batch in turn if batch is not None]
        items: Any = dataloader.dataset
        scores = [self._scores(batches, items) if self.is_world_process_zero() else {}]
        broadcast_object_list(scores)
        if not math.isfinite(loss := scores[0]["loss"]):
            split = "validation" if metric_key_prefix == "eval" else metric_key_prefix
            when = f" at step {self.state.global_step}" if self.state.global_step else ""
            raise DivergenceError(f"the {split} loss is {loss}{when}")
        metrics = {f"{metric_key_prefix}_{name}": score for name, score in scores[0].items()}
        return EvalLoopOutput(None, None, metrics, len(items))

    def _scores(self, batches: list[ScoredBatch], items: Any) -> dict[str, float]:
        rows = getattr(items, "source", items)  # the original rows, if these are cached states
        outputs, labels = EvalLoopContainer(), EvalLoopContainer()
        for _, batch_outputs, batch_labels in batches:
            outputs.add(batch_outputs)
            labels.add(batch_labels)
        loss = np.average([loss for loss, _, _ in batches], weights=[len(labels) for _, _, labels in batches])
        if not math.isfinite(loss):
            return {"loss": float(loss)}
        self.scored = outputs.get_arrays(), labels.get_arrays()
        return {
            "loss": float(loss),
            **self.task.scores(*self.scored, rows),
            **self.task.generated_scores(self.model, rows, items, progress=not self.quiet),
        }

    def score(self, rows: Any, split: str) -> dict[str, float]:
        """`loss` and the task's scores on `rows`, the data set of the split of that name."""
        return logged_scores(self.evaluate(rows, metric_key_prefix=split), split)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_whole_model(self.model, Path(resume_from_checkpoint))


def load_whole_model(model: PreTrainedModel, folder: Path) -> None:
    """Loads all parameters that `save_pretrained` wrote to `folder` into `model`.

    transformers may write them under names of older versions, which a resuming Trainer would skip.
    """
    model.load_state_dict(load_model(type(model), str(folder), dtype=torch.float32)[0].state_dict())


def locate_divergence(model: nn.Module) -> str:
    """Names the first layer whose ELBO is not finite and its terms, or else the task loss."""
    for module, terms in elbo_terms(model).items():
        wrong = {term: value for term, value in terms.items() if not math.isfinite(value)}
        if wrong:
            return f"{module} has " + ", ".join(f"{term} {value}" for term, value in wrong.items())
    return "the task loss is not finite; the ELBO terms of all layers are"


class FolderCallback(TrainerCallback):
    """Writes the learning curve and manages the checkpoints."""

    def __init__(self, folder: RunFolder, recipe: Recipe, on_checkpoint: Callable[[], None]):
        self.folder, self.recipe, self.on_checkpoint = folder, recipe, on_checkpoint

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Logs the running mean of the loss, which a checkpoint would lose."""
        control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Appends a line to the learning curve."""
        where = {"step": state.global_step, "epoch": logs.get("epoch")}
        if "loss" in logs:
            line = {"event": "train", **where, **{k: logs.get(k) for k in ("loss", "learning_rate", "grad_norm")}}
            if line["grad_norm"] is not None and not math.isfinite(line["grad_norm"]):
                raise DivergenceError(f"the gradient's norm is {line['grad_norm']} at step {state.global_step}")
            if terms := elbo_terms(kwargs["model"]):
                line["elbo"] = terms
            self.folder.append(Event.model_validate(line))
        elif "eval_loss" in logs:
            self.folder.append(Event.model_validate({"event": "validation", **where, **logged_scores(logs, "eval")}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keeps the new checkpoint, which is complete now, and the best one."""
        distributed.wait()  # each process adds its random state to the checkpoint
        self.folder.keep_checkpoints(state.global_step, state.best_global_step)
        self.on_checkpoint()
        control.should_training_stop = is_training_over(state, self.recipe)


def default_workers() -> int:
    """The number of data-loading processes if the recipe does not say: enough to keep an accelerator busy.

    0 without an accelerator, because they would take cores from training.
    """
    return min(8, max(1, cores() // distributed.process_count() - 1)) if torch.accelerator.is_available() else 0


def logged_scores(logs: Mapping[str, float], prefix: str) -> dict[str, float]:
    """The scores that a Trainer logged under `prefix`, without timings."""
    logged = {key.removeprefix(f"{prefix}_"): value for key, value in logs.items() if key.startswith(f"{prefix}_")}
    return {name: value for name, value in logged.items() if name not in TIMINGS}


def is_training_over(state: TrainerState, recipe: Recipe) -> bool:
    """Whether training is over at the end of an epoch: all epochs or steps are done, or the patience is exhausted."""
    train = recipe.train
    if train.max_steps is None and round(state.epoch or 0, 6) >= train.epochs:
        return True
    if train.max_steps is not None and state.global_step >= train.max_steps:
        return True
    if train.patience is None:
        return False
    steps_per_epoch = round(state.global_step / state.epoch)
    return state.global_step - state.best_global_step >= train.patience * steps_per_epoch


def checkpoint_state(checkpoint: Path | None) -> TrainerState:
    """The Trainer's state when it wrote a checkpoint."""
    assert checkpoint is not None, "an epoch ends with a checkpoint"
    state: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state


def trainer_arguments(recipe: Recipe, output: Path, metric: Metric, quiet: bool) -> TrainingArguments:
    """The recipe as transformers' arguments.

    Raises:
        UserError: this machine cannot train in the recipe's precision, the batch cannot be divided by the processes, or
            a tracker is not installed.
    """
    train = recipe.train
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU; fp32 and bf16 are allowed here")
    processes = distributed.process_count()
    if train.batch_size % processes:
        raise UserError(
            f"train.batch_size: {train.batch_size} rows cannot be divided evenly among {processes} processes; "
            f"multiples of {processes} are allowed"
        )
    refuse_missing(train.report_to)
    workers = default_workers() if train.workers is None else train.workers
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.batch_size // processes,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        fp16=train.precision == "fp16",
        optim="adamw_torch",
        seed=recipe.seed,
        data_seed=recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        metric_for_best_model=metric.name,
        greater_is_better=metric.greater_is_better,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=list(train.report_to) or "none",
        disable_tqdm=quiet or not is_terminal(),
        log_level_replica="error",
    )
