"""A search's folder: what is searched there, its journal, its trials, and what is shared between its workers.

`study.json` says what is searched, `journal.log` is Optuna's journal of the trials, `trial-0007/` a trial's run. Any
number of processes may work there at the same time, and each may be killed at any moment: a trial belongs to the
process that holds its lock, which the system releases however that process ends; then another one goes on with it.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.places import portable_path, short_name
from fvae_lora_experiments.recipe import check_recipe, flatten
from fvae_lora_experiments.run.folder import RunFolder, write_atomically
from fvae_lora_experiments.schema import WITHOUT_EFFECT, Recipe
from fvae_lora_experiments.tune.space import Knob, Space

if TYPE_CHECKING:
    import optuna

NAME = "tune"
"""The study's name in its journal, which holds no other."""

REASON = "reason"
"""The attribute of a trial that says why it has no score."""

METRIC, DATA = "metric", "data"
"""The attributes of a study: the score's name; the fingerprints of model and data."""


@dataclass(frozen=True)
class Plan:
    """What is searched: a method's recipe, its knobs, and the seed of the trials and of the sampler."""

    recipe: Recipe
    space: Space
    seed: int

    def trial_recipe(self, values: dict[str, Any]) -> Recipe:
        """The recipe of a trial."""
        return with_values(self.recipe, values | {"seed": self.seed, "purpose": "selection"})


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """A recipe with the values of some dotted keys.

    Raises:
        UserError: a value that its key cannot have.
    """
    tree = recipe.model_dump()
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = value
    return check_recipe(tree, "recipe")


class StudyFolder:
    """The folder of the search for one method's settings."""

    def __init__(self, path: Path):
        self.path = path
        self.plan_file = path / "study.json"
        self.journal = path / "journal.log"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other workers from beginning a trial.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()

    def claim(self, number: int) -> FileLock | None:
        """The lock of a trial, by Optuna's number, held; None if another process has it."""
        folder = self.path / ".claims"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{number + 1:04}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return lock

    def run(self, number: int) -> RunFolder:
        """The folder of a trial's run."""
        return RunFolder(self.path / f"trial-{number + 1:04}")

    def write_plan(self, plan: Plan) -> None:
        """Writes down what is searched."""
        places = {key: portable_path(getattr(plan.recipe, key), self.path) for key in ("model", "dataset")}
        knobs = {key: asdict(knob) for key, knob in plan.space.items()}
        contents = {"recipe": plan.recipe.model_dump() | places, "knobs": knobs, "seed": plan.seed}
        write_atomically(self.plan_file, json.dumps(contents, indent=1) + "\n")

    def read_plan(self) -> Plan:
        """What is searched here.

        Raises:
            UserError: the file is not readable.
        """
        try:
            contents = json.loads(self.plan_file.read_bytes())
            recipe = check_recipe(contents["recipe"], str(self.plan_file))
            return Plan(recipe, {key: Knob(**knob) for key, knob in contents["knobs"].items()}, int(contents["seed"]))
        except OSError as error:
            raise UserError(f"{self.plan_file}: {error.strerror}; nothing was changed") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.plan_file}: not the plan of a search; nothing was changed") from error

    def refuse_others(self, plan: Plan, recipe_only: bool = False) -> None:
        """Checks that a plan is the one of this folder; paths of model and data may be others, not their names.

        Args:
            plan: what is to be searched.
            recipe_only: the knobs and the seed may be others.

        Raises:
            UserError: it is not; the message names the first difference.
        """
        there = self.read_plan()
        holds = f"{self.path}: holds the search of another recipe"
        earlier, here = (flatten(each.recipe.model_dump()) for each in (there, plan))
        for key in sorted(earlier.keys() - {*WITHOUT_EFFECT, "seed"}):
            named = key in ("model", "dataset")
            old, new = ((short_name(known[key]) if named else known[key]) for known in (earlier, here))
            if old != new:
                raise UserError(f"{holds}, {key} is {old} there and {new} here; nothing was changed")
        if recipe_only:
            return
        if there.seed != plan.seed:
            raise UserError(
                f"{self.path}: holds a search with the seed {there.seed}, not {plan.seed}; nothing was changed"
            )
        for key in sorted(there.space.keys() | plan.space.keys()):
            old, new = there.space.get(key, "fixed"), plan.space.get(key, "fixed")
            if old != new:
                raise UserError(
                    f"{self.path}: holds a search of other knobs, {key} is {old} there and {new} here; "
                    "nothing was changed"
                )


def searches_in(out: Path) -> list[StudyFolder]:
    """The folders of searches below `out`, in the order of their methods."""
    return [folder for method in METHODS if (folder := StudyFolder(out / method)).plan_file.exists()]


class Journal:
    """Optuna's study of a folder.

    Args:
        folder: the search's.
        greater_is_better: of a study that is made; None opens the one that is there.
        sampler: chooses points.
        pruner: ends trials.

    Raises:
        UserError: the journal is not one of Optuna's.
    """

    def __init__(
        self,
        folder: StudyFolder,
        greater_is_better: bool | None = None,
        sampler: "optuna.samplers.BaseSampler | None" = None,
        pruner: "optuna.pruners.BasePruner | None" = None,
    ):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        file = folder.journal
        lock: Any = _JournalLock(file)
        try:
            self.storage = JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
            if greater_is_better is not None:
                direction: Literal["maximize", "minimize"] = "maximize" if greater_is_better else "minimize"
                optuna.create_study(storage=self.storage, study_name=NAME, direction=direction)
            self.study = optuna.load_study(storage=self.storage, study_name=NAME, sampler=sampler, pruner=pruner)
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{file}: not the journal of a search; nothing was changed") from error

    @cached_property
    def study_id(self) -> int:
        """The study's number in its storage."""
        return self.storage.get_study_id_from_name(NAME)

    def begun(self) -> "list[optuna.trial.FrozenTrial]":
        """The trials that were begun."""
        from optuna.trial import TrialState

        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]

    def trial(self, number: int) -> "optuna.Trial":
        """A trial that was begun, to go on with."""
        import optuna

        return optuna.Trial(self.study, self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number))


class _JournalLock:
    """A lock that ends with its process, however it ends, and removes the line that such an end has cut off."""

    def __init__(self, journal: Path):
        self.journal, self.lock = journal, FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        """Waits for the lock."""
        self.lock.acquire()
        with self.journal.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            tail = file.read()
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Lets others write."""
        self.lock.release()
