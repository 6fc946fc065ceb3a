"""What `inspect` says of layers that are made up: warnings, and a page of a hundred."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fvae_lora_experiments.inspect.advice import advise
from fvae_lora_experiments.inspect.inputs import Inputs, Known
from fvae_lora_experiments.inspect.inspection import Inspection
from fvae_lora_experiments.inspect.measure import Latent, Layer, Measured
from fvae_lora_experiments.inspect.page import render
from fvae_lora_experiments.inspect.probes import Projection, Score, question
from fvae_lora_experiments.inspect.source import Source
from fvae_lora_experiments.recipe import check_recipe

ROWS = 300
SETTINGS = {"r": 16, "kl_weight": 10.0, "elbo_weight": 0.001, "reconstruction_weight": 1.0, "factorization_weight": 1.0}
LABEL = Known(np.arange(ROWS) % 30, [f"<{i}>" for i in range(30)])


def latent(score: float, **changes: Any) -> Latent:
    points = [(math.sin(i) / 3, math.cos(i * i)) for i in range(ROWS)]
    made = Latent(16, 16, [1.0] * 16, 1.0, {"label": Score(score, 0.01)}, Projection(points, (0.6, 0.3)))
    return replace(made, **changes)


def layer(number: int = 0, z1: dict[str, Any] | None = None, z2: dict[str, Any] | None = None, **changes: Any) -> Layer:
    name = f"model.layers.{number // 2}.attention.{'qv'[number % 2]}_proj"
    values = {"log_likelihood": -9.0, "gamma": 1.0, "w2": 2.0, "r2": 0.5, "r2_z1": 0.2, "r2_z2": 0.3}
    norms = {"tokens": 99, "kl_z1": 1.0, "update_norm": 0.1, "output_norm": 1.0}
    made = Layer(name=name, z1=latent(0.8, **z1 or {}), z2=latent(0.3, **z2 or {}), **values, **norms)
    return replace(made, **changes)


def measured(layers: list[Layer]) -> Measured:
    return Measured(layers, ROWS, {"label": question(LABEL)}, np.arange(ROWS), [])


def test_nothing_is_said_of_layers_in_which_nothing_is_wrong() -> None:
    assert advise(measured([layer(0), layer(1)]), SETTINGS) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"z1": {"active": 0}}, "1.q_proj: all units of z1 collapsed"),
        ({"z1": {"active": 0}}, "lower kl_weight (now 10.0) or elbo_weight (now 0.001)"),
        ({"z1": {"active": 7}}, "under half of z1's units are active; lower kl_weight (now 10.0)"),
        ({"z2": {"active": 0}}, "raise reconstruction_weight (now 1.0) or lower factorization_weight (now 1.0)"),
        ({"r2": -0.2}, "the decoder explains under 10% of the input's variance"),
        ({"z1": {"variance": 5.0}}, "kl_weight (now 10.0) must exceed factorization_weight (now 1.0)"),
        ({"update_norm": 1e-4}, "raise the learning rate or lora_alpha"),
        ({"update_norm": 2.0}, "lower the learning rate or lora_alpha"),
        ({"z2": {"probes": {"label": Score(0.79, 0.01)}}}, "the label is read from z2 as well as from z1"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_change(changes: dict[str, Any], said: str) -> None:
    (warning,) = advise(measured([layer(0), layer(1), layer(2, **changes)]), SETTINGS)
    assert warning.startswith("1.q_proj: ")
    assert said in warning


def test_many_layers_are_counted_and_all_are_all() -> None:
    low = [layer(i, r2=0.0) for i in range(8)]
    assert advise(measured(low), SETTINGS)[0].startswith("All 8 layers: the decoder")
    assert advise(measured([*low, layer(9)]), SETTINGS)[0].startswith("0.q_proj, 0.v_proj, 1.q_proj and 5 more of 9: ")


@pytest.fixture
def inspection(tmp_path: Path) -> Inspection:
    recipe = check_recipe({"model": "m", "dataset": "d", "method": "fvae-lora"}, "test")
    source = Source(tmp_path / "run", tmp_path, recipe, None, True, SETTINGS)
    inputs = Inputs("d", "all rows", iter(()), ROWS, own=True)
    return Inspection(source, inputs, measured([layer(i) for i in range(100)]))


def test_a_page_of_a_hundred_layers_is_small_and_folded(inspection: Inspection) -> None:
    page = render(inspection)
    assert len(page) < 3e6
    assert page.count("<details>") == 102  # two tables
    assert page.count('class="cloud"') == 100 * 2 * 12
    for kind in ("q_proj", "v_proj"):  # in one line they would zigzag
        assert f"Active units, %: {kind}" in page
    assert "Only rows of the 12 most frequent of 30 kinds of label are drawn." in page
    assert "&lt;0&gt;" in page
    assert "<0>" not in page
    assert not re.search("<script|javascript|https?:|<link(?! rel=.icon)", page)
    used, made = (set(re.findall(pattern, page)) for pattern in (r"url\(#(m\d+)\)", r'<marker id="(m\d+)"'))
    assert used == made
    assert page.count("<details open>") == 0
    few = replace(inspection, measured=measured([layer(0), layer(1)]))
    assert render(few).count("<details open>") == 4


def test_what_is_not_a_number_is_null_and_a_dash(inspection: Inspection) -> None:
    odd = replace(inspection, measured=measured([layer(0, r2=math.nan, w2=None, z1={"probes": {"label": None}})]))
    found = json.loads(odd.as_json())["layers"][0]
    assert (found["r2"], found["w2"], found["z1"]["probes"]["label"]) == (None, None, None)
    render(odd)
    cells = dict(pair for table in odd.tables() for pair in zip(table.headings, table.rows[0], strict=True))
    assert (cells["W2²"], cells["label from z1"], cells["R² %"]) == ("–", "–", "–")
