"""The data sets and models of the shipped studies as they are published: sizes and configurations, and where they are.

From these a study's cost can be told without its data, without weights and without a network (`stand_ins`).
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.places import DATA_ROOT, short_name
from fvae_lora_experiments.recipe import load_yaml
from fvae_lora_experiments.schema import Count, Recipe, Section

ASSETS = Path(str(files("fvae_lora_experiments"))) / "assets"
DATASETS_FILE = ASSETS / "datasets.yaml"
CONFIGURATIONS = ASSETS / "configurations"
"""For each model a folder of its name, with its configuration and without weights."""


class PublishedData(Section):
    """A data set as it is published."""

    rows: dict[Literal["train", "validation", "test"], Count] = Field(min_length=1)
    """Rows of each official split whose labels are known."""
    classes: Count | None = None
    """Number of classes; None for numbers, and for text that is generated."""
    length: Count | None = None
    """The assumed length of a batch's longest input, in tokens or samples; None if the recipe determines it."""
    get: str | None = None
    """Where to get it, and what its folder holds; None if it is on the hub by its name."""


@cache
def published_data() -> dict[str, PublishedData]:
    """The data sets by their names, followed by the configuration where they have several."""
    content = load_yaml(DATASETS_FILE.read_text(encoding="utf-8"))
    return {name: PublishedData.model_validate(entry) for name, entry in content.items()}


def data_of(recipe: Recipe) -> PublishedData:
    """The published data set that a recipe names.

    Raises:
        UserError: it is none of these.
    """
    if (name := _name_of(recipe)) not in published_data():
        raise UserError(f"dataset {name}: its published size does not come with the package")
    return published_data()[name]


def _name_of(recipe: Recipe) -> str:
    return "/".join(filter(None, (short_name(recipe.dataset), recipe.data.config)))


def configuration_of(model: str) -> Path | None:
    """The folder with the configuration of a model, if it is one of these."""
    folder = CONFIGURATIONS / model
    return folder if (folder / "config.json").is_file() else None


def how_to_get(recipe: Recipe) -> str:
    """Where a recipe's data set can be had, and where it is looked for, in words."""
    name, known = short_name(recipe.dataset), published_data().get(_name_of(recipe))
    if known is None or known.get is None:
        return f"{name} is fetched from the hub; a copy is looked for as DIR/{name} (--data-root DIR, or {DATA_ROOT})"
    return f"{name} is looked for as DIR/{name} (--data-root DIR, or {DATA_ROOT}): {known.get}"
