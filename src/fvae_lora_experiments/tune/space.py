"""What is searched: the knobs that a method has, the range of each, and the points that a search begins with."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fvae_lora_experiments.errors import UserError, did_you_mean
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import flatten
from fvae_lora_experiments.schema import Recipe


@dataclass(frozen=True)
class Knob:
    """Where the value of a recipe's key is searched: from `low` to `high`, or, for a switch, false and true."""

    low: float = 0
    high: float = 1
    log: bool = False
    kind: Literal["number", "integer", "switch"] = "number"

    def holds(self, value: Any) -> bool:
        """Whether the value is in the range."""
        return self.low <= value <= self.high

    def including(self, value: float) -> "Knob":
        """The range, made wide enough for a value."""
        return replace(self, low=min(self.low, value), high=max(self.high, value))

    def at_edge(self, value: float) -> bool:
        """Whether a value lies in the first or the last twentieth of the range: a better one may lie outside."""
        if self.kind == "switch":
            return False
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return not low + (high - low) / 20 <= scale(value) <= high - (high - low) / 20

    def __str__(self) -> str:
        if self.kind == "switch":
            return "false or true"
        return f"{self.low:g} to {self.high:g}" + (" log" if self.log else "")


Space = Mapping[str, Knob]
"""The knobs of a search, by the recipe's dotted key."""

KNOBS: Space = {
    "train.learning_rate": Knob(1e-5, 1e-1, log=True),
    "adapter.r": Knob(4, 64, log=True, kind="integer"),
    "adapter.dropout": Knob(0, 0.3),
    "fvae.elbo_weight": Knob(1e-5, 1e-1, log=True),
    "fvae.reconstruction_weight": Knob(1e-2, 10, log=True),
    "fvae.kl_weight": Knob(1e-1, 100, log=True),
    "fvae.factorization_weight": Knob(1e-2, 10, log=True),
    "fvae.factorization_weight_z1": Knob(1e-2, 10, log=True),
    "fvae.factorization_weight_z2": Knob(1e-2, 10, log=True),
    "fvae.residual_prior_mean": Knob(0, 3),
    "fvae.elbo_stop_gradient": Knob(kind="switch"),
}
"""Every knob and its range, the same for all methods that have it."""

OBJECTIVES = {
    "fvae": ("elbo_weight", "kl_weight", "factorization_weight"),
    "vae2lat": ("elbo_weight", "kl_weight"),
    "reference": ("reconstruction_weight", "kl_weight", "factorization_weight_z1", "factorization_weight_z2"),
}
"""The weights of each objective, but for one, which the others are relative to."""

RECOMMENDED: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "fvae": [
        {"elbo_weight": 1e-3, "kl_weight": 10, "factorization_weight": 1},
        {"elbo_weight": 1e-3, "kl_weight": 1, "factorization_weight": 1},
        {"elbo_weight": 1e-3, "kl_weight": 10, "factorization_weight": 1, "elbo_stop_gradient": True},
    ],
    "vae2lat": [{"elbo_weight": 1e-3, "kl_weight": 1}, {"elbo_weight": 1e-3, "kl_weight": 10}],
    "reference": [
        {"reconstruction_weight": alpha, "kl_weight": beta, "factorization_weight_z1": 1, "factorization_weight_z2": 1}
        for alpha, beta in ((1, 1), (0.1, 1), (0.1, 10))
    ],
}
"""The published weights of each objective; `fvae` also with the gradient stopped (see docs/options.md)."""


def knobs_of(recipe: Recipe) -> list[str]:
    """The keys that can be searched for a recipe's method.

    A weight that is 0 in the recipe leaves its term out, and dropout that a method sets belongs to it: neither is a
    knob then.
    """
    method = METHODS[recipe.method]
    found = ["train.learning_rate"]
    if method.adapts_layers:
        found += ["adapter.r", "adapter.dropout"]
    if method.draws_z1 and recipe.fvae.elbo_weight > 0:
        weights = OBJECTIVES[recipe.fvae.objective]
        found += [f"fvae.{name}" for name in (*weights, "residual_prior_mean", "elbo_stop_gradient")]
    values = _values(recipe)
    if "adapter.dropout" in method.defaults:
        found.remove("adapter.dropout")
    return [key for key in found if not (KNOBS[key].log and values[key] == 0)]


def parse_knobs(text: str) -> dict[str, tuple[float, float] | None]:
    """`train.learning_rate=1e-4:1e-2,adapter.r` as {key: its range, or None for the usual one}.

    Raises:
        UserError: there is nothing between two commas, a key is given twice, or a range is not one.
    """
    found: dict[str, tuple[float, float] | None] = {}
    for part in text.split(","):
        key, equals, limits = part.strip().partition("=")
        if not key or key in found:
            raise UserError(f"--knobs: {'given twice: ' + key if key else 'nothing between two commas'}; got {text!r}")
        found[key] = _range(part, limits) if equals else None
    return found


def _range(part: str, limits: str) -> tuple[float, float]:
    low, _, high = limits.partition(":")
    try:
        found = float(low), float(high)
    except ValueError:
        found = math.nan, math.nan
    if not -math.inf < found[0] < found[1] < math.inf:
        raise UserError(f"--knobs {part}: expected KEY=LOW:HIGH, for example train.learning_rate=1e-4:1e-2")
    return found


def search_space(
    recipe: Recipe, wanted: Mapping[str, tuple[float, float] | None] | None = None, given: Collection[str] = ()
) -> dict[str, Knob]:
    """The knobs that are searched for a recipe's method, each with a range that holds the recipe's own value.

    Args:
        recipe: the method's recipe.
        wanted: keys, and ranges that are to replace the usual ones; None is every knob that the method has. Keys that
            it does not have are left out.
        given: keys whose values were given for this search, which are not searched.

    Raises:
        UserError: a range that its key cannot have.
    """
    values, space = _values(recipe), {}
    for key in knobs_of(recipe):
        if (wanted is not None and key not in wanted) or key in given:
            continue
        knob, limits = KNOBS[key], (wanted or {}).get(key)
        if limits is None:
            space[key] = knob if knob.kind == "switch" else knob.including(values[key])
            continue
        low, high = limits
        whole = knob.kind != "integer" or (low.is_integer() and high.is_integer())
        if knob.kind == "switch" or not whole or low < (1 if knob.kind == "integer" else 0) or (knob.log and low <= 0):
            raise UserError(f"--knobs {key}={low:g}:{high:g}: not a range that it can have; the usual one is {knob}")
        space[key] = replace(knob, low=low, high=high)
    return space


def refuse_unknown(wanted: Collection[str], given: Collection[str], recipes: Sequence[Recipe]) -> None:
    """Refuses keys of --knobs that none of the methods has, and those whose values are given.

    Raises:
        UserError: the first of them, and what is allowed.
    """
    allowed = list(dict.fromkeys(key for recipe in recipes for key in knobs_of(recipe)))
    for key in wanted:
        if key not in allowed:
            methods = ", ".join(recipe.method for recipe in recipes)
            near = did_you_mean(key, allowed)
            raise UserError(f"--knobs {key}: {methods} does not have it; allowed are {', '.join(allowed)}{near}")
        if key in given:
            raise UserError(f"--knobs {key}: its value is also given, which would fix it; expected one of them")


def starting_points(recipe: Recipe, space: Space) -> list[dict[str, Any]]:
    """The points that a search begins with: the recipe's own, then the published ones; those outside are left out."""
    values = _values(recipe)
    own = {key: values[key] for key in space}
    points = [own]
    for weights in RECOMMENDED[recipe.fvae.objective]:
        point = own | {key: value for name, value in weights.items() if (key := f"fvae.{name}") in space}
        if point not in points:
            points.append(point)
    return [point for point in points if all(space[key].holds(value) for key, value in point.items())]


def _values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values by dotted key; weights of a part of a term that say None are the term's."""
    values = flatten(recipe.model_dump())
    for part in ("z1", "z2"):
        if values[f"fvae.factorization_weight_{part}"] is None:
            values[f"fvae.factorization_weight_{part}"] = values["fvae.factorization_weight"]
    return values
