"""Intervals, differences to LoRA, incomplete seed sets, and scores other than accuracy."""

import math

import numpy as np
import pytest
import scipy.stats

from fvae_lora_experiments.report import summary_rows, write_markdown
from fvae_lora_experiments.report.cells import difference, extra_columns, result_columns, score, seeds
from fvae_lora_experiments.report.numbers import ci_half_width
from synthetic_runs import record, write_run


def scored(method, seed, accuracy, data=None, **recipe):
    run = record(method, seed, metrics={"test": {"accuracy": accuracy}, "validation": {"accuracy": accuracy}})
    run["dataset"] |= data or {}
    for key, value in recipe.items():
        section, _, name = key.partition("_")
        run["recipe"].setdefault(section, {})[name] = value
    return run


def write_all(folder, *runs):
    for number, run in enumerate(runs):
        write_run(folder / str(number), run)
    return {row.label: row for row in summary_rows(folder)}


def test_the_interval_is_student_s_t(tmp_path):
    scores = [0.90, 0.92, 0.97, 0.91]
    (row,) = write_all(tmp_path, *(scored("lora", seed, value) for seed, value in enumerate(scores))).values()
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(scores), scipy.stats.sem(scores))
    assert row.score_half_width == pytest.approx((high - low) / 2, rel=1e-12)
    assert row.score_half_width == pytest.approx(3.182446 * np.std(scores, ddof=1) / 2, rel=1e-6)


def test_one_seed_has_no_interval(tmp_path):
    (row,) = write_all(tmp_path, scored("lora", 1, 0.9)).values()
    assert row.score_half_width is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.5, 0.05, (2000, 3))
    covered = np.mean([abs(draw.mean() - 0.5) <= ci_half_width(draw.tolist()) for draw in draws])
    assert 0.94 < covered < 0.96


def test_differences_to_lora_are_paired_by_seed(tmp_path):
    lora = {1: 0.90, 2: 0.80, 3: 0.70}
    other = {1: 0.91, 2: 0.82, 3: 0.70}
    rows = write_all(
        tmp_path,
        *(scored("lora", seed, value) for seed, value in lora.items()),
        *(scored("full", seed, value) for seed, value in other.items()),
    )
    row = rows["full"]
    assert row.pairs == 3
    assert row.difference == pytest.approx(0.01)
    assert row.difference_half_width == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert difference(row) == "+1.00 ± 2.48"
    assert (difference(rows["lora"]), rows["lora"].pairs) == ("baseline", 0)


def test_a_seed_that_lora_lacks_makes_no_pair(tmp_path):
    rows = write_all(
        tmp_path,
        scored("lora", 1, 0.9),
        scored("lora", 3, 0.5),
        scored("full", 1, 0.8),
        scored("full", 2, 0.1),
    )
    assert (rows["full"].pairs, rows["full"].difference_half_width) == (1, None)
    assert rows["full"].difference == pytest.approx(-0.1)
    assert difference(rows["full"]) == "−10.00"


@pytest.mark.parametrize(
    "data",
    [
        {"splits": {"train": 999, "validation": 359, "test": 360}},
        {"validation_from": "0.1 of train"},
        {"test_from": "elsewhere"},
    ],
)
def test_runs_on_other_splits_are_never_paired(tmp_path, data):
    rows = write_all(tmp_path, scored("lora", 1, 0.9), scored("full", 1, 0.8, data))
    assert (rows["full"].pairs, rows["full"].difference) == (0, None)
    assert difference(rows["full"]) == "–"


@pytest.mark.parametrize("protocol", ["clean", "reference"])
def test_another_protocol_is_another_comparison(tmp_path, protocol):
    rows = write_all(tmp_path, scored("lora", 1, 0.9), scored("full", 1, 0.8, {"protocol": protocol}))
    assert rows["full"].pairs == (protocol == "clean")


def test_the_baseline_has_the_same_settings_but_for_the_learning_rate(tmp_path):
    rows = write_all(
        tmp_path,
        scored("lora", 1, 0.7, train_epochs=5),
        scored("lora", 1, 0.9, train_epochs=50),
        scored("full", 1, 0.8, train_epochs=5),
        scored("full", 1, 0.8, train_epochs=50, train_learning_rate=0.5),
        scored("full", 1, 0.8, train_epochs=500),
    )
    differences = {label: row.difference for label, row in rows.items() if label.startswith("full")}
    assert differences == {
        "full epochs=5 learning_rate=0.0001": pytest.approx(0.1),
        "full epochs=50 learning_rate=0.5": pytest.approx(-0.1),
        "full epochs=500 learning_rate=0.0001": None,
    }


@pytest.mark.parametrize("setting", ["fvae_kl_weight", "ablation_noise"])
def test_weights_of_the_objective_and_ablations_need_no_baseline_of_their_own(tmp_path, setting):
    rows = write_all(
        tmp_path,
        scored("lora", 1, 0.7, **{setting: 1}),
        scored("fvae-lora", 1, 0.8, **{setting: 1}),
        scored("fvae-lora", 1, 0.9, **{setting: 0}),
    )
    assert [row.difference for row in rows.values() if row.method == "fvae-lora"] == [
        pytest.approx(0.2),
        pytest.approx(0.1),
    ]


def test_of_several_baselines_none_is_picked_by_chance(tmp_path):
    rows = write_all(
        tmp_path,
        scored("lora", 1, 0.7, train_learning_rate=0.1),
        scored("lora", 1, 0.8, train_learning_rate=0.2),
        scored("full", 1, 0.9, train_learning_rate=0.2),
        scored("dora", 1, 0.9, train_learning_rate=0.3),
    )
    assert rows["full"].difference == pytest.approx(0.1)
    assert rows["dora"].difference is None


def test_an_extra_seed_of_one_method_leaves_the_others_whole(tmp_path):
    extra = [scored("lora", seed, 0.9) for seed in (1, 2, 3)]
    others = [scored(method, seed, 0.9) for method in ("full", "dora") for seed in (1, 2)]
    rows = write_all(tmp_path, *extra, *others)
    assert {label: row.missing_seeds for label, row in rows.items()} == {"lora": (), "full": (), "dora": ()}


def test_a_seed_that_half_of_the_rows_have_is_missed_in_the_others(tmp_path):
    whole = [scored(method, seed, 0.9) for method in ("lora", "full") for seed in (1, 2)]
    rows = write_all(tmp_path, *whole, scored("dora", 1, 0.9))
    assert {label: row.missing_seeds for label, row in rows.items()} == {"lora": (), "full": (), "dora": (2,)}
    assert seeds(rows["dora"]) == "1 of 2, incomplete"


def test_a_run_that_died_before_it_had_opened_its_data_is_missed(tmp_path):
    asked = {"task": "image", "model": "tiny-vit", "dataset": "digits"}
    runs = [record("lora", seed) for seed in (1, 2)]
    for run in runs:
        run["recipe"] |= asked
    died = {key: runs[1][key] for key in ("schema", "task", "method", "seed", "recipe")}
    write_run(tmp_path / "whole", runs[0])
    write_run(tmp_path / "died", died | {"state": "failed", "reason": "node lost"})
    whole, failed = summary_rows(tmp_path)
    assert whole.missing_seeds == (2,)
    assert (failed.state, failed.dataset) == ("failed", "digits")


def judged_by(name, greater, value, **further):
    scores = {name: value, "loss": 0.1, **further}
    metric = {"name": name, "greater_is_better": greater}
    return {"metric": metric, "metrics": {"test": scores, "validation": scores}}


def test_rows_are_judged_by_the_recorded_metric(tmp_path):
    runs = [record(method, 1, **judged_by("per", False, value)) for method, value in (("lora", 0.1234), ("full", 0.08))]
    rows = write_all(tmp_path, *runs)
    assert list(rows) == ["full", "lora"]  # fewer errors on validation first
    assert next(iter(result_columns(list(rows.values())))) == "per % ↓"
    assert score(rows["lora"]) == "12.34"
    assert rows["full"].difference == pytest.approx(-0.0434)


def test_what_is_no_fraction_is_shown_as_it_is(tmp_path):
    rows = write_all(tmp_path, record("lora", 1, **judged_by("perplexity", False, 12.5)))
    assert next(iter(result_columns(list(rows.values())))) == "perplexity ↓"
    assert score(rows["lora"]) == "12.50"


def test_error_rates_may_exceed_one_and_correlations_be_negative(tmp_path):
    write_run(tmp_path / "a", record("lora", 1, **judged_by("wer", False, 1.25)))
    write_run(tmp_path / "b", record("lora", 1, **judged_by("matthews", True, -0.1)))
    assert {row.metric: score(row) for row in summary_rows(tmp_path)} == {"wer": "125.00", "matthews": "-10.00"}


def test_runs_judged_by_different_scores_are_not_compared(tmp_path):
    write_run(tmp_path / "a", record("lora", 1, **judged_by("accuracy", True, 0.9)))
    write_run(tmp_path / "b", record("lora", 2, **judged_by("worst_group_accuracy", True, 0.5)))
    assert [row.seeds for row in summary_rows(tmp_path)] == [(1,), (2,)]


def test_further_scores_are_averaged_over_seeds(tmp_path):
    for seed, worst in ((1, 0.5), (2, 0.7)):
        run = record("lora", seed, **judged_by("accuracy", True, 0.9, worst_group_accuracy=worst, gap=None))
        write_run(tmp_path / str(seed), run)
    (row,) = summary_rows(tmp_path)
    (worst,) = row.extra_scores
    assert (worst.name, worst.mean) == ("worst_group_accuracy", pytest.approx(0.6))
    assert worst.std == pytest.approx(0.1 * math.sqrt(2))


def test_counts_are_no_percentages(tmp_path):
    write_run(tmp_path / "a", record("lora", 1, **judged_by("choice_accuracy", True, 0.5, piqa_unparsable=3.0)))
    rows = summary_rows(tmp_path)
    assert {name: cell(rows[0]) for name, cell in extra_columns(rows).items()} == {"piqa unparsable": "3.00"}


def test_a_copy_of_the_data_that_is_not_the_published_one_is_said(tmp_path):
    run = record("lora")
    run["dataset"]["note"] = "not the published Waterbirds: rows per group are train 1/2/3/4"
    write_run(tmp_path / "runs" / "a", run)
    write_markdown(summary_rows(tmp_path / "runs"), tmp_path / "table.md")
    assert "Warning: not the published Waterbirds: rows" in (tmp_path / "table.md").read_text(encoding="utf-8")
