"""The benchmark of the paper as a whole, at a tiny size: by names on the hub, on this machine and through SLURM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.report import summary_rows
from hub import CLASSES, SMALL, Hub, command_line
from sweeps import left, states

DATA_SETS = ("dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")
MANY_S = 3600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * MANY_S)]


def compare(
    hub: Hub, out: Path, data_sets: Sequence[str], methods: Sequence[str], seeds: str, *launcher: str
) -> dict[str, Any]:
    """What `fvae-lora compare` leaves in `out`, by the run's name."""
    what = (",".join(f"image/{name}" for name in data_sets), *SMALL, "--methods", ",".join(methods), "--seeds", seeds)
    home = hub.environment(out.parent / "home")
    done = command_line(home, "compare", *what, "--jobs", "2", *launcher, "--out", out, timeout_s=MANY_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return left(out)


def assert_complete(folder: Path, runs: dict[str, Any], data_sets: Sequence[str], seeds: tuple[int, ...]) -> None:
    """Every run is there and complete, and the report shows each method on each data set with all of its seeds."""
    assert runs.keys() == {f"{name}/{method}-seed{s}" for name in data_sets for method in METHODS for s in seeds}
    assert {run["record"]["state"] for run in runs.values()} == {"complete"}
    rows = {(row.dataset.partition(" ")[0], row.method): row for row in summary_rows(folder)}
    assert len(rows) == len(data_sets) * len(METHODS)
    assert {name for name, _ in rows} <= set(CLASSES)
    assert {(row.state, row.seeds, row.missing_seeds) for row in rows.values()} == {("complete", seeds, ())}


def test_data_sets_and_every_method_complete_and_the_report_shows_them(hub: Hub, tmp_path: Path) -> None:
    runs = compare(hub, tmp_path / "runs", DATA_SETS[:2], list(METHODS), "1")
    assert_complete(tmp_path / "runs", runs, DATA_SETS[:2], (1,))


@pytest.mark.hour
@pytest.mark.usefixtures("cluster")
def test_all_six_complete_here_and_slurm_leaves_the_same(hub: Hub, tmp_path: Path) -> None:
    cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
    here = compare(hub, tmp_path / "here", DATA_SETS, list(METHODS), "1,2")
    assert_complete(tmp_path / "here", here, DATA_SETS, (1, 2))
    there = compare(hub, tmp_path / "there", DATA_SETS, list(METHODS), "1,2", "--launcher", "slurm", "--cpus", cores)
    assert len(there) == 192
    assert set(states(tmp_path / "there").values()) == {"complete"}
    for name, run in here.items():
        assert there[name]["record"] == run["record"]
        assert there[name]["curve"] == run["curve"]
