"""Sweeps: what is planned, what is skipped, what fails, and what survives a kill."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from arguments import later_wins
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.report import summary_rows
from fvae_lora_experiments.run import runner
from fvae_lora_experiments.sweep.local import THREAD_LIMITS, LocalLauncher
from fvae_lora_experiments.sweep.plan import PlannedRun, contenders, parse_list, parse_values, runs_of
from fvae_lora_experiments.sweep.run_sweep import run_sweep
from sweeps import Compare, assert_survives, states

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def planned(vit: Path, pictures: Path, tmp_path: Path) -> Callable[..., list[PlannedRun]]:
    def make(methods: list[str], seeds: list[int], *more: str, vary: list[str] | None = None) -> list[PlannedRun]:
        varied = {text.partition("=")[0] for text in vary or []}
        overrides = later_wins(["train.epochs=2", "train.batch_size=8", "adapter.r=4", *more])
        overrides = [override for override in overrides if override.partition("=")[0] not in varied]
        places = {"model": str(vit), "dataset": str(pictures)}
        variations = parse_values("--vary", vary or [])
        return runs_of(contenders("image/default", tmp_path / "runs", methods, overrides, places, variations), seeds)

    return make


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def do(planned: PlannedRun) -> None:
    """In this process, which has imported everything."""
    runner.run_recipe(planned.recipe, planned.folder.path, quiet=True)


def test_a_plan_is_every_combination(planned: Callable[..., list[PlannedRun]]) -> None:
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


def test_only_what_is_missing_is_run(planned: Callable[..., list[PlannedRun]]) -> None:
    do(*planned(["linear-probe"], [1]))
    runs = planned(["linear-probe"], [1, 2])
    first = runs[0].folder.record_file
    before = first.stat().st_mtime_ns
    console = quiet()
    assert run_sweep(runs, LocalLauncher(2), console) == []
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 of 2 runs are done already" in said
    assert "linear-probe-seed2: done" in said
    assert "linear-probe-seed1: done" not in said
    assert first.stat().st_mtime_ns == before
    assert all(run.is_done() for run in runs)
    (row,) = summary_rows(runs[0].folder.path.parent)
    assert row.seeds == (1, 2)


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(planned: Callable[..., list[PlannedRun]]) -> None:
    runs = planned(["linear-probe"], [1], "train.max_grad_norm=0", vary=["train.learning_rate=[0.001, 1.0e+30]"])
    (failure,) = run_sweep(runs, LocalLauncher(2), quiet())
    assert failure.startswith("linear-probe-learning_rate=1e+30-seed1: failed: the ")
    assert "at step" in failure
    states = {run.name: record.state for run in runs if (record := run.folder.read())}
    assert sorted(states.values()) == ["complete", "failed"]


def test_a_run_that_another_sweep_is_on_is_left_alone(
    planned: Callable[..., list[PlannedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fvae_lora_experiments.sweep.launcher.LOCK_WAIT_S", 0.1)
    (run,) = planned(["linear-probe"], [1])
    with run.folder.locked(), pytest.raises(UserError, match="another process is using"):
        run_sweep([run], LocalLauncher(1), quiet())


def test_a_folder_with_another_recipes_run_starts_nothing(planned: Callable[..., list[PlannedRun]]) -> None:
    do(*planned(["linear-probe"], [1]))
    runs = planned(["linear-probe"], [1, 2], "train.batch_size=9")
    with pytest.raises(UserError, match=r"train\.batch_size is 8 there and 9 here"):
        run_sweep(runs, LocalLauncher(1), quiet())
    assert not runs[1].folder.path.exists()


@pytest.mark.slow
def test_no_run_outlives_a_sweep_that_is_killed(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "s"
    sweep = Compare(out, [*small, "train.epochs=500", "--methods", "fvae-lora,lora", "--seeds", "1"])
    sweep.wait_for_runs(2)
    workers = sweep.workers()
    assert len(workers) >= 2
    sweep.kill()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert set(states(out).values()) == {"running"}


@pytest.mark.slow
def test_a_run_whose_process_is_killed_has_failed_and_its_record_says_how(small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "s"
    sweep = Compare(out, [*small, "train.epochs=500", "--methods", "lora", "--seeds", "1"])
    sweep.wait_for_runs(1)
    (worker,) = sweep.workers()
    worker.kill()
    assert sweep.end() == 1
    assert "lora-seed1: failed: killed by SIGKILL" in sweep.said
    assert "(0/1 done, 0 running, 1 failed, 0 waiting)" in sweep.said
    (row,) = summary_rows(out)
    assert (row.state, row.score) == ("failed", None)
    assert row.reason.startswith("killed by SIGKILL")


@pytest.mark.slow
def test_a_process_that_dies_before_its_run_began_leaves_a_failed_run_and_its_last_lines(
    planned: Callable[..., list[PlannedRun]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nprint('a')\nprint('b')\nprint('c')\nprint(os.getcwd() + '/d', flush=True)\nos.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (run,) = planned(["lora"], [1])
    assert run_sweep([run], LocalLauncher(1), quiet()) == [f"{run.name}: failed: killed by SIGABRT: b | c | d"]
    record = run.folder.read()
    assert record is not None
    assert (record.state, record.reason) == ("failed", "killed by SIGABRT: b | c | d")
    monkeypatch.undo()
    assert run_sweep([run], LocalLauncher(1), quiet()) == []
    assert (again := run.folder.read()) is not None
    assert again.state == "complete"


def test_where_no_run_can_be_begun_the_command_says_why(small: list[str], cli: Cli, tmp_path: Path) -> None:
    run = ["compare", "image/default", *small, "--methods", "lora", "--seeds", "1", "--out", tmp_path / "s"]
    code, _, error = cli(*run, "data.image_column=nope")
    assert code == 2
    assert error.startswith("fvae-lora: lora-seed1: dataset ")
    assert "data.image_column" in error
    assert error.count("\n") == 1
    assert not states(tmp_path / "s")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 200 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_on_a_full_disk_runs_fail_and_say_so(small: list[str], cli: Cli, small_disk: Path) -> None:
    out = small_disk / "s"
    code, said, error = cli("compare", "image/default", *small, "--methods", "full", "--seeds", "1,2,3", "--out", out)
    assert code == 1
    assert "of 3 runs failed; the same command tries them again; the first: full-seed" in error
    assert error.count("\n") == 1
    assert ": failed: " in said
    rows = summary_rows(out)
    assert sum(row.state == "complete" for row in rows) <= 1
    assert "failed" in {row.state for row in rows}
    assert {row.state for row in rows} <= {"complete", "failed", "running"}


def test_a_read_only_folder_is_refused_in_one_line(small: list[str], cli: Cli, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    code, _, error = cli("compare", "image/default", *small, "--methods", "lora", "--seeds", "1", "--out", small_disk)
    assert code == 2
    assert error.startswith(f"fvae-lora: {small_disk}/lora-seed1: cannot be written to")
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sweeps_killed_ten_times_leave_what_an_undisturbed_one_does(small: list[str], tmp_path: Path) -> None:
    options = [*small, "train.epochs=6", "--methods", "fvae-lora,lora,linear-probe", "--seeds", "1"]
    assert_survives(10, tmp_path, options, lambda sweep: [worker.kill for worker in sweep.workers()])


@pytest.mark.parametrize(
    ("variables", "jobs", "threads"),
    [
        ({}, 1, "8"),
        ({}, 2, "4"),
        ({}, 99, "1"),
        ({"OMP_NUM_THREADS": "2"}, 1, "2"),
        ({"OMP_NUM_THREADS": "2"}, 8, "1"),
        ({"OMP_NUM_THREADS": "64"}, 2, "4"),
        ({"OMP_NUM_THREADS": "3,2"}, 1, "3"),
        ({"MKL_NUM_THREADS": "1"}, 1, "1"),
        ({"OMP_THREAD_LIMIT": "2", "OPENBLAS_NUM_THREADS": "3"}, 1, "2"),
        ({"OMP_NUM_THREADS": ""}, 1, "8"),
    ],
)
def test_workers_share_the_cores_within_what_the_user_allows(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], jobs: int, threads: str
) -> None:
    monkeypatch.setattr("fvae_lora_experiments.sweep.local.cores", lambda: 8)
    for name in THREAD_LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [share["OMP_NUM_THREADS"] for share in LocalLauncher(jobs).shares] == [threads] * jobs
