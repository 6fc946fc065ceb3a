"""Trackers get the learning curve, and a run that is resumed goes on in its track."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.integrations import TensorBoardCallback

from finished_runs import stop_after_first_epoch, stopping_after_first_epoch
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.run.tracking import MODULES, one_track
from fvae_lora_experiments.run.trainer import trainer_arguments
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Metric

Cli = Callable[..., tuple[int, str, str]]
TRACKED = {"report_to": ["tensorboard"]}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("tracker", MODULES)
def test_a_tracker_that_is_not_installed_is_one_line(
    cli: Cli, small: list[str], tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in MODULES[tracker] else found(name))
    options = ["--method", "lora", "--out", tmp_path / "run", "--quiet", f"train.report_to=[{tracker}]"]
    code, _, error = cli("train", "image/default", *small, *options)
    line = f"fvae-lora: train.report_to: {tracker} is not installed; pip install {tracker}\n"
    assert (code, error) == (2, line)
    assert not (tmp_path / "run" / "run.json").exists()


def test_tensorboard_has_the_learning_curve_with_the_terms_of_the_elbo(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    record = run_recipe(make_recipe(method="fvae-lora", train=TRACKED), tmp_path, quiet=True)
    found = scalars(tmp_path / "tensorboard")
    elbo = {f"train/elbo/{term}" for term in ("reconstruction", "kl_z1")}
    assert elbo | {"train/loss", "train/task_loss", "train/learning_rate", "eval/accuracy", "eval/loss"} <= found.keys()
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    losses = [(event["step"], pytest.approx(event["loss"])) for event in curve if event["event"] == "train"]
    assert found["train/loss"] == losses
    assert evaluate(tmp_path, quiet=True) == record.metrics.test
    assert scalars(tmp_path / "tensorboard") == found, "scoring is no run of its own"


def test_a_resumed_run_goes_on_in_the_same_track(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = make_recipe(method="fvae-lora", train=TRACKED)
    stop_after_first_epoch(recipe, tmp_path)
    first = json.loads((tmp_path / "tracking.json").read_text())
    run_recipe(recipe, tmp_path, quiet=True)
    assert json.loads((tmp_path / "tracking.json").read_text()) == first
    assert [step for step, _ in scalars(tmp_path / "tensorboard")["eval/loss"]] == [4, 8]
    assert len({file.parent for file in tmp_path.rglob("events.out.tfevents.*")}) == 1


@pytest.mark.slow
def test_mlflow_has_one_run_of_a_run_that_was_resumed(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    options = ["train.report_to=[mlflow]", "--out", tmp_path / "run", "--quiet"]
    train = ("train", "image/default", *small, "--method", "fvae-lora", *options)
    with stopping_after_first_epoch():
        assert cli(*train)[0] == 1
    assert cli(*train)[0] == 0
    client = mlflow.MlflowClient()
    (done,) = client.search_runs([client.get_experiment_by_name("fvae-lora").experiment_id])
    assert done.info.run_name.startswith("run-")
    assert {"elbo/kl_z1", "elbo/reconstruction", "task_loss", "eval_accuracy"} <= done.data.metrics.keys()
    assert [m.step for m in client.get_metric_history(done.info.run_id, "eval_loss")] == [4, 8]


def test_a_tracker_that_cannot_write_is_one_line(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    options = ["train.report_to=[mlflow]", "--method", "lora", "--out", tmp_path / "run", "--quiet"]
    code, _, error = cli("train", "image/default", *small, *options)
    assert code == 1
    assert error.startswith(f"fvae-lora: {tmp_path / 'run'}: train.report_to: mlflow: ")
    assert error.count("\n") == 1


def test_a_track_is_found_again_by_its_names(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What wandb, MLflow and trackio know a run by is the same each time, and what somebody set themselves stays."""
    folder = RunFolder(tmp_path / "lora-seed1")
    folder.path.mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    recipe = make_recipe(train={"report_to": ["wandb", "mlflow", "trackio"]})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    import os

    seen = []
    for _ in range(2):
        arguments = trainer_arguments(recipe, folder.checkpoints, Metric("accuracy"), quiet=True)
        with one_track(folder, arguments) as (mlflow_run,):
            seen.append((arguments.run_name, os.environ["WANDB_RUN_ID"], os.environ.get("MLFLOW_RUN_ID")))
            assert (os.environ["WANDB_RESUME"], os.environ["WANDB_PROJECT"]) == ("allow", "mine")
            mlflow_run.remember("0123")  # type: ignore[attr-defined]
        assert "WANDB_RUN_ID" not in os.environ
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][0].startswith("lora-seed1-")
    assert [mlflow for *_, mlflow in seen] == [None, "0123"]


def test_nothing_is_tracked_where_nobody_asked(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run_recipe(make_recipe(train={"epochs": 1}), tmp_path, quiet=True)
    assert not (tmp_path / "tracking.json").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_transformers_own_callback_is_active(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = make_recipe(train=TRACKED)
    assert trainer_arguments(recipe, tmp_path, Metric("accuracy"), quiet=True).report_to == ["tensorboard"]
    assert TensorBoardCallback().logging_dir is None


def test_a_tracker_may_be_added_when_a_run_goes_on(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    record = run_recipe(make_recipe(train={"epochs": 1}), tmp_path, quiet=True)
    assert run_recipe(make_recipe(train={"epochs": 1, **TRACKED}), tmp_path, quiet=True) == record
    with pytest.raises(UserError, match=r"train\.log_every is 2 there and 3 here"):
        run_recipe(make_recipe(train={"epochs": 1, "log_every": 3}), tmp_path, quiet=True)
