"""The summary of the data before training: what `check` prints, and what a comparison begins with."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from datasets import Image

from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.images import BUILT_IN, IMAGE_COLUMNS
from fvae_lora_experiments.data.source import local_path, official_splits
from fvae_lora_experiments.data.summary import Summary, summarise
from fvae_lora_experiments.data.tables import read_tables
from fvae_lora_experiments.errors import NoSuchDataError, UserError
from fvae_lora_experiments.published import how_to_get
from fvae_lora_experiments.schema import DataSettings, Recipe
from fvae_lora_experiments.sweep.plan import PlannedRun

DEFAULT_RECIPES = {
    "image": "image/default",
    "text": "text/default",
    "commonsense": "commonsense/default",
    "phonemes": "speech/timit",
    "transcription": "speech/whisper",
}
"""The recipe for each task with which a data set is checked by itself."""


def inspect_data(recipe: Recipe, with_model: bool = True) -> Summary:
    """What training with `recipe` would see of its data.

    Args:
        recipe: names the data set.
        with_model: whether it also names the model, whose tokenizer determines which rows are truncated.

    Raises:
        UserError: training would refuse the data.
    """
    from fvae_lora_experiments.tasks import load_task

    task, notes = load_task(recipe), Notes()
    official = task.open_source(notes)
    summary = summarise(task, official, task.identify(official), notes)
    return replace(summary, cut=task.truncated(task.split(official)) if with_model else {})


def inspect_each(runs: Iterable[PlannedRun], seen: set[str], strictly: bool = False) -> Iterator[Summary]:
    """A summary of each data set of the runs that are not done, except for those in `seen` and those that are refused.

    The runs report the refused ones themselves.

    Raises:
        UserError: one is refused, and `strictly` is set; says where to get a data set that is not there.
    """
    for run in runs:
        kept = run.recipe.model_dump_json(include={"task", "dataset", "data"})
        if kept in seen or run.is_done():
            continue
        seen.add(kept)
        try:
            yield inspect_data(run.recipe)
        except NoSuchDataError as error:
            if strictly:
                raise UserError(f"{error}; {how_to_get(run.recipe)}") from error
        except UserError:
            if strictly:
                raise


def guess_task(data: str) -> str:
    """The task that a data set is for, judging by its columns; images if it has none.

    Raises:
        UserError: there is no such data set.
    """
    if data in BUILT_IN:
        return "image"
    place = local_path(data, None)
    if Path(data).is_dir() and {"TRAIN", "TEST"} <= {p.name.upper() for p in Path(data).iterdir()}:
        sounds = (file for file in Path(data).glob("*/*/*/*") if file.suffix.lower() == ".phn")
        if next(sounds, None):
            return "phonemes"
    try:
        features = official_splits(data, DataSettings(), read_tables, Notes())["train"].features
    except UserError:
        if place is None:
            raise
        return "image"
    if {"audio", "text"} <= features.keys():
        return "transcription"
    if {"choices", "instruction"} & features.keys():
        return "commonsense"
    images = any(isinstance(feature, Image) for feature in features.values()) or features.keys() & set(IMAGE_COLUMNS)
    return "image" if images else "text"
