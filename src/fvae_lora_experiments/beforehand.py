"""Mistakes in a request that are found before torch is imported, so that a misspelt folder is reported at once."""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvae_lora_experiments.errors import NoSuchDataError, UserError
from fvae_lora_experiments.places import DATASETS, is_local
from fvae_lora_experiments.process import silence_datasets
from fvae_lora_experiments.schema import Recipe

if TYPE_CHECKING:
    from fvae_lora_experiments.sweep.plan import PlannedRun

OPENED_BY: dict[str, tuple[str, Callable[[Any, Recipe], Any]]] = {
    "image": ("images", lambda data, recipe: data.open_images(recipe.dataset, recipe.data)),
    "text": ("texts", lambda data, recipe: data.open_texts(recipe.dataset, recipe.data, recipe.text)),
    "commonsense": (
        "questions",
        lambda data, recipe: data.open_questions(recipe.dataset, recipe.data.config, recipe.commonsense.test_sets),
    ),
    "phonemes": ("timit", lambda data, recipe: data.open_timit(recipe.dataset)),
    "transcription": ("recordings", lambda data, recipe: data.open_recordings(recipe.dataset, recipe.data)),
}
"""For each task the module of `data` that opens its data sets, and how to call it."""


def refuse_at_once(recipe: Recipe) -> None:
    """Checks that the folders named in a recipe exist, and opens its data if they are local.

    Raises:
        UserError: the error that the run itself would raise.
    """
    if is_local(recipe.dataset) and not Path(recipe.dataset).exists():
        raise NoSuchDataError(f"dataset {recipe.dataset}: no such file or folder")
    if is_local(recipe.model) and not Path(recipe.model).is_dir():
        raise UserError(f"model {recipe.model}: no such folder")
    if is_local(recipe.dataset) and recipe.dataset not in DATASETS:
        silence_datasets()
        module, opened = OPENED_BY[recipe.task]
        opened(importlib.import_module(f"fvae_lora_experiments.data.{module}"), recipe)


def refuse_if_none_can_run(runs: Iterable["PlannedRun"]) -> None:
    """Refuses a comparison if each of its runs would be refused; otherwise those fail when their turn comes.

    Raises:
        UserError: the error of the first run.
    """
    refused: dict[str, UserError] = {}
    for run in runs:
        if run.is_done():
            return
        key = run.recipe.model_dump_json(include={"task", "model", "dataset", "data", "text", "commonsense"})
        if key in refused:
            continue
        try:
            refuse_at_once(run.recipe)
        except UserError as error:
            refused[key] = UserError(f"{run.name}: {error}")
        else:
            return
    for first in refused.values():
        raise first
