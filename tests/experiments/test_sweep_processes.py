"""Runs of a sweep that several processes do together."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.sweep import child
from fvae_lora_experiments.sweep.local import LocalLauncher
from fvae_lora_experiments.sweep.plan import contenders, runs_of
from fvae_lora_experiments.sweep.run_sweep import run_sweep
from processes import assert_alike
from sweeps import Compare, assert_survives, states

Cli = Callable[..., tuple[int, str, str]]


def together(sweep: Compare) -> list[psutil.Process]:
    """The processes that do the runs, those that wait for them not among them."""
    return [process for parent in sweep.workers() for process in parent.children()]


@pytest.mark.slow
def test_two_processes_of_a_sweep_leave_what_one_does(vit: Path, pictures: Path, tmp_path: Path) -> None:
    batches = ["train.epochs=2", "train.batch_size=8", "data.train_rows=24"]
    without_noise = ["adapter.r=4", "adapter.dropout=0", "image.augmentation=[]"]
    places = {"model": str(vit), "dataset": str(pictures)}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        runs = runs_of(contenders("image/default", out, ["lora", "linear-probe"], batches + without_noise, places), [1])
        assert run_sweep(runs, LocalLauncher(1, processes), Console(file=io.StringIO())) == []
    for planned in runs:
        assert_alike(tmp_path / "1" / planned.name, tmp_path / "2" / planned.name)


@pytest.mark.slow
def test_processes_that_cannot_be_forks_leave_the_same(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(adapter={"dropout": 0}, data={"train_rows": 24})
    run_recipe(recipe, tmp_path / "alone", quiet=True)
    monkeypatch.setattr(child, "_can_fork", lambda: False)
    with pytest.raises(SystemExit) as end:
        child.do_run(str(tmp_path / "together"), recipe.model_dump_json(), 2)
    assert end.value.code == 0
    assert_alike(tmp_path / "alone", tmp_path / "together")


@pytest.mark.slow
def test_a_killed_process_is_a_failed_run_that_the_same_command_takes_up(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "s"
    options = [*small, "train.epochs=30", "--methods", "lora", "--seeds", "1", "--processes", "2"]
    sweep = Compare(out, options)
    sweep.wait_for_runs(1)
    pair = together(sweep)
    assert len(pair) == 2
    pair[1].kill()
    assert sweep.end() == 1, sweep.said
    assert "lora-seed1: failed: killed by SIGKILL: " in sweep.said, "with the last lines of the other"
    assert states(out) == {"lora-seed1": "failed"}
    assert not any(process.is_running() for process in pair)
    assert Compare(out, options).end() == 0
    assert states(out) == {"lora-seed1": "complete"}


@pytest.mark.slow
def test_a_run_that_cannot_be_shared_out_is_refused_in_one_line(small: list[str], cli: Cli, tmp_path: Path) -> None:
    run = ["compare", "image/default", *small, "--methods", "lora", "--seeds", "1", "--out", tmp_path / "s"]
    code, _, error = cli(*run, "--processes", "3")
    assert code == 2
    assert error == (
        "fvae-lora: lora-seed1: train.batch_size: 8 rows cannot be divided evenly among 3 processes; "
        "multiples of 3 are allowed\n"
    )
    assert not states(tmp_path / "s")


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("jobs", "gpus", "expected"),
    [
        (2, 2, ["2,3", "6,7"]),
        (1, 3, ["2,3,6"]),
        (2, 1, ["2", "3"]),
        (2, 0, ["", ""]),
        (5, None, ["2", "3", "6", "7", "2"]),
    ],
)
def test_runs_at_once_have_gpus_of_their_own(jobs: int, gpus: int | None, expected: list[str]) -> None:
    assert [share["CUDA_VISIBLE_DEVICES"] for share in LocalLauncher(jobs, gpus or 1, gpus).shares] == expected


@pytest.mark.usefixtures("four_gpus")
def test_more_gpus_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match=r"^--gpus 2: with --jobs 3 that takes 6 GPUs; this machine has 4$"):
        LocalLauncher(3, 2, 2)


def test_processes_are_for_runs_without_gpus(small: list[str], cli: Cli, tmp_path: Path) -> None:
    code, _, error = cli("compare", "image/default", *small, "--gpus", "2", "--processes", "3", "--out", tmp_path)
    assert code == 2
    assert error == "fvae-lora: --processes 3: for runs without GPUs; --gpus 2 starts a process for each GPU\n"


@pytest.mark.slow
@pytest.mark.hour
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills forks")
def test_sweeps_and_processes_killed_ten_times_leave_what_an_undisturbed_sweep_does(
    small: list[str], tmp_path: Path
) -> None:
    options = [*small, "train.epochs=6", "--methods", "fvae-lora,lora,linear-probe", "--seeds", "1"]

    def kills(sweep: Compare) -> list[Callable[[], object]]:
        return [process.kill for process in (*sweep.workers(), *together(sweep))]

    assert_survives(10, tmp_path, [*options, "--processes", "2"], kills)
