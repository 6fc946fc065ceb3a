"""Sweeps through a real SLURM, of one node, where it is installed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from processes import assert_alike
from sweeps import Compare, assert_same, assert_survives, left, states

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")]


def compare(out: Path, *options: str) -> Compare:
    return Compare(out, ["--launcher", "slurm", *options])


def arrays(out: Path) -> list[Path]:
    return sorted((out / ".slurm").glob("fvae-lora-*"))


def working(out: Path) -> list[psutil.Process]:
    """The processes of the jobs of the sweep in `out`."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "submitit.core._submit" in (command := process.info["cmdline"] or []) and str(out / ".slurm") in command[-1]
    ]


def test_slurm_leaves_what_this_machine_does(small: list[str], tmp_path: Path) -> None:
    cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
    options = [*small, "--methods", "fvae-lora,lora", "--seeds", "1"]
    local = Compare(tmp_path / "local", options)
    assert local.end() == 0, local.said
    jobs = compare(tmp_path / "slurm", *options, "--cpus", cores)
    assert jobs.end() == 0, jobs.said
    assert_same(left(tmp_path / "local"), left(tmp_path / "slurm"))
    assert not arrays(tmp_path / "slurm"), "what a finished sweep needs no more"
    assert "(2/2 done, 0 running, 0 failed, 0 waiting)" in jobs.said
    assert "\x1b" not in jobs.said


def test_jobs_outlive_a_sweep_that_is_stopped_and_the_same_command_waits_for_them(
    small: list[str], tmp_path: Path
) -> None:
    out, options = tmp_path / "s", [*small, "train.epochs=30", "--methods", "lora", "--seeds", "1,2"]
    first = compare(out, *options)
    first.wait_for_runs(1)
    assert first.kill(signal.SIGINT) == 130
    (array,) = arrays(out)
    assert len(json.loads((array / "runs.json").read_text())) == 2
    told, stopped = first.said.splitlines()[-2:]
    assert told.startswith("the jobs go on: the same command waits for them, `scancel ")
    assert stopped == "fvae-lora: stopped; the same command resumes where it was"
    again = compare(out, *options)
    while again.lasts(0.2):
        assert arrays(out) in ([array], []), "the runs were submitted twice"
    assert again.end() == 0
    assert set(states(out).values()) == {"complete"}


def test_a_sweep_killed_between_sbatch_and_its_notes_submits_again(small: list[str], tmp_path: Path) -> None:
    out, options = tmp_path / "s", [*small, "--methods", "linear-probe", "--seeds", "1"]
    half = out / ".slurm" / "fvae-lora-half"
    half.mkdir(parents=True)
    (half / "runs.json").write_text(json.dumps([[str(out / "linear-probe-seed1"), ""]]))
    subprocess.run(["sbatch", f"--job-name={half.name}", "--output=/dev/null", "--wrap=sleep 600"], check=True)
    again = compare(out, *options)
    assert again.end() == 0, again.said
    queued = subprocess.run(["squeue", "--noheader", f"--name={half.name}"], capture_output=True, check=True)
    assert not queued.stdout


def test_a_lost_node_is_a_failed_run_that_the_same_command_takes_up(small: list[str], tmp_path: Path) -> None:
    out, options = tmp_path / "s", [*small, "train.epochs=30", "--methods", "lora", "--seeds", "1"]
    node = socket.gethostname().partition(".")[0]
    sweep = compare(out, *options)
    sweep.wait_for_runs(1)
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    assert sweep.end() == 1, sweep.said
    record = json.loads((out / "lora-seed1" / "run.json").read_text())
    assert record["state"] == "failed"
    assert record["reason"].startswith("SLURM ended job ")
    assert ": NODE_FAIL" in record["reason"]
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"])  # or it is back already
    again = compare(out, *options)
    assert again.end() == 0, again.said
    assert states(out) == {"lora-seed1": "complete"}


def test_two_processes_of_a_job_leave_what_one_does(small: list[str], tmp_path: Path) -> None:
    options = [*small, "adapter.dropout=0", "data.train_rows=24", "--methods", "lora", "--seeds", "1"]
    one, two = compare(tmp_path / "one", *options), compare(tmp_path / "two", *options, "--processes", "2")
    assert (one.end(), two.end()) == (0, 0), one.said + two.said
    assert_alike(tmp_path / "one" / "lora-seed1", tmp_path / "two" / "lora-seed1")


def test_a_killed_process_of_a_job_is_a_failed_run_that_the_same_command_takes_up(
    small: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "s"
    options = [*small, "train.epochs=30", "--methods", "lora", "--seeds", "1", "--processes", "2"]
    sweep = compare(out, *options)
    sweep.wait_for_runs(1)
    job, *_, last = sorted(working(out), key=lambda process: process.create_time())
    assert last.ppid() == job.pid
    last.kill()
    assert sweep.end() == 1, sweep.said
    record = json.loads((out / "lora-seed1" / "run.json").read_text())
    assert record["state"] == "failed"
    assert record["reason"].startswith("killed by SIGKILL")
    assert not working(out)
    assert len(arrays(out)) == 1, "what the job wrote is kept"
    again = compare(out, *options)
    assert again.end() == 0, again.said
    assert states(out) == {"lora-seed1": "complete"}
    assert not arrays(out)


def test_a_sweep_longer_than_an_array_may_be_is_done(small: list[str], tmp_path: Path) -> None:
    sweep = compare(tmp_path / "s", *small, "train.epochs=1", "--methods", "linear-probe", "--seeds", "1,2,3,4")
    sweep.wait_for(lambda: len(arrays(tmp_path / "s")) == 2)
    assert sweep.end() == 0, sweep.said
    assert set(states(tmp_path / "s").values()) == {"complete"}


def test_a_partition_that_is_not_there_is_one_line(small: list[str], tmp_path: Path) -> None:
    sweep = compare(tmp_path / "s", *small, "--partition", "nowhere")
    assert sweep.end() == 2
    assert sweep.said.endswith("\nfvae-lora: --launcher slurm: sbatch: error: invalid partition specified: nowhere\n")
    assert sweep.said.count("fvae-lora:") == 1
    assert not states(tmp_path / "s")


def test_sweeps_and_jobs_killed_ten_times_leave_what_an_undisturbed_sweep_does(
    small: list[str], tmp_path: Path
) -> None:
    what = ["train.epochs=6", "--methods", "fvae-lora,lora,linear-probe", "--seeds", "1"]
    options = [*small, *what, "--launcher", "slurm"]
    assert_survives(10, tmp_path, options, lambda sweep: [job.kill for job in working(sweep.out)])
