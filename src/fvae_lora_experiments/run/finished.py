"""What a run's record says that it was, read before anything heavy is imported."""

import os
from pathlib import Path

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.places import is_local, resolve_portable
from fvae_lora_experiments.recipe import check_recipe
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.schema import Recipe


def read_finished_run(
    path: Path, model: str | None = None, dataset: str | None = None, with_data: bool = True
) -> tuple[Recipe, Record]:
    """A finished run's recipe and record.

    Args:
        path: the run's folder.
        model: where the base model is, if not where the record says.
        dataset: where the data are, if not where the record says.
        with_data: whether the run's data are needed, too.

    Raises:
        UserError: no finished run there; its model or its data have moved.
    """
    record = _complete(path)
    return recorded_recipe(record, path, model, dataset, with_data), record


def _complete(path: Path) -> Record:
    record = read_record(path)
    if record.state != "complete":
        raise UserError(f"{path}: no finished run; its state is {record.state}")
    return record


def read_record(path: Path) -> Record:
    """The record of the run in the folder `path`, whatever its state.

    Raises:
        UserError: no run there, or no whole record.
    """
    record = RunFolder(path).read()
    if record is None:
        raise UserError(f"{path}: no finished run")
    return record


def recorded_recipe(
    record: Record, path: Path, model: str | None, dataset: str | None, with_data: bool = True
) -> Recipe:
    """A run's recipe, its model and data where they are given or where the record says.

    Raises:
        UserError: they are no longer there; nobody asks for data if not `with_data`.
    """
    places = {}
    for key, given in (("model", model), ("dataset", dataset)):
        places[key] = given or resolve_portable(record.recipe[key], path)
        needed = given is None and (with_data or key == "model")
        if needed and is_local(record.recipe[key]) and not Path(places[key]).exists():
            where = os.path.normpath(places[key])
            raise UserError(f"{key} {where}: no such file or folder any more; --{key} says where it is now")
    return check_recipe(record.recipe | places, str(RunFolder(path).record_file))


def is_complete(path: Path, recipe: Recipe) -> bool:
    """Whether the folder holds the finished run of a recipe, of which neither model nor data are needed any more.

    Raises:
        UserError: it holds another recipe's run, or no whole record.
    """
    record = RunFolder(path).read_for(recipe)
    return record is not None and record.state == "complete"


def usable_run(path: Path, model: str | None = None) -> tuple[Recipe, Record]:
    """The recipe and the record of a finished run whose adapter is there, to be used on other data than its own.

    Raises:
        UserError: no such run, a point of a grid, or no folder of its base model.
    """
    record = _complete(path)
    if record.is_selection:
        raise UserError(f"{path}: a point of a grid, which only chooses settings; give a run of the results")
    if not RunFolder(path).adapter.is_dir():
        raise UserError(f"{path}: its adapter is not there")
    recipe = recorded_recipe(record, path, model, None, with_data=False)
    if is_local(recipe.model) and not Path(recipe.model).is_dir():
        raise UserError(f"model {recipe.model}: no such folder; --model says where it is")
    return recipe, record
