"""Sweeps: what is planned, what is skipped, what fails, and what survives a kill."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.launchers.local import LocalLauncher
from fvae_lora.experiments.plan import Planned, parse_list, parse_values, plan
from fvae_lora.experiments.report import summary_rows
from fvae_lora.experiments.sweep import sweep

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def planned(vit: Path, pictures: Path, tmp_path: Path) -> Callable[..., list[Planned]]:
    def make(methods: list[str], seeds: list[int], *more: str, vary: list[str] | None = None) -> list[Planned]:
        overrides = ["train.epochs=2", "train.batch_size=8", "adapter.r=4", *more]
        places = {"model": str(vit), "dataset": str(pictures)}
        variations = parse_values("--vary", vary or [])
        return plan("image/default", tmp_path / "runs", methods, seeds, overrides, places, variations)

    return make


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_plan_is_every_combination(planned: Callable[..., list[Planned]]) -> None:
    runs = planned(["lora", "full"], [1, 2], vary=["train.learning_rate=[0.001, 0.01]", "adapter.r=[2]"])
    assert sorted(run.name for run in runs) == sorted(
        f"{method}-learning_rate={rate}-r=2-seed{seed}"
        for method in ("lora", "full")
        for rate in (1e-3, 1e-2)
        for seed in (1, 2)
    )
    for run in runs:
        assert run.recipe.method in run.name
        assert f"learning_rate={run.recipe.train.learning_rate:g}" in run.name
        assert run.recipe.adapter.r == 2


def test_lists_are_read_as_yaml() -> None:
    assert parse_list("--seeds", "1,2,42") == [1, 2, 42]
    with pytest.raises(UserError, match="--seeds"):
        parse_list("--seeds", "")


def test_only_what_is_missing_is_run(planned: Callable[..., list[Planned]]) -> None:
    sweep(planned(["linear-probe"], [1]), LocalLauncher(1), quiet())
    runs = planned(["linear-probe"], [1, 2])
    first = runs[0].folder.record_file
    before = first.stat().st_mtime_ns
    console = quiet()
    assert sweep(runs, LocalLauncher(2), console) == []
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 2 runs are done already" in said
    assert "linear-probe-seed2: done" in said
    assert "linear-probe-seed1: done" not in said
    assert first.stat().st_mtime_ns == before
    assert all(run.is_done() for run in runs)
    (row,) = summary_rows(runs[0].folder.path.parent)
    assert row.seeds == (1, 2)


def test_a_run_that_fails_does_not_stop_the_others(planned: Callable[..., list[Planned]]) -> None:
    runs = planned(["linear-probe"], [1], "train.max_grad_norm=0", vary=["train.learning_rate=[0.001, 1.0e+30]"])
    (failure,) = sweep(runs, LocalLauncher(2), quiet())
    assert failure.startswith("linear-probe-learning_rate=1e+30-seed1: failed: the ")
    assert "at step" in failure
    states = {run.name: (run.folder.read() or {})["state"] for run in runs}
    assert sorted(states.values()) == ["complete", "failed"]


def test_a_run_that_another_sweep_is_on_is_left_alone(
    planned: Callable[..., list[Planned]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fvae_lora.experiments.launchers.LETTING_GO_S", 0.1)
    (run,) = planned(["linear-probe"], [1])
    with run.folder.locked(), pytest.raises(UserError, match="another process is using"):
        sweep([run], LocalLauncher(1), quiet())


def test_a_folder_with_another_recipes_run_starts_nothing(planned: Callable[..., list[Planned]]) -> None:
    sweep(planned(["linear-probe"], [1]), LocalLauncher(1), quiet())
    runs = planned(["linear-probe"], [1, 2], "train.batch_size=9")
    with pytest.raises(UserError, match=r"train\.batch_size is 8 there and 9 here"):
        sweep(runs, LocalLauncher(1), quiet())
    assert not runs[1].folder.path.exists()


def start_compare(
    out: Path, vit: Path, pictures: Path, methods: str, seeds: str, epochs: int
) -> subprocess.Popen[bytes]:
    program = "from fvae_lora.experiments.cli import main; main()"
    options = [
        "--model",
        vit,
        "--dataset",
        pictures,
        "--methods",
        methods,
        "--seeds",
        seeds,
        "--jobs",
        "2",
        "--out",
        out,
    ]
    settings = [f"train.epochs={epochs}", "train.batch_size=8", "adapter.r=4"]
    command = [sys.executable, "-c", program, "compare", "image/default", *settings, *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def curves(folder: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in sorted(folder.glob("*/metrics.jsonl"))}


def test_no_run_outlives_a_sweep_that_is_killed(vit: Path, pictures: Path, tmp_path: Path) -> None:
    process = start_compare(tmp_path / "s", vit, pictures, "fvae-lora,lora", "1", 500)
    while len(list((tmp_path / "s").glob("*/metrics.jsonl"))) < 2:
        time.sleep(0.05)
        assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
    process.kill()
    process.wait()
    time.sleep(1.5)
    before = curves(tmp_path / "s")
    time.sleep(1)
    assert curves(tmp_path / "s") == before
    for run in (tmp_path / "s").iterdir():
        assert json.loads((run / "run.json").read_text())["state"] == "running"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_killed_five_times_reports_what_an_undisturbed_one_does(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    methods, seeds, epochs = "fvae-lora,lora,linear-probe,full", "1,2,42", 8
    undisturbed = start_compare(tmp_path / "a", vit, pictures, methods, seeds, epochs)
    began = time.monotonic()
    said, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, said.decode()
    duration = time.monotonic() - began
    for _ in range(5):
        process = start_compare(tmp_path / "b", vit, pictures, methods, seeds, epochs)
        time.sleep(random.uniform(0.1, 0.4) * duration)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    last = start_compare(tmp_path / "b", vit, pictures, methods, seeds, epochs)
    said, _ = last.communicate()
    assert last.returncode == 0, said.decode()
    assert curves(tmp_path / "a") == curves(tmp_path / "b")
    assert len(curves(tmp_path / "a")) == 12

    def told(folder: Path) -> list[tuple[object, ...]]:
        rows = summary_rows(folder)
        return [(r.label, r.seeds, r.accuracy, r.accuracy_std, r.inference_parameters, r.train_flops) for r in rows]

    assert told(tmp_path / "a") == told(tmp_path / "b")
