"""Which record is repeated, and whether it can be; read before anything heavy is imported."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fvae_lora_experiments.errors import UserError, did_you_mean
from fvae_lora_experiments.recipe import check_recipe
from fvae_lora_experiments.run.archive import StoredRun, is_run_name, read_runs, runs_beside
from fvae_lora_experiments.run.environment import MISSING, versions
from fvae_lora_experiments.run.finished import recorded_recipe
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record, printable
from fvae_lora_experiments.schema import Recipe

DEFAULT_OUT = Path("runs/reproduced")
NAMED = 3
"""How many of a study's runs a message names."""


@dataclass(frozen=True)
class Recorded:
    """A finished run that is to be repeated."""

    source: str
    """As it was asked for: its folder, or STUDY:RUN."""
    run: StoredRun
    record: Record
    recipe: Recipe
    """Its own, with model and data where they are now, and without trackers."""
    folder: Path
    """Its folder; of a packed run the one that it would be unpacked to."""
    others: Sequence[StoredRun]
    """The other runs of its study or folder."""


def find_recorded(source: str, model: str | None = None, dataset: str | None = None) -> Recorded:
    """The run that `source` names.

    Args:
        source: a run's folder; or STUDY:RUN, a folder or file of runs and the name of one of them.
        model: where the base model is, if not where the record says.
        dataset: where the data are, if not where the record says.

    Raises:
        UserError: no such run, one that is not finished or that no single run repeats; this installation lacks a
            package or a key of it; its model or its data have moved.
    """
    run, others, folder = _find(source)
    record = run.record
    if record is None:
        raise UserError(f"{source}: {run.error}")
    if record.state != "complete":
        raise UserError(f"{source}: no finished run, so there is nothing to compare with; its state is {record.state}")
    if record.score is None:
        raise UserError(f"{source}: its record has no {record.metric.name} to compare with")
    if record.extended_from or record.dataset.tested_on:
        why = "went on after it was finished" if record.extended_from else "was tested on data that had changed"
        raise UserError(f"{source}: {why}, which no single run repeats")
    now = versions(record.versions)
    if gone := [f"{name} {then}" for name, then in record.versions.items() if then != now[name] == MISSING]:
        raise UserError(f"{source}: was made with {printable(', '.join(gone))}, not installed here; nothing was run")
    try:
        check_recipe(record.recipe, source)
    except UserError as error:
        then = printable(record.versions.get("fvae-lora", "of an unknown version"))
        raise UserError(f"{error}; recorded with fvae-lora {then}, and this is {now['fvae-lora']}") from error
    recipe = recorded_recipe(record, folder, model, dataset)
    plain = recipe.train.model_copy(update={"report_to": [], "keep_checkpoints": False})
    return Recorded(source, run, record, recipe.model_copy(update={"train": plain}), folder, others)


def choose_folder(recorded: Recorded, out: Path | None) -> Path:
    """The folder of the repeated run: new, or one in which it was begun.

    Args:
        recorded: the run to repeat.
        out: the folder; None for the default, by the run's name.

    Raises:
        UserError: it holds something else. Nothing was changed.
    """
    folder = out or DEFAULT_OUT / recorded.run.name
    if folder.resolve() == recorded.folder.resolve():
        raise UserError(f"{folder}: the record itself; --out names another folder for the run that is compared with it")
    begun = RunFolder(folder).read_for(recorded.recipe)
    if begun is None:
        if folder.exists() and any(file.name != ".lock" for file in folder.iterdir()):
            raise UserError(f"{folder}: not empty, and not a run; --out names another folder; nothing was changed")
        return folder
    if begun.extended_from:
        raise UserError(
            f"{folder}: holds a finished run of fewer epochs; --out names another folder; nothing was changed"
        )
    for then, there in ((recorded.record.model, begun.model), (recorded.record.dataset, begun.dataset)):
        if there.fingerprint not in ("", then.fingerprint):  # empty until they are opened
            raise UserError(
                f"{folder}: holds a run with {there.name} of other contents than the record's {then.name}; "
                "--out names another folder; nothing was changed"
            )
    return folder


def _find(source: str) -> tuple[StoredRun, list[StoredRun], Path]:
    """The run, the other runs of its study or folder, and the run's folder."""
    study, _, name = source.rpartition(":")
    if study and not Path(source).exists():
        if not is_run_name(name):
            raise UserError(f"{study}: {printable(name)}: not the name of a run")
        place = Path(study)
        runs, folder = read_runs(place), (place.parent if place.is_file() else place) / name
        where = f"{study}: no run of the name {printable(name)}"
    else:
        folder = Path(source)
        if not RunFolder(folder).record_file.is_file():
            raise UserError(
                f"{source}: not a run (a folder with a run.json); a run of a study is STUDY:RUN, such as "
                "studies/demo:lora-seed1"
            )
        runs, name, where = runs_beside(folder), printable(folder.resolve().name), source
    own = [run for run in runs if run.name == name]
    if len(own) != 1:
        names = [run.name for run in runs]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise UserError(f"{where}; it has {', '.join(names[:NAMED])}{more}{did_you_mean(name, names)}")
    return own[0], [run for run in runs if run is not own[0]], folder
