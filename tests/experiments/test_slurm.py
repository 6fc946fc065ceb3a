"""Sweeps through SLURM: a stand-in that answers at once, and a real one where it is installed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from sweeps import Compare, assert_same, assert_survives, left, states

from fvae_lora.experiments.errors import RunError, UserError
from fvae_lora.experiments.launchers import slurm
from fvae_lora.experiments.launchers.slurm import SlurmLauncher
from fvae_lora.experiments.plan import Planned, plan
from fvae_lora.experiments.sweep import sweep

Cli = Callable[..., tuple[int, str, str]]
SCRIPT = Path(__file__).parents[1] / "slurm" / "local-slurm.sh"


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


# --- without a SLURM: what is said of it, by programs of its names


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in the place of a program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


@pytest.fixture
def run(vit: Path, pictures: Path, tmp_path: Path) -> Planned:
    places = {"model": str(vit), "dataset": str(pictures)}
    (run,) = plan("image/default", tmp_path / "runs", ["lora"], [1], ["train.epochs=2"], places)
    return run


@pytest.mark.parametrize("option", ["--partition=main", "--gpus=1", "--time=10", "--account=us", "--cpus=2"])
def test_an_option_of_slurm_needs_slurm(cli: Cli, small: list[str], tmp_path: Path, option: str) -> None:
    code, _, error = cli("compare", "image/default", *small, option, "--out", tmp_path / "runs")
    assert (code, error) == (2, f"fvae-lora: {option.partition('=')[0]}: only with --launcher slurm\n")


def test_without_slurm_the_launcher_says_so(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    code, _, error = cli("compare", "image/default", *small, "--launcher", "slurm", "--out", tmp_path / "runs")
    assert code == 2
    assert error == "fvae-lora: --launcher slurm: there is no SLURM here (no sbatch and squeue); try --launcher local\n"


def test_a_slurm_that_does_not_answer_is_one_line(
    cli: Cli, small: list[str], tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    programs("sbatch", "exit 1")
    programs("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    code, _, error = cli("compare", "image/default", *small, "--launcher", "slurm", "--out", tmp_path / "runs")
    assert code == 2
    assert error == "fvae-lora: --launcher slurm: slurm_load_jobs error: Unable to contact slurm controller\n"
    assert not states(tmp_path / "runs")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("TIMEOUT|0", "SLURM ended job 7: TIMEOUT"),
        ("OUT_OF_MEMORY|9", "SLURM ended job 7: OUT_OF_MEMORY"),
        ("NODE_FAIL|0", "SLURM ended job 7: NODE_FAIL"),
        ("CANCELLED|15", "SLURM ended job 7: CANCELLED"),
        ("FAILED|9", "killed by SIGKILL"),
        (f"FAILED|{(128 + 9) << 8}", "killed by SIGKILL"),
        (f"FAILED|{1 << 8}", "ended with exit code 1"),
        (None, "SLURM knows nothing of job 7 any more"),
    ],
)
def test_however_a_job_is_lost_its_run_has_failed_with_the_jobs_last_lines(
    run: Planned, tmp_path: Path, programs: Callable[[str, str], None], line: str | None, reason: str
) -> None:
    folder = tmp_path / "runs" / ".slurm"
    programs("srun", "exit 1")
    programs("squeue", f"test ! -e {tmp_path}/submitted || cat {tmp_path}/submitted")
    answer = "" if line is None else f"7|fvae-lora-x|{line}|"
    output = f"submitit INFO - Starting\\n\\nfirst\\n{Path.home()}/second\\n"
    programs(
        "sbatch",
        f"printf '{output}' >$(dirname $1)/7_0_log.out; echo '{answer}' | grep . >{tmp_path}/submitted; "
        "echo Submitted batch job 7",
    )
    reason = f"{reason}: first | second"
    assert sweep([run], SlurmLauncher(folder, 1), quiet()) == [f"{run.name}: failed: {reason}"]
    record = run.folder.read()
    assert record is not None
    assert (record["state"], record["reason"]) == ("failed", reason)


def test_a_slurm_that_falls_silent_is_waited_for_but_not_for_ever(
    run: Planned, tmp_path: Path, programs: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs("srun", "exit 1")
    programs("sbatch", f"echo Submitted batch job 7; touch {tmp_path}/submitted")
    programs("squeue", f"test ! -e {tmp_path}/submitted || {{ echo gone >&2; exit 1; }}")
    monkeypatch.setattr(slurm, "SILENCE_S", 1.0)
    with pytest.raises(RunError, match="gone; the jobs may go on, the same command looks for them"):
        sweep([run], SlurmLauncher(tmp_path / "runs" / ".slurm", 1), quiet())
    assert run.folder.read() is None


def test_what_a_user_asks_for_is_what_sbatch_is_told(
    run: Planned, tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    programs("srun", "exit 1")
    programs("squeue", "exit 0")
    programs("sbatch", f"cp $1 {tmp_path}/script; echo 'sbatch: error: invalid account' >&2; exit 1")
    folder = tmp_path / "runs" / ".slurm"
    launcher = SlurmLauncher(folder, 3, partition="gpu", account="us", time="1-02:00:00", gpus=1, cpus=4)
    second = Planned(run.recipe.model_copy(update={"seed": 2}), type(run.folder)(tmp_path / "runs" / "2"), "2")
    with pytest.raises(UserError, match=r"^--launcher slurm: sbatch: error: invalid account$"):
        sweep([run, second], launcher, quiet())
    script = (tmp_path / "script").read_text().splitlines()
    for flag in ("partition=gpu", "account=us", "time=1-02:00:00", "gpus-per-node=1", "cpus-per-task=4", "array=0-1%2"):
        assert f"#SBATCH --{flag}" in script
    assert "export OMP_NUM_THREADS=4" in script
    assert [path.name for path in folder.iterdir()] == [".lock"]


# --- with one


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("a real SLURM needs root and its packages: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run([SCRIPT, "start", folder, str(port)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
        subprocess.run([SCRIPT, "stop", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def real(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test with a real SLURM."""
    for mark in (pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")):
        test = mark(test)
    return test


def wait_for(sweep: Compare, what: Callable[[], object]) -> None:
    while not what():
        assert sweep.lasts(0.1), sweep.said


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


@real
def test_slurm_leaves_what_this_machine_does(small: list[str], tmp_path: Path) -> None:
    cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
    options = [*small, "--methods", "fvae-lora,lora", "--seeds", "1"]
    local = Compare(tmp_path / "local", options)
    assert local.end() == 0, local.said
    jobs = compare(tmp_path / "slurm", *options, "--cpus", cores)
    assert jobs.end() == 0, jobs.said
    assert_same(left(tmp_path / "local"), left(tmp_path / "slurm"))
    (array,) = arrays(tmp_path / "slurm")
    assert len(json.loads((array / "runs.json").read_text())) == 2
    assert "(2/2 done, 0 running, 0 failed, 0 waiting)" in jobs.said
    assert "\x1b" not in jobs.said


@real
def test_jobs_outlive_a_sweep_that_is_stopped_and_the_same_command_waits_for_them(
    small: list[str], tmp_path: Path
) -> None:
    out, options = tmp_path / "s", [*small, "train.epochs=30", "--methods", "lora", "--seeds", "1,2"]
    first = compare(out, *options)
    wait_for(first, lambda: list(out.glob("*/metrics.jsonl")))
    assert first.kill(signal.SIGINT) == 130
    told, stopped = first.said.splitlines()[-2:]
    assert told.startswith("the jobs go on: the same command waits for them, `scancel ")
    assert stopped == "fvae-lora: stopped; the same command goes on where it was"
    assert compare(out, *options).end() == 0
    assert set(states(out).values()) == {"complete"}
    assert len(arrays(out)) == 1, "the runs were submitted twice"


@real
def test_a_sweep_killed_between_sbatch_and_its_notes_submits_again(small: list[str], tmp_path: Path) -> None:
    out, options = tmp_path / "s", [*small, "--methods", "linear-probe", "--seeds", "1"]
    half = out / ".slurm" / "fvae-lora-half"
    half.mkdir(parents=True)
    (half / "runs.json").write_text(json.dumps([str(out / "linear-probe-seed1")]))
    subprocess.run(["sbatch", f"--job-name={half.name}", "--output=/dev/null", "--wrap=sleep 600"], check=True)
    again = compare(out, *options)
    assert again.end() == 0, again.said
    queued = subprocess.run(["squeue", "--noheader", f"--name={half.name}"], capture_output=True, check=True)
    assert not queued.stdout


@real
def test_a_lost_node_is_a_failed_run_that_the_same_command_takes_up(small: list[str], tmp_path: Path) -> None:
    out, options = tmp_path / "s", [*small, "train.epochs=30", "--methods", "lora", "--seeds", "1"]
    node = socket.gethostname().partition(".")[0]
    sweep = compare(out, *options)
    wait_for(sweep, lambda: list(out.glob("*/metrics.jsonl")))
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=test"], check=True)
    assert sweep.end() == 1, sweep.said
    record = json.loads((out / "lora-seed1" / "run.json").read_text())
    assert record["state"] == "failed"
    assert record["reason"].startswith("SLURM ended job ")
    assert ": NODE_FAIL" in record["reason"]
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=True)
    again = compare(out, *options)
    assert again.end() == 0, again.said
    assert states(out) == {"lora-seed1": "complete"}


@real
def test_a_partition_that_is_not_there_is_one_line(small: list[str], tmp_path: Path) -> None:
    sweep = compare(tmp_path / "s", *small, "--partition", "nowhere")
    assert sweep.end() == 2
    assert sweep.said == "fvae-lora: --launcher slurm: sbatch: error: invalid partition specified: nowhere\n"
    assert not states(tmp_path / "s")


@real
def test_sweeps_and_jobs_killed_ten_times_leave_what_an_undisturbed_sweep_does(
    small: list[str], tmp_path: Path
) -> None:
    options = [*small, "train.epochs=6", "--methods", "fvae-lora,lora", "--seeds", "1,2", "--launcher", "slurm"]
    assert_survives(10, tmp_path, options, lambda sweep: [job.kill for job in working(sweep.out)])
