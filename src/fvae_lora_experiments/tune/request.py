"""What a search is asked for, checked before torch is there."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_lora_experiments.beforehand import refuse_at_once
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.recipe import load_recipe, parse_override
from fvae_lora_experiments.sweep.plan import parse_list
from fvae_lora_experiments.tune.space import parse_knobs, refuse_unknown, search_space
from fvae_lora_experiments.tune.study import Plan, searches_in


@dataclass(frozen=True)
class Request:
    """A search of several methods."""

    source: str
    """The recipe's name."""
    overrides: Sequence[str]
    options: Mapping[str, Any]
    plans: Sequence[Plan]
    """What is searched for each method."""
    trials: int
    """How many trials each method has in all."""
    out: Path


def check_request(
    recipe: str,
    overrides: Sequence[str],
    options: Mapping[str, Any],
    methods: str | None,
    trials: int,
    knobs: str | None,
    seed: int,
    out: Path,
) -> Request:
    """What is to be searched; arguments as for the command.

    Raises:
        UserError: Optuna is not installed, something is wrong with an argument, a recipe or the data, or `out` holds
            another search.
    """
    if importlib.util.find_spec("optuna") is None:
        raise UserError("tune: Optuna is not installed; pip install 'fvae-lora[experiments,tune]'")
    given = [key for key, _ in map(parse_override, overrides)]
    for key, option in (("method", "--methods"), ("seed", "--seed"), ("purpose", "")):
        if key in given:
            raise UserError(f"{key}: set by the search" + (f"; use {option}" if option else ""))
    names = parse_list("--methods", methods) if methods else [load_recipe(recipe, overrides, options).method]
    own = [{**options, "method": name, "seed": seed} for name in dict.fromkeys(names)]
    recipes = [load_recipe(recipe, overrides, each) for each in own]
    wanted = None if knobs is None else parse_knobs(knobs)
    refuse_unknown(wanted or {}, given, recipes)
    plans = [Plan(each, search_space(each, wanted, given), seed) for each in recipes]
    for plan in plans:
        if not plan.space:
            raise UserError(f"tune: {plan.recipe.method} has none of the knobs that are to be searched")
    known = {plan.recipe.method: plan for plan in plans}
    for folder in searches_in(out):
        if folder.path.name in known:
            folder.refuse_others(known[folder.path.name])
        else:  # searched before, and in the same recipe's best.yaml
            other = load_recipe(recipe, overrides, {**options, "method": folder.path.name})
            folder.refuse_others(Plan(other, {}, seed), recipe_only=True)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: not a folder")
    if trials < 1:
        raise UserError(f"--trials {trials}: expected at least 1")
    refuse_at_once(recipes[0])
    return Request(recipe, overrides, options, plans, trials, out)
