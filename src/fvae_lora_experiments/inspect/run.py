"""One inspection from beginning to end: the adapter is loaded, its inputs are read, the files are written."""

from dataclasses import replace
from pathlib import Path

from fvae_lora import ForeignInputDetector
from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.errors import UserError, first_line
from fvae_lora_experiments.inspect.inputs import SplitName, open_inputs, progressing
from fvae_lora_experiments.inspect.inspection import Inspection
from fvae_lora_experiments.inspect.measure import measure
from fvae_lora_experiments.inspect.page import render
from fvae_lora_experiments.inspect.source import Source
from fvae_lora_experiments.models.heads import saved_head_size
from fvae_lora_experiments.models.pretrained import load_adapter
from fvae_lora_experiments.predict.trained import Trained, load_run, on_accelerator
from fvae_lora_experiments.run.folder import RunFolder, write_atomically
from fvae_lora_experiments.tasks import Task, load_task

JSON, PAGE = "inspection.json", "inspection.html"


def inspect(source: Source, split: SplitName, limit: int, out: Path) -> Inspection:
    """Look into an adapter, and write `inspection.json` and `inspection.html` to the folder `out`.

    Raises:
        UserError: model, adapter or data cannot be read, or are not those of the run.
    """
    trained = _load(source)
    inspection = Inspection(source, inputs := open_inputs(source, trained, split, limit), measure(trained, inputs))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / JSON, inspection.as_json())
    write_atomically(out / PAGE, render(inspection))
    return inspection


def fit_detector(source: Source, limit: int) -> Path:
    """Fit a detector of foreign inputs on a run's training and validation inputs, and write it beside the adapter.

    Args:
        source: a run, on its own data wherever they are now.
        limit: rows of each split at most.

    Returns:
        The folder that it is in.

    Raises:
        UserError: as `inspect`; no run, other data, or a task whose model does not read the rows alone.
    """
    trained = _load(source)
    training, held_out = (open_inputs(source, trained, split, limit) for split in ("train", "validation"))
    if not training.own:
        raise UserError(f"--detector: dataset {source.recipe.dataset} is not that of the run, on which it is fitted")
    with trained.task.autocast(trained.device):
        try:
            detector = ForeignInputDetector.fit(
                trained.model,
                progressing(trained, training, "fitting the detector"),
                progressing(trained, held_out, "calibrating the detector"),
            )
        except ValueError as error:
            raise UserError(f"{source.path}: {first_line(error)}") from error
    detector.save(source.adapter)
    return source.adapter


def _load(source: Source) -> Trained:
    """The adapted model: that of a run, or of an adapter alone."""
    if source.record is not None:
        trained = load_run(source.path, source.recipe.model)
        return replace(trained, recipe=source.recipe, task=load_task(source.recipe))
    task = load_task(source.recipe)
    classes = _classes(source, task)
    base, processor = task.load_model(classes)
    record = RunFolder(source.path).initial_record(source.recipe)
    record.dataset.classes = list(classes)
    model = on_accelerator(load_adapter(base, source.adapter).eval(), base)
    return Trained(source.recipe, record, task, model, processor)


def _classes(source: Source, task: Task) -> list[str]:
    """As many classes as the adapter's head has; without one any head will do, unless the data determine it."""
    try:
        size = saved_head_size(source.adapter)
    except ValueError as error:
        raise UserError(first_line(error)) from error
    if size is None and not task.predicts_rows:
        return class_names(task.open_source()["train"])
    return [str(number) for number in range(2 if size is None else size)] if size != 1 else []
