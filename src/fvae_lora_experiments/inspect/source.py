"""Which adapter is looked into, and on which data; read before anything heavy is imported."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.places import is_local
from fvae_lora_experiments.recipe import change_recipe, load_recipe
from fvae_lora_experiments.run.finished import recorded_recipe, usable_run
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.schema import Recipe

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """An adapter of FVAE-LoRA, and a recipe that names its model and the data.

    `record` is that of its run; None where there is only an adapter. `own_data` says that nobody asked for data other
    than the run's. `settings` are the fields of the adapter's configuration.
    """

    path: Path
    adapter: Path
    recipe: Recipe
    record: Record | None
    own_data: bool
    settings: Mapping[str, Any]


def find_source(
    path: Path,
    model: str | None = None,
    dataset: str | None = None,
    task: str | None = None,
    overrides: Sequence[str] = (),
) -> Source:
    """The adapter in a folder.

    Args:
        path: a finished run's folder, or an adapter's.
        model: where the base model is, if not where the run or the adapter says.
        dataset: the data, if not the run's.
        task: of an adapter alone: its task; None is judged by the data.
        overrides: `key=value`, of the recipe by which other data than the run's are read.

    Raises:
        UserError: neither, an adapter of another method, one without a decoder; model or data that are not there.
    """
    if RunFolder(path).record_file.exists():
        if task is not None:
            raise UserError(f"--task {task}: only for an adapter alone; {path} is a run, whose task is known")
        _, record = usable_run(path, model)
        folder = RunFolder(path).adapter
        settings = _settings(path, folder)
        recipe = recorded_recipe(record, path, model, dataset)
        if overrides and dataset is None:
            raise UserError(f"{overrides[0]}: only with --dataset; the run's own data are read as in training")
        return Source(path, folder, change_recipe(recipe, overrides), record, dataset is None, settings)
    settings = _settings(path, path)
    name = model or settings.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path}: does not name its base model; give --model")
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name}: no such folder; --model says where it is")
    if dataset is None:
        raise UserError(f"{path}: only an adapter, which does not name its data; give --dataset")
    from fvae_lora_experiments.check import DEFAULT_RECIPES, guess_task

    if task is not None and task not in DEFAULT_RECIPES:
        raise UserError(f"--task {task}: no such task; allowed are {', '.join(DEFAULT_RECIPES)}")
    chosen = DEFAULT_RECIPES[task or guess_task(dataset)]
    recipe = load_recipe(chosen, overrides, {"model": name, "dataset": dataset, "method": "fvae-lora"})
    return Source(path, path, recipe, None, False, settings)


def refuse_detector(source: Source) -> None:
    """Refuses to fit a detector of foreign inputs where there can be none.

    Raises:
        UserError: only an adapter, or a task whose model does not read the rows alone.
    """
    if source.record is None:
        raise UserError(f"--detector: {source.path} is only an adapter; give the folder of the run that trained it")
    from fvae_lora_experiments.predict.request import refuse_without_detection

    refuse_without_detection(source.recipe, "--detector")


def _settings(path: Path, adapter: Path) -> dict[str, Any]:
    """The fields of an adapter's configuration, which must be one of FVAE-LoRA with a decoder."""
    file = adapter / CONFIG
    if not file.is_file():
        raise UserError(f"{path}: neither a run with an adapter nor an adapter's folder")
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "FVAE_LORA":
        kind = settings.get("peft_type") if isinstance(settings, dict) else None
        raise UserError(f"{path}: an adapter of type {kind}; only FVAE_LORA has autoencoders to look into")
    if settings.get("inference_only"):
        raise UserError(f"{path}: inference_only, without a decoder; give the adapter that it was exported from")
    if settings.get("elbo_weight") == 0:
        raise UserError(f"{path}: made with elbo_weight=0, so it has no autoencoder to look into")
    return settings
