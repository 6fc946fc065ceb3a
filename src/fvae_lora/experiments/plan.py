"""The plan of a sweep: which runs, each with its recipe and its folder."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.recipe import Recipe, load_recipe, parse_override
from fvae_lora.experiments.record import RunFolder


@dataclass(frozen=True)
class Planned:
    """A run of a sweep."""

    recipe: Recipe
    folder: RunFolder

    @property
    def name(self) -> str:
        """The run's name inside its sweep."""
        return self.folder.path.name

    def is_done(self) -> bool:
        """Whether a finished run of this recipe is there.

        Raises:
            UserError: the folder holds another recipe's run, or no whole record.
        """
        record = self.folder.read_for(self.recipe)
        return record is not None and record["state"] == "complete"

    def epochs_done(self) -> int:
        """How many epochs its learning curve, read from its end, tells of."""
        try:
            with self.folder.metrics_file.open("rb") as file:
                file.seek(max(0, self.folder.metrics_file.stat().st_size - 2**16))
                tail = file.read().decode(errors="replace")
        except OSError:
            return 0
        epochs = re.findall(r'"epoch": ([0-9.]+)', tail)
        return int(float(epochs[-1])) if epochs else 0


def plan(
    recipe: str,
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    variations: Mapping[str, Sequence[Any]] | None = None,
) -> list[Planned]:
    """Every combination of a method, a seed and a value of each varied key; `overrides` and `options` hold for all.

    Raises:
        UserError: an unknown key, a bad value, the same combination twice.
    """
    runs = {}
    keys = list(variations or {})
    for seed, values in itertools.product(seeds, itertools.product(*(variations or {}).values())):
        varied = dict(zip(keys, values, strict=True))
        for method in methods:
            asked = dict(options or {}) | varied | {"method": method, "seed": seed}
            settings = "".join(f"-{key.rpartition('.')[2]}={value}" for key, value in varied.items())
            name = re.sub(r"[^\w.=+-]+", "_", f"{method}{settings}-seed{seed}")
            if name in runs:
                raise UserError(f"compare: {name} is asked for twice")
            runs[name] = Planned(load_recipe(recipe, overrides, asked), RunFolder(out / name))
    return list(runs.values())


def parse_list(option: str, text: str) -> list[Any]:
    """`1,2,42` as a list of YAML values.

    Raises:
        UserError: nothing between two commas.
    """
    values = [yaml.safe_load(part) for part in text.split(",")]
    if None in values:
        raise UserError(f"{option}: expected values separated by commas, got {text!r}")
    return values


def parse_variations(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`train.learning_rate=[1e-3,1e-2]`, several times, as a dict.

    Raises:
        UserError: not a list.
    """
    variations = dict(parse_override(text) for text in texts)
    for key, values in variations.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"--vary {key}: expected a list, for example {key}=[1,2]")
    return variations
