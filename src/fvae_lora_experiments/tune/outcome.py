"""What searches have found: their trials, the best of each, how much each knob mattered, and the recipe."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import flatten, load_recipe, recipe_tree
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.sweep.select import GridPoint, best_point
from fvae_lora_experiments.tune.study import METRIC, REASON, Journal, Plan, StudyFolder, with_values

FEWEST = 10
"""How many finished trials it takes to say how much a knob matters: the best tenth is compared with the rest."""


Ended = Literal["complete", "pruned"]


@dataclass(frozen=True)
class TrialResult:
    """A trial: its number from 1, its point, how it ended, and the best validation score after each epoch."""

    number: int
    values: Mapping[str, Any]
    state: Ended | Literal["running"]
    score: float | None
    curve: Sequence[tuple[float, float]]
    reason: str = ""
    """Why it has no score."""


@dataclass(frozen=True)
class Search:
    """The search for one method's settings, as far as it is."""

    plan: Plan
    metric: str
    greater_is_better: bool
    trials: Sequence[TrialResult]
    importances: Mapping[str, float]
    """Of each knob, summing to 1; empty while too few trials are finished."""

    @property
    def method(self) -> str:
        """The method whose settings are searched."""
        return self.plan.recipe.method

    @cached_property
    def best(self) -> TrialResult | None:
        """The trial with the best validation score, the first of several; None while none is finished."""
        found = best_point([GridPoint(t.values, t.score) for t in self.trials], self.greater_is_better)
        return None if found is None else self.trials[found.index]

    def count(self, state: str) -> int:
        """How many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def at_edge(self) -> list[str]:
        """The knobs whose best value lies on the edge of its range."""
        if self.best is None:
            return []
        return [key for key, knob in self.plan.space.items() if knob.at_edge(self.best.values[key])]


def read_search(folder: StudyFolder) -> Search:
    """What is in a search's folder.

    Raises:
        UserError: it is not readable.
    """
    from optuna.trial import TrialState

    plan, journal = folder.read_plan(), Journal(folder)
    states: dict[TrialState, Ended] = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}
    trials = [
        TrialResult(
            trial.number + 1,
            trial.params,
            states.get(trial.state, "running"),
            trial.value if trial.state == TrialState.COMPLETE else None,
            sorted(trial.intermediate_values.items()),
            trial.user_attrs.get(REASON, ""),
        )
        for trial in journal.begun()
        if trial.params.keys() >= plan.space.keys()
    ]
    metric = journal.study.user_attrs.get(METRIC, "score")
    greater = journal.study.direction.name == "MAXIMIZE"
    return Search(plan, metric, greater, trials, _importances(journal, trials))


def _importances(journal: Journal, trials: Sequence[TrialResult]) -> dict[str, float]:
    import optuna

    scores = [trial.score for trial in trials if trial.score is not None]
    if len(scores) < FEWEST or min(scores) == max(scores):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(journal.study)


def write_best(
    source: str, overrides: Sequence[str], options: Mapping[str, Any], out: Path, found: Sequence[Search]
) -> Path | None:
    """Writes the best recipe of each method as one file, `best.yaml`, that `train` and `compare` take.

    What the methods share is in its sections, what is a method's own in `per_method`. Methods that were not searched
    have their values of the recipe.

    Args:
        source: the recipe that was searched from.
        overrides: its overrides.
        options: its options.
        out: where to.
        found: the searches; those without a finished trial are left out.

    Returns:
        The file; None if there is nothing to write.
    """
    best = {s.method: with_values(s.plan.recipe, dict(s.best.values)) for s in found if s.best}
    if not best:
        return None
    main = next(iter(best))
    with_own = {key.split(".")[1] for key in recipe_tree(source) if key.startswith("per_method.")}
    for method in METHODS:
        if method in with_own:
            best.setdefault(method, load_recipe(source, overrides, {**options, "method": method}))
    # the sections are those of a method that changes nothing in them
    plain = next((m for m in METHODS if not METHODS[m].defaults and m not in with_own), main)
    base = load_recipe(source, overrides, {**options, "method": plain})
    tree = {"task": base.task, "method": main} | base.model_dump(exclude_defaults=True, exclude={"method", "purpose"})
    shared = flatten(base.model_dump())
    searched = {search.method: search.plan.space for search in found}
    tree["per_method"] = {
        method: {
            key: value
            for key, value in flatten(_at_home(recipe, base).model_dump()).items()
            if key in searched.get(method, ()) or key in METHODS[method].defaults or value != shared[key]
        }
        for method, recipe in best.items()
    }
    file = out / "best.yaml"
    write_atomically(file, f"{_comment(source, found)}{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}")
    return file


def _at_home(recipe: Recipe, other: Recipe) -> Recipe:
    """A recipe with the places of another, which it shares, and its method, which has a line of its own."""
    same = {key: getattr(other, key) for key in ("method", "model", "dataset", "seed", "purpose")}
    return recipe.model_copy(update=same)


def _comment(source: str, found: Sequence[Search]) -> str:
    lines = [f"The best of a search from {source}, chosen by validation alone."]
    for search in found:
        if search.best is not None:
            lines.append(
                f"{search.method}: trial {search.best.number} of {len(search.trials)}, validation {search.metric} "
                f"{search.best.score:.4f} with the seed {search.plan.seed}, which results should not use."
            )
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)
