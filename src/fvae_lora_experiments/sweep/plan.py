"""The plan of a sweep: which runs, each with its recipe and its folder."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.recipe import flatten, load_recipe, parse_override
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.schema import Recipe

MOST_SEEDS = 1000
"""The longest range of seeds; a longer one is a slip of the pen."""

OPTION_FOR = {"method": "--methods", "seed": "--seeds", "dataset": "--dataset", "purpose": "--grid"}
"""Keys of a recipe that a sweep sets, and the option for each."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep."""

    recipe: Recipe
    folder: RunFolder
    name: str
    """The path of the run's folder, relative to the sweep's."""

    def is_done(self) -> bool:
        """Whether there is a finished run of this recipe, or a point of a grid that diverged and would do so again.

        Raises:
            UserError: the folder holds a run of another recipe, or an incomplete record.
        """
        record = self.folder.read_for(self.recipe)
        if record is None:
            return False
        hopeless = self.recipe.purpose == "selection" and record.diverged
        return record.state == "complete" or hopeless

    def epochs_done(self) -> int:
        """How many of the recipe's epochs are in its learning curve, of which only the end is read."""
        try:
            with self.folder.metrics_file.open("rb") as file:
                file.seek(max(0, self.folder.metrics_file.stat().st_size - 2**16))
                tail = file.read().decode(errors="replace")
        except OSError:
            return 0
        train = self.recipe.train
        key, scale = ("epoch", 1.0) if train.max_steps is None else ("step", train.epochs / train.max_steps)
        logged = re.findall(rf'"{key}": ([0-9.]+)', tail)
        return int(scale * float(logged[-1])) if logged else 0


@dataclass(frozen=True)
class Contender:
    """What is compared: a method on a data set, with one value of each varied key. Its runs differ in their seeds."""

    source: str
    """The recipe's name."""
    overrides: Sequence[str]
    options: Mapping[str, Any]
    """Values of dotted keys, including the method; they win over the overrides."""
    out: Path
    """The sweep's folder."""
    place: str = ""
    """The folder in `out` for one recipe and data set; empty if there is only one."""
    keys: tuple[str, ...] = ()
    """The varied keys."""

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe, complete except for the seed and the purpose."""
        return load_recipe(self.source, self.overrides, self.options)

    @property
    def values(self) -> dict[str, Any]:
        """The varied keys and their values."""
        flat = flatten(self.recipe.model_dump())
        return {key: flat[key] for key in self.keys}

    @property
    def name(self) -> str:
        """Its place, method and settings: `dtd/lora-learning_rate=0.01`."""
        settings = [f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items()]
        return "/".join(filter(None, (self.place, _as_file_name("-".join((self.recipe.method, *settings))))))

    def with_values(self, point: Mapping[str, Any]) -> "Contender":
        """This contender with the values in `point`.

        Raises:
            UserError: an unknown key, or a bad value.
        """
        moved = replace(self, options={**self.options, **point}, keys=(*self.keys, *point))
        if sections := point.keys() - flatten(moved.recipe.model_dump()).keys():
            raise UserError(f"recipe {self.source}: {sections.pop()}: expected one of the keys below it")
        return moved

    def run(self, seed: int, purpose: Literal["result", "selection"] = "result") -> PlannedRun:
        """Its run with that seed; points of a grid (`selection`) have a separate folder.

        Raises:
            UserError: it is not a valid seed.
        """
        recipe = load_recipe(self.source, self.overrides, {**self.options, "seed": seed, "purpose": purpose})
        parent, _, own = f"{self.name}-seed{recipe.seed}".rpartition("/")
        name = "/".join(filter(None, (parent, "selection" if purpose == "selection" else "", own)))
        return PlannedRun(recipe, RunFolder(self.out / name), name)


def contenders(
    recipe: str,
    out: Path,
    methods: Sequence[str],
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    variations: Mapping[str, Sequence[Any]] | None = None,
) -> list[Contender]:
    """Every combination of a recipe, a data set, a value of each varied key and a method.

    Args:
        recipe: a recipe, or several separated by commas. If there are several recipes or data sets, each has a folder.
        out: the sweep's folder.
        methods: names of methods.
        overrides: `key=value` strings for all.
        options: dotted keys for all; `dataset` may be several, separated by commas.
        variations: values of each varied key.

    Raises:
        UserError: an unknown key, a bad value.
    """
    for key, _ in map(parse_override, overrides):
        if key in ("method", "seed", "purpose"):
            raise UserError(f"{key}: set by the comparison; use {OPTION_FOR[key]}")
    options = dict(options or {})
    recipes, datasets = _several(recipe), _several(options.pop("dataset", None))
    found = []
    for source, dataset in itertools.product(recipes, datasets):
        named = [Path(name).stem for name, all_names in ((source, recipes), (dataset, datasets)) if len(all_names) > 1]
        place = _as_file_name("-".join(named))
        given = options if dataset is None else options | {"dataset": dataset}
        bases = [Contender(source, overrides, given | {"method": method}, out, place) for method in methods]
        found += [base.with_values(point) for point in combinations(variations or {}) for base in bases]
    return found


def runs_of(
    contenders: Iterable[Contender], seeds: Sequence[int], purpose: Literal["result", "selection"] = "result"
) -> list[PlannedRun]:
    """A run of each contender with each seed, all of the first seed first.

    Raises:
        UserError: a seed is not valid, or a run would be there twice.
    """
    runs: dict[str, PlannedRun] = {}
    for seed, contender in itertools.product(seeds, list(contenders)):
        run = contender.run(seed, purpose)
        if run.name in runs:
            raise UserError(f"compare: {run.name} is requested twice")
        runs[run.name] = run
    return list(runs.values())


def combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a value of each key, the last key's values changing fastest."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _as_file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)


def _several(text: str | None) -> list[Any]:
    """`a,b` as a list, unless a file or folder has exactly that name."""
    return [text] if text is None or Path(text).exists() else text.split(",")


def parse_list(option: str, text: str) -> list[Any]:
    """`1,2,42` as a list of YAML values.

    Raises:
        UserError: there is nothing between two commas.
    """
    values = [yaml.safe_load(part) for part in text.split(",")]
    if None in values:
        raise UserError(f"{option}: expected values separated by commas, got {text!r}")
    return values


def parse_seeds(option: str, text: str) -> list[Any]:
    """`1-3,42` as [1, 2, 3, 42].

    Raises:
        UserError: nothing between two commas; a range that is empty or too long.
    """
    seeds: list[Any] = []
    for part in parse_list(option, text):
        ends = re.fullmatch(r"(\d+)-(\d+)", str(part))
        first, last = map(int, ends.groups()) if ends else (0, 0)
        if not 0 <= last - first < MOST_SEEDS:
            raise UserError(f"{option}: {part}: expected a range of 1 to {MOST_SEEDS} seeds, for example 1-5")
        seeds += range(first, last + 1) if ends else [part]
    return seeds


def parse_values(option: str, texts: Sequence[str]) -> dict[str, list[Any]]:
    """Texts such as `train.learning_rate=1e-3,1e-2` or `train.learning_rate=[1e-3,1e-2]` as a dict.

    Values that are lists need the second form: `fvae.encoder_hidden_dims=[[], [128]]`.

    Raises:
        UserError: no values, a key twice, a key that has an option of its own.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, values = parse_override(text)
        if key in OPTION_FOR:
            raise UserError(f"{option} {key}: cannot be varied here; use {OPTION_FOR[key]}")
        if key in found:
            raise UserError(f"{option} {key}: given twice; expected all its values in one, for example {key}=1,2")
        found[key] = values if isinstance(values, list) else parse_list(f"{option} {key}", text.partition("=")[2])
        if not found[key]:
            raise UserError(f"{option} {key}: expected values, for example {key}=1,2; [[]] is an empty list as a value")
    return found
