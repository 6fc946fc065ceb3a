"""Studies: what one table of the paper compares, as data. `compare` runs one by its name."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fvae_lora_experiments.errors import UserError, did_you_mean
from fvae_lora_experiments.places import is_local, local_copy
from fvae_lora_experiments.published import how_to_get
from fvae_lora_experiments.recipe import as_yaml, load_yaml, parse_override, shipped_recipes, shipped_studies
from fvae_lora_experiments.schema import Section
from fvae_lora_experiments.sweep.plan import Contender, PlannedRun, contenders

Names = Annotated[list[str], Field(min_length=1)]


class Study(Section):
    """Recipes x methods x seeds."""

    table: str
    """What the paper's table shows."""
    recipes: Names
    """Names of shipped recipes."""
    methods: Names
    """Names of methods."""
    seeds: Annotated[list[int], Field(min_length=1)]
    """The seeds of the results."""
    datasets: dict[str, str] = Field(default_factory=dict)
    """For recipes that name no data set: the name of its folder in that of `--data-root`."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys in which all runs differ from their recipes."""

    def contenders(
        self,
        out: Path,
        methods: Sequence[str],
        overrides: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        variations: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Contender]:
        """As `sweep.plan.contenders` of the study's recipes, each on its own data set.

        A data set that is not there is named as the study names it, see `refuse_missing_data`.

        Raises:
            UserError: an unknown key, a bad value, another data set.
        """
        options = dict(options or {})
        given = [key for key, _ in map(parse_override, overrides)]
        if "dataset" in (*given, *options):
            raise UserError("dataset: a study has its own data sets; --data-root DIR says where their copies are")
        kept = {key: value for key, value in self.changes.items() if key not in given}
        overrides = [*(f"{key}={as_yaml(value)}" for key, value in kept.items()), *overrides]
        found = []
        for recipe in self.recipes:
            where = {"dataset": _place(self.datasets[recipe])} if recipe in self.datasets else {}
            place = Path(recipe).stem if len(self.recipes) > 1 else ""
            own = contenders(recipe, out, methods, overrides, options | where, variations)
            found += [replace(contender, place=place) for contender in own]
        return found

    def refuse_missing_data(self, runs: Sequence[PlannedRun]) -> None:
        """Checks that the data sets which no hub has are there, for runs that are still to do.

        Raises:
            UserError: names each that is missing, where it is looked for, and where to get it.
        """
        needed = {run.recipe.dataset: run.recipe for run in runs if not run.is_done()}
        missing = [name for name in self.datasets.values() if name in needed and not is_local(name)]
        if missing:
            where = "; ".join(how_to_get(needed[name]) for name in missing)
            raise UserError(f"missing data of {len(missing)} of {len(self.recipes)} recipes: {where}")


def _place(dataset: str) -> str:
    copy = local_copy(dataset, None)
    return str(copy) if copy else dataset


def load_study(name: str) -> Study:
    """The shipped study of that name.

    Raises:
        UserError: there is none.
    """
    studies = shipped_studies()
    if name not in studies:
        raise UserError(f"study {name}: no such study; allowed are {', '.join(studies)}{did_you_mean(name, studies)}")
    return Study.model_validate(load_yaml(studies[name]))


def requested_study(request: str) -> Study | None:
    """The study that `compare` is asked for, or None if it is asked for recipes.

    Raises:
        UserError: a study that does not exist, or one beside recipes.
    """
    families = {name.partition("/")[0] for name in shipped_studies()}
    names = request.split(",")
    if not any(
        name.partition("/")[0] in families and name not in shipped_recipes() and not Path(name).exists()
        for name in names
    ):
        return None
    if len(names) > 1:
        raise UserError(f"{request}: a study is compared alone; expected one study, or recipes separated by commas")
    return load_study(request)
