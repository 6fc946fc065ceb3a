"""Searches in processes of their own: killed, stopped, and several at once in one folder."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fvae_lora_experiments.tune.outcome import read_search
from fvae_lora_experiments.tune.study import StudyFolder
from sweeps import Tune, assert_same, left, states


def trials(out: Path, method: str = "lora") -> list[tuple[int, Any, Any, Any]]:
    search = read_search(StudyFolder(out / method))
    return [(trial.number, dict(trial.values), trial.score, trial.reason) for trial in search.trials]


@pytest.fixture
def options(small: list[str]) -> list[str]:
    kept = [word for word in small if not word.startswith(("adapter.r=", "train.epochs="))]
    return [*kept, "train.epochs=6", "--methods", "lora", "--trials", "8"]


@pytest.mark.slow
def test_a_search_that_is_killed_again_and_again_ends_like_one_that_is_not(options: list[str], tmp_path: Path) -> None:
    undisturbed = Tune(tmp_path / "undisturbed", options)
    assert undisturbed.end() == 0, undisturbed.said
    for count in (1, 3, 6):
        search = Tune(tmp_path / "s", options, said=f"{count}.said")
        search.wait_for_runs(count)
        assert search.kill() == -signal.SIGKILL
    search = Tune(tmp_path / "s", options)
    assert search.end() == 0, search.said
    assert trials(tmp_path / "s") == trials(tmp_path / "undisturbed")
    assert_same(left(tmp_path / "undisturbed"), left(tmp_path / "s"))
    best = [(tmp_path / name / "best.yaml").read_text() for name in ("s", "undisturbed")]
    assert best[0] == best[1]


@pytest.mark.slow
def test_two_workers_share_the_trials_of_one_search(options: list[str], tmp_path: Path) -> None:
    workers = [Tune(tmp_path / "s", options, said=f"{number}.said") for number in (1, 2)]
    for worker in workers:
        assert worker.end() == 0, worker.said
    found = trials(tmp_path / "s")
    assert [number for number, *_ in found] == list(range(1, 9))
    done = [worker.said.count("lora trial ") for worker in workers]
    assert sum(done) == 8, "each trial is done by one of them"
    assert min(done) > 0
    assert set(states(tmp_path / "s").values()) <= {"complete", "pruned"}
    assert (tmp_path / "s" / "best.yaml").exists()


@pytest.mark.slow
def test_what_a_killed_worker_had_begun_another_goes_on_with(options: list[str], tmp_path: Path) -> None:
    first = Tune(tmp_path / "s", options, said="1.said")
    first.wait_for_runs(1)
    second = Tune(tmp_path / "s", options, said="2.said")
    second.wait_for(lambda: "lora trial 2/8" in second.said)
    first.kill()
    assert second.end() == 0, second.said
    assert [number for number, *_ in trials(tmp_path / "s")] == list(range(1, 9))
    assert "running" not in states(tmp_path / "s").values()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_search_says_so_in_one_line_and_resumes(
    options: list[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    search = Tune(tmp_path / "s", options, said="1.said")
    search.wait_for_runs(2)
    assert search.kill(number) == code
    assert search.said.endswith("fvae-lora: stopped; the same command resumes where it was\n")
    assert "Traceback" not in search.said
    again = Tune(tmp_path / "s", options)
    assert again.end() == 0, again.said
    assert len(trials(tmp_path / "s")) == 8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("cluster")
def test_jobs_of_a_cluster_share_the_trials_of_one_search(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fvae_lora_experiments", *Tune.COMMAND, *options, "--out", str(tmp_path / "s")]
    job = ["sbatch", "--wait", "--array=1-2", f"--output={tmp_path}/job-%a.said", f"--wrap={shlex.join(command)}"]
    done = subprocess.run(job, capture_output=True, text=True)
    said = [file.read_text() for file in sorted(tmp_path.glob("job-*.said"))]
    assert done.returncode == 0, (done.stderr, said)
    assert [number for number, *_ in trials(tmp_path / "s")] == list(range(1, 9))
    assert sum(each.count("lora trial ") for each in said) == 8
