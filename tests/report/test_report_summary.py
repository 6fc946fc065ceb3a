"""What is averaged, what is set apart, and what never makes a report fail."""

import json
import math

import pytest

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.report import summary_rows
from fvae_lora_experiments.report.comparison import mean_curve, thinned
from fvae_lora_experiments.run.archive import read_runs
from synthetic_runs import metrics, record, write_demo, write_run


def scored(accuracy, seed, **changes):
    return record("lora", seed, **changes) | {"metrics": {"test": {"accuracy": accuracy, "loss": 0.1}}}


def finished(rows):
    return [row for row in rows if row.state == "complete"]


def test_mean_and_sample_standard_deviation(tmp_path):
    for seed, accuracy in ((42, 0.97), (1, 0.90), (2, 0.92)):
        write_run(tmp_path / str(seed), scored(accuracy, seed))
    (row,) = summary_rows(tmp_path)
    assert row.seeds == (1, 2, 42)
    assert row.scores == (0.90, 0.92, 0.97)
    assert row.score == pytest.approx(0.93, abs=1e-12)
    assert row.score_std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2), abs=1e-12)
    assert row.missing_seeds == ()


def test_time_is_the_mean_and_memory_the_largest_peak(tmp_path):
    write_run(tmp_path / "a", scored(0.9, 1, time={"wall_s": 10.0}, memory={"peak_mb": 500.0}))
    write_run(tmp_path / "b", scored(0.9, 2, time={"wall_s": 20.0}, memory={"peak_mb": 300.0}))
    (row,) = summary_rows(tmp_path)
    assert (row.time_s, row.peak_memory_mb) == (15.0, 500.0)


def test_one_seed_has_no_standard_deviation(tmp_path):
    write_run(tmp_path / "only", scored(0.9, 1))
    (row,) = summary_rows(tmp_path)
    assert (row.score, row.score_std) == (0.9, None)


@pytest.mark.parametrize("state", ["failed", "running"])
def test_a_run_that_did_not_finish_is_listed_and_not_averaged(tmp_path, state):
    write_run(tmp_path / "good", scored(0.9, 1))
    write_run(tmp_path / "bad", scored(0.1, 2, state=state, reason="disk full"))
    good, bad = summary_rows(tmp_path)
    assert (good.score, good.seeds, good.missing_seeds) == (0.9, (1,), (2,))
    assert (bad.state, bad.run, bad.reason, bad.score) == (state, "bad", "disk full", None)


def test_a_seed_that_another_method_has_is_missed(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"lora-{seed}", record("lora", seed))
    write_run(tmp_path / "full-1", record("full", 1))
    missing = {row.method: row.missing_seeds for row in summary_rows(tmp_path)}
    assert missing == {"lora": (), "full": (2,)}


def test_runs_of_other_recipes_are_other_rows(tmp_path):
    for seed in (1, 2):
        for rate in (1e-3, 5e-3):
            run = record("lora", seed)
            run["recipe"]["train"]["learning_rate"] = rate
            write_run(tmp_path / f"{rate}-{seed}", run)
    rows = summary_rows(tmp_path)
    assert {row.settings: row.learning_rate for row in rows} == {
        "learning_rate=0.001": 1e-3,
        "learning_rate=0.005": 5e-3,
    }
    assert all(row.seeds == (1, 2) for row in rows)


def test_a_setting_that_one_row_lacks_is_said(tmp_path):
    for patience in (None, 3):
        run = record("lora")
        run["recipe"]["train"]["patience"] = patience
        write_run(tmp_path / str(patience), run)
    assert {row.settings for row in summary_rows(tmp_path)} == {"patience=none", "patience=3"}


def test_the_recipes_of_different_methods_are_not_compared(tmp_path):
    write_run(tmp_path / "a", record("lora"))
    write_run(tmp_path / "b", record("full"))
    assert [row.settings for row in summary_rows(tmp_path)] == ["", ""]


def test_the_order_of_rows_does_not_look_at_test(tmp_path):
    for method, validation, test in (("full", 0.8, 0.9), ("lora", 0.9, 0.7), ("linear-probe", 0.7, 0.8)):
        scores = {"test": {"accuracy": test}, "validation": {"accuracy": validation}}
        write_run(tmp_path / method, record(method, metrics=scores))
    assert [row.method for row in summary_rows(tmp_path)] == ["lora", "full", "linear-probe"]


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_the_same_name_for_other_contents_is_another_row(tmp_path, what):
    write_run(tmp_path / "a", record(seed=1))
    run = record(seed=2)
    run[what]["fingerprint"] = "another"
    write_run(tmp_path / "b", run)
    rows = summary_rows(tmp_path)
    assert [row.seeds for row in rows] in ([(1,), (2,)], [(2,), (1,)])
    assert len({getattr(row, what) for row in rows}) == 2


def test_a_seed_that_is_there_twice_counts_once(tmp_path):
    write_run(tmp_path / "a", scored(0.9, 1))
    write_run(tmp_path / "b", scored(0.5, 1))
    first, second = summary_rows(tmp_path)
    assert (first.score, first.seeds) == (0.9, (1,))
    assert (second.state, second.run, second.reason) == ("duplicate", "b", "the same recipe and seed as a")


UNREADABLE = {
    "cut off": json.dumps(record())[:200],
    "empty": "",
    "not JSON": "hello",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another schema": json.dumps(record(schema=2)),
    "unknown state": json.dumps(record(state="resting")),
    "no seed": json.dumps(record() | {"seed": None}),
    "complete without a score": json.dumps(record(metrics=None)),
    "not a number": json.dumps(scored(float("nan"), 1)),
    "percent": json.dumps(scored(97.0, 1)),
    "null": "null",
    "a model that is none": json.dumps(record(model=3)),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_a_record_that_cannot_be_read_is_listed_and_not_averaged(tmp_path, text):
    write_run(tmp_path / "good", scored(0.9, 1))
    write_run(tmp_path / "odd", text)
    good, odd = summary_rows(tmp_path)
    assert (good.score, good.seeds, good.missing_seeds) == (0.9, (1,), ())
    assert (odd.state, odd.run) == ("unreadable", "odd")
    assert odd.reason.startswith("run.json: ")
    assert "\n" not in odd.reason


def test_bytes_that_are_no_text(tmp_path):
    (write_run(tmp_path / "odd", "") / "run.json").write_bytes(b'{"schema": 1, "method": "\xff\xfe"}')
    assert summary_rows(tmp_path)[0].state == "unreadable"


def test_a_run_that_was_killed_before_its_first_record(tmp_path):
    (write_run(tmp_path / "odd", "") / "run.json").unlink()
    (row,) = summary_rows(tmp_path)
    assert (row.state, row.reason) == ("unreadable", "run.json: No such file or directory")


def test_no_run_is_the_user_s_mistake(tmp_path):
    with pytest.raises(UserError, match="no run"):
        summary_rows(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        summary_rows(tmp_path / "nowhere")


def test_runs_are_found_at_any_depth_and_named_by_their_path(tmp_path):
    write_demo(tmp_path / "a" / "b")
    names = {run.name for run in read_runs(tmp_path)}
    assert len(names) == 13
    assert "a/b/lora-1" in names
    assert [run.name for run in read_runs(tmp_path / "a" / "b" / "lora-1")] == ["lora-1"]


def test_lines_that_are_no_measurement_are_left_out_of_curves(tmp_path):
    folder = write_run(tmp_path / "run", record("fvae-lora"))
    lines = [
        '{"event": "train", "epoch": 1, "loss": 3.0, "elbo": {"layer": {"gamma": 2.0, "w2": null}}}',
        '{"event": "train", "epoch": 2, "loss": NaN, "elbo": {"layer": {"gamma": Infinity}}}',
        '{"event": "train", "epoch": 3, "loss": true, "elbo": [1]}',
        '{"event": "train", "epoch": 4, "loss": 1e999, "elbo": {"layer": 3}}',
        '{"event": "train", "epoch": 5, "loss": ' + "9" * 400 + "}",
        '{"event": "train", "epoch": "six", "loss": 1.0}',
        '["train"]',
        '{"event": "train", "epoch": 8, "loss": 1.0}',
        '{"event": "train", "epoch": 9, "lo',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (run,) = read_runs(tmp_path)
    assert run.curve("train", "loss") == [(1, 3.0), (8, 1.0)]
    assert run.elbo() == {"layer": {"gamma": [(1, 2.0)]}}


def test_curves_of_a_run_come_back(tmp_path):
    write_run(tmp_path / "run", record("fvae-lora"), metrics("fvae-lora", epochs=2, layers=1))
    (run,) = read_runs(tmp_path)
    assert len(run.curve("train", "loss")) == 14
    assert [x for x, _ in run.curve("validation", "accuracy")] == [1, 2]
    assert list(run.elbo()) == ["vit.layers.0.attention.q_proj", "vit.layers.0.attention.k_proj"]
    assert all(list(terms) == ["reconstruction", "kl_z1", "gamma", "w2"] for terms in run.elbo().values())


def test_the_mean_curve_goes_as_far_as_every_seed():
    assert mean_curve([[(1, 2.0), (2, 4.0), (3, 9.0)], [(1, 4.0), (2, 8.0)]]) == [(1, 3.0), (2, 6.0)]
    assert mean_curve([[], [(1, 4.0)]]) == [(1, 4.0)]
    assert mean_curve([[], []]) == []


def test_thinning_averages_neighbours():
    curve = [(1.0, 1.0), (2.0, 3.0), (3.0, 5.0), (4.0, 9.0), (5.0, 11.0)]
    assert thinned(curve, 3) == [(1.5, 2.0), (3.5, 7.0), (5.0, 11.0)]
    assert thinned(curve, 5) == curve
    assert thinned([], 5) == []


def test_a_record_from_before_a_setting_existed_is_of_the_same_recipe(tmp_path):
    recipe = load_recipe("image/default", options={"model": "tiny-vit", "dataset": "digits", "method": "lora"})
    today = recipe.model_dump()
    before = {key: value for key, value in today.items() if key not in ("speech", "commonsense")}
    write_run(tmp_path / "1", record("lora", 1, recipe=before))
    write_run(tmp_path / "2", record("lora", 2, recipe=today | {"seed": 2}))
    assert [row.seeds for row in summary_rows(tmp_path)] == [(1, 2)]
