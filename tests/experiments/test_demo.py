"""The demo, in its short form, and what its numbers rest on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fvae_lora_experiments.demo import METHODS, RECIPE, SEEDS
from fvae_lora_experiments.recipe import load_recipe

PROJECT = Path(__file__).parents[2]


def test_each_method_has_the_rate_that_served_it_best_on_validation() -> None:
    rates = json.loads((PROJECT / "studies" / "demo" / "rates.json").read_text())
    assert not set(rates["selection_seeds"]) & set(SEEDS)
    grids = [list(by_rate) for by_rate in rates["scores"].values()]
    assert len(grids[0]) >= 5
    assert all(grid == grids[0] for grid in grids), "one common grid"
    for method in METHODS:
        scores = rates["scores"][method]
        ranked = [(found["accuracy"], -found["loss"], rate) for rate, found in scores.items() if found]
        best = max(ranked)[2]
        assert load_recipe(RECIPE, options={"method": method}).train.learning_rate == float(best)
        assert best not in (grids[0][0], grids[0][-1]), f"{method}: at the edge of the grid"


@pytest.mark.slow
def test_the_short_demo_works_without_a_network(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = cli("demo", "--quick", "--out", tmp_path)
    assert code == 0, err
    for method in METHODS:
        assert method in out
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
