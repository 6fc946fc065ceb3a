"""What a sweep shows while it runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.sweep.plan import PlannedRun
from fvae_lora_experiments.sweep.progress_display import ProgressDisplay


@pytest.fixture
def runs(make_recipe: Callable[..., Recipe], tmp_path: Path) -> list[PlannedRun]:
    recipe = make_recipe(train={"epochs": 2})
    return [PlannedRun(recipe, RunFolder(tmp_path / str(i)), f"run-{i}") for i in range(1440)]


@pytest.mark.parametrize("minutes", [1, 600])
def test_a_terminal_of_80_columns_shows_all_counts_and_the_end(runs: list[PlannedRun], minutes: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ProgressDisplay(1440, runs[900:], console) as board:
        board.started -= 60 * minutes
        board.show(runs[913:929], [(run, "failed: no" if run is runs[900] else None) for run in runs[900:913]])
    last = console.file.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
    assert "912/1440 done, 16 running, 1 failed, 511 waiting" in last
    assert "ends " in last
    assert "…" not in last


def test_a_log_gets_a_line_now_and_then_while_no_run_ends(
    runs: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), width=80)
    with ProgressDisplay(4, runs[1:4], console) as board:
        board.show(runs[1:3])
        monkeypatch.setattr("fvae_lora_experiments.sweep.progress_display.REPORT_INTERVAL_S", 0)
        board.show(runs[1:3])
    assert console.file.getvalue() == "1/4 done, 2 running, 0 failed, 1 waiting\n"  # type: ignore[attr-defined]


def test_a_log_gets_a_line_for_each_run_that_ended(runs: list[PlannedRun]) -> None:
    console = Console(file=io.StringIO(), width=80)
    with ProgressDisplay(4, runs[1:4], console) as board:
        board.show(runs[1:3])
        board.started -= 100
        board.show([runs[3]], [(runs[1], None), (runs[2], "failed: the loss is nan at step 3")])
        board.show([], [(runs[3], None)])
    first, second, third = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first.startswith("run-1: done (2/4 done, 1 running, 1 failed, 0 waiting, ends ")
    assert first.endswith(", in 0:00:50)")
    assert second.startswith("run-2: failed: the loss is nan at step 3 (2/4 done, ")
    assert third == "run-3: done (3/4 done, 0 running, 1 failed, 0 waiting)"
