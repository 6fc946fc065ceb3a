"""Grids in the report: never averaged into results, shown whole, the chosen point and the edge named."""

import csv
import re

import pytest

from fvae_lora_experiments.report import summary_rows, write_csv, write_page
from synthetic_runs import printed, record, write_run


def point(folder, method, accuracy, seed=0, state="complete", adapter_r=16, metric=None, **train):
    """A selection run; without an accuracy it has failed."""
    run = record(method, seed, metrics={"validation": {"accuracy": accuracy}})
    run["recipe"]["purpose"] = "selection"
    run["recipe"]["train"] |= train
    run["recipe"]["adapter"]["r"] = adapter_r
    if accuracy is None:
        run |= {"state": state if state != "complete" else "failed", "reason": "the loss is NaN", "metrics": {}}
    if metric:
        run["metric"] = metric
    settings = "-".join(f"{key}={value}" for key, value in train.items())
    write_run(folder / "selection" / f"{method}-{adapter_r}-{settings}-seed{seed}", run)


def final(folder, method, seed=1, adapter_r=16, **train):
    run = record(method, seed)
    run["recipe"]["train"] |= train
    run["recipe"]["adapter"]["r"] = adapter_r
    write_run(folder / f"{method}-{adapter_r}-{list(train.values())}-seed{seed}", run)


def grid(folder, method, accuracies, rates=(0.001, 0.003, 0.01, 0.03), **others):
    for rate, accuracy in zip(rates, accuracies, strict=False):
        point(folder, method, accuracy, learning_rate=rate, **others)


def chosen(rows):
    return [dict(row.point) for row in rows if row.chosen]


def test_selection_runs_are_never_averaged_into_results(tmp_path):
    grid(tmp_path, "lora", (0.8, 0.9, 0.7))
    final(tmp_path, "lora", learning_rate=0.003)
    rows = summary_rows(tmp_path)
    (result,) = (row for row in rows if row.state == "complete")
    assert (result.seeds, result.missing_seeds, len(result.scores), result.settings) == ((1,), (), 1, "")
    assert [row.score for row in rows if row.state == "selection"] == [None] * 3


def test_the_whole_grid_is_shown_with_means_over_the_selection_seeds(tmp_path):
    for seed, shift in ((7, 0.01), (8, -0.03)):
        for rate, accuracy in ((0.001, 0.8), (0.003, 0.9), (0.01, 0.7)):
            point(tmp_path, "lora", accuracy + shift, seed, learning_rate=rate)
    point(tmp_path, "lora", 0.99, 7, learning_rate=0.03)
    point(tmp_path, "lora", None, 8, learning_rate=0.03)
    rows = summary_rows(tmp_path)
    assert chosen(rows) == [{"train.learning_rate": 0.003}]
    (line,) = (line for line in printed(rows).splitlines() if line.startswith("lora "))
    assert line.split() == ["lora", "79.00", "89.00", "*", "69.00", "failed"]


def test_a_point_that_is_still_running_is_not_chosen(tmp_path):
    grid(tmp_path, "lora", (0.8, 0.9))
    point(tmp_path, "lora", None, state="running", learning_rate=0.01)
    rows = summary_rows(tmp_path)
    assert chosen(rows) == [{"train.learning_rate": 0.003}]
    assert "running" in [row.reason for row in rows if row.state == "selection"]


@pytest.mark.parametrize(
    ("accuracies", "edge"),
    [
        ((0.9, 0.8, 0.7, 0.6), ("train.learning_rate",)),
        ((0.6, 0.7, 0.8, 0.9), ("train.learning_rate",)),
        ((0.7, 0.9, 0.8, 0.6), ()),
        ((0.7, 0.8, 0.9, None), ()),
        ((0.7, 0.9), ("train.learning_rate",)),
    ],
    ids=["lowest", "highest", "inside", "next to a failure", "two values"],
)
def test_a_best_point_on_the_edge_is_warned_of(tmp_path, accuracies, edge):
    grid(tmp_path, "lora", accuracies)
    rows = summary_rows(tmp_path)
    (best,) = (row for row in rows if row.chosen)
    assert best.edge == edge
    text = " ".join(printed(rows).split())
    assert ("Warning: the best learning_rate of lora" in text) == bool(edge)
    assert ("edge: learning_rate" in text) == bool(edge)


def test_of_a_score_of_which_less_is_better_the_lowest_is_chosen(tmp_path):
    wer = {"name": "accuracy", "greater_is_better": False}
    grid(tmp_path, "lora", (0.5, 0.3, 0.4), metric=wer)
    assert chosen(summary_rows(tmp_path)) == [{"train.learning_rate": 0.003}]


def test_of_equal_points_the_one_with_final_runs_was_chosen(tmp_path):
    grid(tmp_path, "lora", (0.8, 0.9, 0.9, 0.7))
    final(tmp_path, "lora", learning_rate=0.01)
    assert chosen(summary_rows(tmp_path)) == [{"train.learning_rate": 0.01}]


def test_the_grid_of_each_method_has_its_own_best(tmp_path):
    grid(tmp_path, "lora", (0.7, 0.9, 0.8))
    grid(tmp_path, "full", (0.9, 0.7, 0.6))
    final(tmp_path, "lora", learning_rate=0.003)
    final(tmp_path, "full", learning_rate=0.001)
    rows = summary_rows(tmp_path)
    assert {row.method: dict(row.point)["train.learning_rate"] for row in rows if row.chosen} == {
        "lora": 0.003,
        "full": 0.001,
    }
    (full,) = (row for row in rows if row.state == "complete" and row.method == "full")
    assert full.pairs == 1


def test_a_grid_of_two_keys_goes_across_and_down(tmp_path):
    for decay, accuracies in ((0.0, (0.6, 0.7, 0.8)), (0.1, (0.5, 0.9, 0.7))):
        grid(tmp_path, "lora", accuracies, weight_decay=decay)
    rows = summary_rows(tmp_path)
    assert chosen(rows) == [{"train.learning_rate": 0.003, "train.weight_decay": 0.1}]
    lines = [line.split() for line in printed(rows).splitlines()]
    assert [line[1:] for line in lines if line[:1] == ["lora"]] == [
        ["60.00", "70.00", "80.00"],
        ["50.00", "90.00", "*", "70.00", "edge:", "weight_decay"],
    ]
    assert [line for line in lines if line and line[0].startswith("weight_decay=")] == [
        ["weight_decay=0.0"],
        ["weight_decay=0.1"],
    ]


def test_what_is_compared_beside_the_grid_has_a_choice_for_each_value(tmp_path):
    for r, accuracies, best in ((8, (0.7, 0.8, 0.6), 0.003), (16, (0.9, 0.6, 0.5), 0.001)):
        for method in ("lora", "full"):
            grid(tmp_path, method, accuracies, adapter_r=r)
            final(tmp_path, method, adapter_r=r, learning_rate=best)
    rows = summary_rows(tmp_path)
    assert chosen([row for row in rows if row.method == "lora"]) == [
        {"adapter.r": 16, "train.learning_rate": 0.001},
        {"adapter.r": 8, "train.learning_rate": 0.003},
    ]
    assert not any(row.superseded for row in rows)
    labels = sorted(row.label for row in rows if row.state == "complete")
    assert labels == ["full r=16", "full r=8", "lora r=16", "lora r=8"], "what the grid chose needs no name"
    assert [row.pairs for row in rows if row.state == "complete" and row.method == "full"] == [1, 1]


def test_results_of_an_earlier_choice_are_named_and_are_no_baseline(tmp_path):
    grid(tmp_path, "lora", (0.7, 0.8, 0.9, 0.6))
    final(tmp_path, "lora", learning_rate=0.003)
    final(tmp_path, "lora", learning_rate=0.01)
    final(tmp_path, "full", learning_rate=0.5)
    rows = [row for row in summary_rows(tmp_path) if row.state == "complete"]
    assert sorted(row.label for row in rows) == ["full", "lora", "lora learning_rate=0.003 (earlier choice)"]
    assert next(row.pairs for row in rows if row.method == "full") == 1


def test_the_csv_holds_the_points(tmp_path):
    grid(tmp_path / "runs", "lora", (0.8, 0.9, None))
    write_csv(summary_rows(tmp_path / "runs"), tmp_path / "table.csv")
    lines = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    points = [(r["point"], r["validation_score"], r["chosen"], r["reason"]) for r in lines if r["state"] == "selection"]
    assert points == [
        ("train.learning_rate=0.001", "0.8", "False", ""),
        ("train.learning_rate=0.003", "0.9", "True", ""),
        ("train.learning_rate=0.01", "", "False", "failed"),
    ]


def test_the_page_draws_the_grid_on_a_log_axis(tmp_path):
    grid(tmp_path / "runs", "lora", (0.7, 0.9, 0.8, None), rates=(0.001, 0.01, 0.1, 1.0))
    page = write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "of 4 runs counted, 3 for selection" in page
    assert 'aria-label="Validation accuracy %, by learning rate, log scale"' in page
    _, curve = re.findall(r'<path class="mean" d="M([^"]+)"', page)  # the first is the legend's
    first, second, third = (float(x) for x in curve.split()[::2])
    assert second - first == pytest.approx(third - second, abs=0.2) != 0
    assert page.count('class="point"') == 2  # in the legend, and at the chosen point


def test_a_page_of_selection_runs_alone_shows_the_grid(tmp_path):
    grid(tmp_path / "runs", "lora", (None, None))
    page = write_page([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<td>failed</td>") == 2
    assert "<figure>" not in page
