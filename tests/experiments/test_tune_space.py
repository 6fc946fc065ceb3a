"""What a search of settings is over, where it begins, and the recipe that it ends with."""

from __future__ import annotations

from pathlib import Path

import pytest

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tune.outcome import Search, TrialResult, write_best
from fvae_lora_experiments.tune.space import KNOBS, Knob, knobs_of, parse_knobs, search_space, starting_points
from fvae_lora_experiments.tune.study import Plan, with_values

PLACES = {"model": "m", "dataset": "d"}


def recipe(method: str, source: str = "image/default", *overrides: str) -> Recipe:
    return load_recipe(source, overrides, {**PLACES, "method": method})


def test_every_method_has_its_rate_and_what_else_it_has() -> None:
    assert knobs_of(recipe("full")) == knobs_of(recipe("linear-probe")) == ["train.learning_rate"]
    assert knobs_of(recipe("lora")) == ["train.learning_rate", "adapter.r", "adapter.dropout"]
    assert "adapter.dropout" not in knobs_of(recipe("pissa")), "it would remove parts of the pretrained weights"
    for method in METHODS:
        assert "train.learning_rate" in knobs_of(recipe(method))
    ours = set(knobs_of(recipe("fvae-lora"))) - set(knobs_of(recipe("lora")))
    assert ours == {
        f"fvae.{name}"
        for name in ("elbo_weight", "kl_weight", "factorization_weight", "residual_prior_mean", "elbo_stop_gradient")
    }


def test_keys_that_methods_share_have_the_same_ranges() -> None:
    ours, loras = search_space(recipe("fvae-lora")), search_space(recipe("lora"))
    assert {key: ours[key] for key in loras} == loras


def test_a_term_that_the_recipe_leaves_out_is_not_searched() -> None:
    assert "fvae.factorization_weight" not in knobs_of(
        recipe("fvae-lora", "image/default", "fvae.factorization_weight=0")
    )
    assert knobs_of(recipe("fvae-no-elbo")) == knobs_of(recipe("lora"))


def test_a_search_begins_with_the_recipe_s_point_and_the_recommended_ones() -> None:
    asked = recipe("fvae-lora-reference")
    points = starting_points(asked, search_space(asked))
    assert [(p["fvae.reconstruction_weight"], p["fvae.kl_weight"]) for p in points] == [(1, 1), (0.1, 1), (0.1, 10)]
    assert all(p["fvae.factorization_weight_z1"] == p["fvae.factorization_weight_z2"] == 1 for p in points)
    asked = recipe("fvae-lora", "image/default", "fvae.kl_weight=3")
    points = starting_points(asked, search_space(asked))
    assert [p["fvae.kl_weight"] for p in points] == [3, 10, 1, 10]
    assert [p["fvae.elbo_stop_gradient"] for p in points] == [False, False, False, True]
    asked = recipe("lora")
    assert starting_points(asked, search_space(asked)) == [
        {"train.learning_rate": 5e-3, "adapter.r": 16, "adapter.dropout": 0.1}
    ]


def test_a_point_outside_the_ranges_that_were_asked_for_is_left_out() -> None:
    asked = recipe("fvae-lora")
    space = search_space(asked, {"fvae.kl_weight": (2.0, 20.0)})
    assert starting_points(asked, space) == [{"fvae.kl_weight": 10}]


def test_the_recipe_s_own_value_is_always_in_the_range() -> None:
    assert search_space(recipe("vera"))["adapter.r"] == Knob(4, 256, log=True, kind="integer")
    for method in METHODS:
        asked = recipe(method)
        assert starting_points(asked, search_space(asked))


def test_what_is_given_is_not_searched() -> None:
    assert "adapter.r" not in search_space(recipe("lora"), given=["adapter.r"])


def test_the_edge_of_a_range_is_its_first_and_last_twentieth() -> None:
    rates = KNOBS["train.learning_rate"]
    assert [rates.at_edge(rate) for rate in (1e-5, 1.5e-5, 2e-5, 1e-2, 0.09)] == [True, True, False, False, True]
    assert not KNOBS["fvae.elbo_stop_gradient"].at_edge(True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adapter.r,,adapter.dropout", "nothing between two commas"),
        ("adapter.r,adapter.r=4:8", "given twice: adapter.r"),
        ("adapter.r=8", "expected KEY=LOW:HIGH"),
        ("adapter.r=8:4", "expected KEY=LOW:HIGH"),
        ("adapter.r=4:inf", "expected KEY=LOW:HIGH"),
    ],
)
def test_knobs_that_cannot_be_read_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_knobs(text)


@pytest.mark.parametrize(
    "text", ["adapter.r=4.5:8", "adapter.r=0:8", "train.learning_rate=0:1", "adapter.dropout=-1:0"]
)
def test_a_range_that_a_knob_cannot_have_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a range that it can have"):
        search_space(recipe("lora"), parse_knobs(text))


@pytest.mark.parametrize("source", ["image/demo", "image/default", "image/reference", "text/default"])
def test_the_best_recipe_gives_each_method_what_its_search_found(source: str, tmp_path: Path) -> None:
    values = {"train.learning_rate": 0.0123, "adapter.r": 7, "adapter.dropout": 0.2, "fvae.kl_weight": 3.5}
    for searched in (["fvae-lora-reference"], ["lora", "fvae-lora"], list(METHODS)):
        found = []
        for method in searched:
            asked = recipe(method, source, "train.epochs=3")
            space = search_space(asked)
            own = {key: values.get(key, point) for key, point in starting_points(asked, space)[0].items()}
            trials = [TrialResult(1, own, "complete", 0.5, [])]
            found.append(Search(Plan(asked, space, 0), "accuracy", True, trials, {}))
        file = write_best(source, ["train.epochs=3"], PLACES, tmp_path, found)
        assert file is not None
        best = {search.method: with_values(search.plan.recipe, dict(search.trials[0].values)) for search in found}
        for method in METHODS:
            plain = recipe(method, source, "train.epochs=3")
            assert load_recipe(str(file), options={"method": method}) == best.get(method, plain), method
        assert load_recipe(str(file)).method == searched[0]
