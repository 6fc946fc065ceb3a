"""One run: from a recipe to a scored adapter and its record. Started again, it resumes where it was stopped.

Several processes (see `run.distributed`) may do it together: all go through the same steps.
"""

import contextlib
import hashlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from peft import PeftModel
from rich.console import Console
from safetensors import SafetensorError
from torch import nn
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    TrainerState,
    TrainingArguments,
)

from fvae_lora_experiments.card import write_card
from fvae_lora_experiments.data import Splits, fingerprint, group_counts, unlike_published
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.summary import print_summary, summarise
from fvae_lora_experiments.errors import DivergenceError, RunError, UserError, first_line
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.models.heads import head_modules
from fvae_lora_experiments.models.pretrained import load_adapter, loading
from fvae_lora_experiments.places import short_name, without_paths
from fvae_lora_experiments.run import distributed
from fvae_lora_experiments.run.balance import balancing
from fvae_lora_experiments.run.class_scores import by_class, predictions_csv
from fvae_lora_experiments.run.environment import git_commit, hardware, peak_memory_mb, versions
from fvae_lora_experiments.run.finished import read_finished_run, recorded_recipe
from fvae_lora_experiments.run.flops import inference_flops, training_flops
from fvae_lora_experiments.run.folder import RunFolder, checkpoint_step
from fvae_lora_experiments.run.pruning import Judge, PrunedError, PruningCallback
from fvae_lora_experiments.run.record import (
    DatasetRecord,
    Event,
    Flops,
    Memory,
    MetricRecord,
    Metrics,
    Parameters,
    Record,
    SourceRecord,
    TestedOn,
    Time,
)
from fvae_lora_experiments.run.state_cache import collate, use_cached_states
from fvae_lora_experiments.run.tracking import one_track
from fvae_lora_experiments.run.trainer import (
    FolderCallback,
    RunTrainer,
    checkpoint_state,
    is_training_over,
    load_whole_model,
    trainer_arguments,
)
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Task, load_task

RUN_FAILURES = (RunError, UserError, OSError, RuntimeError, ValueError, SafetensorError)
"""Raised by a full disk, a small GPU or a model that does not fit the data. Anything else is a bug: its traceback is
shown, and the run is also marked as failed."""


def run_recipe(
    recipe: Recipe,
    path: Path,
    quiet: bool = False,
    accept_changed_data: bool = False,
    judge: Judge | None = None,
) -> Record:
    """Trains, selects the epoch on validation, scores it once on test, and writes the record to the folder `path`.

    Args:
        recipe: the recipe.
        path: the run's folder. A run that was stopped there is resumed; a complete one is only read.
        quiet: no progress bars.
        accept_changed_data: whether a run whose training is complete may be scored on data that has changed since. Its
            record then says so (`tested_on` beside the data that it was trained on).
        judge: told the validation score of each epoch; may end the run, whose record then says that it was pruned.

    Returns:
        The record.

    Raises:
        UserError: bad input, or the folder is in use, holds another run or cannot be read. Nothing was overwritten.
        RunError: the run failed. Its record says why, and its last checkpoint is kept.
    """
    folder = RunFolder(path)
    quiet = quiet or not distributed.is_main()
    with folder.locked() if distributed.is_main() else contextlib.nullcontext():
        distributed.wait()
        earlier = folder.read_for(recipe)
        if earlier is None or earlier.state != "complete":
            prepared = _prepare(recipe, folder, folder.initial_record(recipe, earlier), quiet, accept_changed_data)
            try:
                earlier = _train_and_score(prepared, folder, quiet, judge)
            except Exception as error:
                reason = _reason(error, recipe, path)
                if distributed.first_to_fail():
                    folder.mark_failed(reason, diverged=isinstance(error, DivergenceError))
                if isinstance(error, RUN_FAILURES):
                    raise RunError(f"{path}: {reason}") from error
                raise
        kept = earlier.recipe.get("train", {}).get("keep_checkpoints", False)
        if distributed.is_main() and not kept:
            shutil.rmtree(folder.checkpoints, ignore_errors=True)  # a complete run resumes from nothing
        return earlier


def evaluate(path: Path, model: str | None = None, dataset: str | None = None, quiet: bool = False) -> dict[str, float]:
    """Scores a finished run's adapter on its test split again.

    A run that was trained but could not be scored is finished, on data that may have been repaired since.

    Args:
        path: the run's folder.
        model: where the base model is, if not where the record says.
        dataset: where the data is, if not where the record says.
        quiet: no progress bars.

    Returns:
        `loss` and the task's metric, as in the record's `metrics.test`.

    Raises:
        UserError: there is no finished run, its adapter is missing, or model or data are not those of the run.
        RunError: the run cannot be finished. Its record says why.
    """
    folder = RunFolder(path)
    if (record := folder.read()) and record.state != "complete":
        recipe = recorded_recipe(record, path, model, dataset)
        if _is_trained(folder, recipe):
            run_recipe(recipe, path, quiet, accept_changed_data=True)
    recipe, record = read_finished_run(path, model, dataset)
    if recipe.purpose == "selection":
        raise UserError(f"{path}: a point of a grid, which is not scored on the test split")
    if not folder.adapter.is_dir():
        raise UserError(f"{path}: its adapter, which would be scored, is missing")
    task, splits = load_task(recipe), open_data(recipe, record)
    base, processor = open_base(recipe, record)
    return _score(task, base, task.datasets(splits, base, processor)["test"], RunFolder(path), record, quiet)[0]


def _is_trained(folder: RunFolder, recipe: Recipe) -> bool:
    last = folder.last_checkpoint()
    return last is not None and is_training_over(checkpoint_state(last), recipe)


def open_data(recipe: Recipe, record: Record) -> Splits:
    """A run's data.

    Raises:
        UserError: the data does not exist, or is not that of the run.
    """
    task = load_task(recipe)
    official = task.open_source()
    if fingerprint(official, task.content) != record.dataset.test_fingerprint:
        raise UserError(_changed_since("dataset", recipe.dataset, record.dataset))
    return task.split(official)


def open_base(recipe: Recipe, record: Record) -> tuple[PreTrainedModel, Any]:
    """A run's base model and its processor.

    Raises:
        UserError: the model does not exist, or is not that of the run.
    """
    base, processor = load_task(recipe).load_model(record.dataset.classes)
    if _model_fingerprint(base) != record.model.fingerprint:
        raise UserError(_changed_since("model", recipe.model, record.model))
    return base, processor


@contextlib.contextmanager
def scoring_trainer(model: nn.Module, recipe: Recipe, quiet: bool = False) -> Iterator[RunTrainer]:
    """A Trainer that scores `model` on splits that the recipe's task has prepared."""
    task = load_task(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        untracked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"report_to": []})})
        arguments = trainer_arguments(untracked, Path(scratch), task.metric, quiet)
        arguments.eval_strategy = IntervalStrategy.NO
        trainer = RunTrainer(task, quiet, model=model, args=arguments)
        trainer.accelerator.prepare_model(model, evaluation_mode=True)
        yield trainer


@dataclass
class _Prepared:
    """A run that is ready to train; nothing has been written yet."""

    recipe: Recipe
    task: Task
    arguments: TrainingArguments
    rows: dict[str, Any]
    model: PreTrainedModel | PeftModel
    record: Record
    began: float
    balancing: dict[str, Any]
    """For the Trainer, see `balance`."""


def _prepare(recipe: Recipe, folder: RunFolder, record: Record, quiet: bool, accept_changed_data: bool) -> _Prepared:
    """Opens data and model, and refuses them if they are not those with which `record` was started."""
    began = time.monotonic()
    set_seed(recipe.seed)
    task = load_task(recipe)
    arguments = trainer_arguments(recipe, folder.checkpoints, task.metric, quiet)
    notes = Notes()
    with distributed.main_first():  # downloads are complete when the others start
        official = task.open_source(notes)
        splits = task.split(official)
        model, processor = task.load_model(splits.classes)
    note = unlike_published(official)
    if note is not None and distributed.is_main():
        print(f"fvae-lora: warning: dataset {recipe.dataset}: {note}", file=sys.stderr)
    identity = task.identify(official)
    base = SourceRecord(name=short_name(recipe.model), fingerprint=_model_fingerprint(model))
    data = DatasetRecord(
        name=short_name(recipe.dataset), fingerprint=identity.fingerprint, **_describe_splits(splits, recipe, note)
    )
    if record.model.fingerprint not in ("", base.fingerprint):  # empty at the first start of a run
        raise UserError(_changed_since("model", base.name, record.model))
    changed = record.dataset.fingerprint not in ("", data.fingerprint)
    if changed:
        data = _accept_changed_data(record.dataset, data, folder, recipe, accept_changed_data)

    with distributed.main_first():  # the others reuse the images checked by the first
        summary = summarise(task, official, identity, notes, quiet)
    rows = task.datasets(splits, model, processor)
    balanced = {}
    if recipe.train.sampling == "balanced" or recipe.train.class_weights is not None:
        labels = np.array(splits.train["label"][:])
        balanced = balancing(recipe.train, labels, splits.classes, recipe.seed)
    facts = task.facts(rows)
    if not quiet:
        print_summary(replace(summary, cut=facts.get("truncated", {})), Console())
    method = METHODS[recipe.method]
    total = sum(p.numel() for p in model.parameters())
    adapted = method.apply(model, recipe)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    record.metric = MetricRecord(**asdict(task.metric))
    record.model = base
    record.dataset = data if changed else DatasetRecord(**facts, **summary.facts(), **data.contents())
    record.parameters = Parameters(
        total=total,
        trainable=sum(trained.values()),
        inference=method.inference_parameters(adapted, trained),
    )
    _note_versions(record, folder)
    record.versions, record.git_commit, record.hardware = versions(), git_commit(), hardware()
    if recipe.train.cache_frozen:
        trained_on = {name: rows[name] for name in ("train", "validation")}
        rows |= use_cached_states(adapted, trained_on, task, record, arguments.device, quiet)
    return _Prepared(recipe, task, arguments, rows, adapted, record, began, balanced)


def _train_and_score(prepared: _Prepared, folder: RunFolder, quiet: bool, judge: Judge | None) -> Record:
    """Trains from the last checkpoint, scores, and completes the record; or ends as soon as `judge` says so."""
    recipe, record, rows = prepared.recipe, prepared.record, prepared.rows
    before, started = record.time, record.time.started or _now()
    training_began = time.monotonic()

    def note_cost() -> None:
        now = time.monotonic()
        record.time = Time(
            wall_s=(before.wall_s or 0.0) + now - prepared.began,
            train_s=(before.train_s or 0.0) + now - training_began,
            started=started,
            finished=None,
        )
        record.memory = Memory(peak_mb=max(peak_memory_mb(), record.memory.peak_mb or 0.0))
        folder.write(record)

    note_cost()
    pruning = [PruningCallback(prepared.task.metric, judge)] if judge else []
    with one_track(folder, prepared.arguments) as tracking:
        trainer = RunTrainer(
            prepared.task,
            quiet,
            model=prepared.model,
            args=prepared.arguments,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            callbacks=[FolderCallback(folder, recipe, note_cost), *tracking, *pruning],
            **prepared.balancing,
        )
        try:
            state = _train(trainer, recipe, folder)
        except PrunedError as end:
            record.state, record.reason = "pruned", str(end)
            note_cost()
            return record
    note_cost()
    train_s = record.time.train_s

    folder.save_adapter(folder.checkpoints / f"checkpoint-{state.best_global_step}", prepared.model.name_or_path)
    distributed.wait()
    best = next(e for e in folder.events() if e.event == "validation" and e.step == state.best_global_step)
    micro_batches = state.global_step * recipe.train.gradient_accumulation
    share = _first_batch(prepared.task, rows["train"], prepared.arguments.per_device_train_batch_size)
    step_flops = training_flops(prepared.model, share) * distributed.process_count()
    record.flops = Flops(train_step=step_flops, train_total=step_flops * micro_batches)
    record.metrics = Metrics(validation=best.scores | {"best_epoch": math.ceil(round(best.epoch, 6))})
    if recipe.purpose == "result":
        base, _ = open_base(recipe, record)
        test, eval_flops, scored, predicted = _score(prepared.task, base, rows["test"], folder, record, quiet)
        if prepared.task.predicts_rows and predicted is not None:
            names = [str(name) for name in record.dataset.classes]
            record.by_class = by_class(*predicted, names) if names else None
            folder.save_predictions(predictions_csv(*predicted, names))
        record.metrics.test, record.flops.eval_batch = test, eval_flops
        trained = {name for name, p in prepared.model.named_parameters() if p.requires_grad}
        record.parameters.inference = METHODS[recipe.method].inference_parameters(scored, trained)
        folder.append(Event.model_validate({"event": "test", "step": state.global_step, "epoch": state.epoch, **test}))
    write_card(folder, record)
    note_cost()
    record.time.train_s, record.time.finished = train_s, _now()
    record.state = "complete"
    folder.write(record)
    return record


def _train(trainer: RunTrainer, recipe: Recipe, folder: RunFolder) -> TrainerState:
    """Trains to the end, from the last complete checkpoint if there is one; returns the Trainer's final state."""
    with distributed.main_first():
        folder.drop_unfinished_checkpoints()
        last = folder.last_checkpoint()
        if (
            last is not None
            and not METHODS[recipe.method].resumable
            and not is_training_over(checkpoint_state(last), recipe)
        ):
            shutil.rmtree(folder.checkpoints)
            last = None
        folder.rewind(checkpoint_step(last) if last else 0)
    if last is None or not is_training_over(checkpoint_state(last), recipe):
        if not distributed.is_main():
            set_seed(recipe.seed, device_specific=True)  # different noise and augmentation
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        distributed.wait()
    return checkpoint_state(folder.last_checkpoint())


def _score(
    task: Task, base: PreTrainedModel, rows: Any, folder: RunFolder, record: Record, quiet: bool
) -> tuple[dict[str, float], int, nn.Module, tuple[np.ndarray, np.ndarray] | None]:
    """Scores on the test split's `rows` of `base` with what `adapter/` holds, the cost of a batch, and that model.

    The main process gets the task's outputs and the labels, too.
    """
    recipe = task.recipe
    model = with_adapter(base, folder.adapter, recipe.train.cache_frozen)
    with scoring_trainer(model, recipe, quiet) as trainer:
        if recipe.train.cache_frozen:
            rows = use_cached_states(model, {"test": rows}, task, record, trainer.args.device, quiet)["test"]
        scores = trainer.score(rows, "test")
    return scores, inference_flops(model, _first_batch(task, rows, recipe.train.batch_size)), model, trainer.scored


def _first_batch(task: Task, rows: Any, size: int) -> dict[str, Any]:
    return collate(task, [rows[i] for i in range(min(size, len(rows)))])


def with_adapter(base: PreTrainedModel, adapter: Path, is_trainable: bool = False) -> nn.Module:
    """`base` with what a run has trained: its adapter, or every parameter.

    Raises:
        UserError: nothing in the folder `adapter` that can be loaded.
    """
    if (adapter / "adapter_config.json").exists():
        return load_adapter(base, adapter, is_trainable)
    with loading(str(adapter), "as the model that was trained"):
        load_whole_model(base, adapter)
    return base


def _describe_splits(splits: Splits, recipe: Recipe, note: str | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "protocol": recipe.data.protocol,
        "splits": splits.sizes,
        "classes": splits.classes,
        "validation_from": splits.validation_from,
        "test_from": splits.test_from,
    }
    if recipe.data.group_column is not None:
        described |= {
            "groups": {name: group_counts(rows) for name, rows in splits.by_name.items()},
            "average": recipe.data.average,
            "note": note,
        }
    return described


def _model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the pretrained parameters and buffers, without the head's."""
    heads = tuple(f"{head}." for head in head_modules(model))
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(heads):
            contents = tensor.cpu().flatten().view(torch.uint8)  # numpy does not support every dtype
            total.update(repr((name, tuple(tensor.shape))).encode() + contents.numpy().tobytes())
    return total.hexdigest()


def _changed_since(what: str, name: str, known: SourceRecord) -> str:
    return f"{what} {name}: not what the run was started with ({known.name}, other contents)"


def _accept_changed_data(
    known: DatasetRecord, found: DatasetRecord, folder: RunFolder, recipe: Recipe, accept_changed_data: bool
) -> DatasetRecord:
    """The record's entry for data that has changed since a run's training was completed.

    Raises:
        UserError: training is not complete, changed data was not accepted, or its classes differ.
    """
    refusal = _changed_since("dataset", found.name, known)
    if not _is_trained(folder, recipe):
        raise UserError(refusal)
    if not accept_changed_data and found.fingerprint != known.test_fingerprint:
        raise UserError(f"{refusal}; its training is complete: fvae-lora evaluate {folder.path} scores it on this data")
    if found.classes != known.classes:
        raise UserError(f"{refusal}, and other classes")
    print(f"fvae-lora: warning: {refusal}; the record says so", file=sys.stderr)
    return known.model_copy(update={"tested_on": TestedOn(fingerprint=found.fingerprint, splits=found.splits)})


def _note_versions(record: Record, folder: RunFolder) -> None:
    """Says of a run that goes on from a checkpoint which libraries are others than those that it was begun under."""
    now = versions()
    changed = {name: then for name, then in record.versions.items() if now.get(name, then) != then}
    if not changed or folder.last_checkpoint() is None:
        return
    record.earlier_versions = [*record.earlier_versions, changed]
    if distributed.is_main():
        said = ", ".join(f"{name} {then} (now {now[name]})" for name, then in changed.items())
        print(
            f"fvae-lora: warning: {folder.path}: was begun under {said}; what follows may differ from a run under one",
            file=sys.stderr,
        )


def _reason(error: Exception, recipe: Recipe, path: Path) -> str:
    """The error in one line, without paths of this machine."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    elif "inline_container" in text or "PytorchStreamWriter" in text:  # torch.save could not write
        text = f"a checkpoint could not be written; {shutil.disk_usage(path).free / 1e6:.1f} MB are free on its disk"
    line = first_line(text) or type(error).__name__
    return without_paths(line, path, Path(recipe.dataset), Path(recipe.model))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
