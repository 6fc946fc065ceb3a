"""The launcher for SLURM, with stand-ins for SLURM's programs that answer at once."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.sweep import slurm
from fvae_lora_experiments.sweep.plan import PlannedRun, contenders, runs_of
from fvae_lora_experiments.sweep.run_sweep import run_sweep
from fvae_lora_experiments.sweep.slurm import SlurmLauncher
from sweeps import states

Cli = Callable[..., tuple[int, str, str]]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in the place of a program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    put("scontrol", "echo 'MaxArraySize            = 1001'")
    return put


@pytest.fixture
def run(vit: Path, pictures: Path, tmp_path: Path) -> PlannedRun:
    places = {"model": str(vit), "dataset": str(pictures)}
    (run,) = runs_of(contenders("image/default", tmp_path / "runs", ["lora"], ["train.epochs=2"], places), [1])
    return run


@pytest.mark.parametrize("option", ["--partition=main", "--time=10", "--account=us", "--cpus=2"])
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
        (None, "SLURM no longer knows job 7"),
    ],
)
def test_however_a_job_is_lost_its_run_has_failed_with_the_jobs_last_lines(
    run: PlannedRun, tmp_path: Path, programs: Callable[[str, str], None], line: str | None, reason: str
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
    assert run_sweep([run], SlurmLauncher(folder, 1), quiet()) == [f"{run.name}: failed: {reason}"]
    record = run.folder.read()
    assert record is not None
    assert (record.state, record.reason) == ("failed", reason)


def test_a_slurm_that_falls_silent_is_waited_for_but_not_for_ever(
    run: PlannedRun, tmp_path: Path, programs: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs("srun", "exit 1")
    programs("sbatch", f"echo Submitted batch job 7; touch {tmp_path}/submitted")
    programs("squeue", f"test ! -e {tmp_path}/submitted || {{ echo gone >&2; exit 1; }}")
    monkeypatch.setattr(slurm, "NO_ANSWER_LIMIT_S", 1.0)
    with pytest.raises(RunError, match="gone; the jobs may go on, the same command looks for them"):
        run_sweep([run], SlurmLauncher(tmp_path / "runs" / ".slurm", 1), quiet())
    assert run.folder.read() is None


def test_what_a_user_asks_for_is_what_sbatch_is_told(
    run: PlannedRun, tmp_path: Path, programs: Callable[[str, str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    programs("srun", "exit 1")
    programs("squeue", "exit 0")
    programs("sbatch", f"cp $1 {tmp_path}/script; echo 'sbatch: error: invalid account' >&2; exit 1")
    folder = tmp_path / "runs" / ".slurm"
    launcher = SlurmLauncher(folder, 3, 2, partition="gpu", account="us", time="1-02:00:00", gpus=2, cpus=8)
    second = PlannedRun(run.recipe.model_copy(update={"seed": 2}), type(run.folder)(tmp_path / "runs" / "2"), "2")
    with pytest.raises(UserError, match=r"^--launcher slurm: sbatch: error: invalid account$"):
        run_sweep([run, second], launcher, quiet())
    assert capfd.readouterr() == ("", "")
    script = (tmp_path / "script").read_text().splitlines()
    for flag in ("partition=gpu", "account=us", "time=1-02:00:00", "gpus-per-node=2", "cpus-per-task=8", "array=0-1%2"):
        assert f"#SBATCH --{flag}" in script
    assert "export OMP_NUM_THREADS=4" in script
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_more_runs_than_an_array_may_have_wait_for_one_another_in_several(
    run: PlannedRun, tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    programs("srun", "exit 1")
    programs("squeue", "exit 0")
    programs("scontrol", "echo 'MaxArraySize            = 2'")
    programs("scancel", f"echo $@ >>{tmp_path}/cancelled")
    programs(
        "sbatch",
        f"n=$(ls {tmp_path} | grep -c script); test $n = 2 && exit 1; cp $1 {tmp_path}/script$n; "
        "echo Submitted batch job 7$n",
    )
    runs = [PlannedRun(run.recipe, type(run.folder)(tmp_path / "runs" / str(n)), str(n)) for n in range(5)]
    with pytest.raises(UserError, match="--launcher slurm"):
        run_sweep(runs, SlurmLauncher(tmp_path / "runs" / ".slurm", 4), quiet())
    first, second = ((tmp_path / f"script{n}").read_text() for n in range(2))
    for script in (first, second):
        assert "#SBATCH --array=0-1%2\n" in script
    assert "--dependency" not in first
    assert "#SBATCH --dependency=afterany:70\n" in second
    assert (tmp_path / "cancelled").read_text() == "70 71\n", "the third array was refused: nothing is begun"


def test_what_a_job_wrote_is_kept_until_every_run_of_its_array_is_complete(
    run: PlannedRun, tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    programs("sbatch", "exit 1")
    programs("squeue", "exit 0")
    array = tmp_path / "runs" / ".slurm" / "fvae-lora-x"
    array.mkdir(parents=True)
    (array / "7_0_log.out").touch()
    (array / "runs.json").write_text(json.dumps([[str(run.folder.path), ""]]))
    run.folder.path.mkdir()
    for state, kept in (("failed", True), ("running", True), ("complete", False)):
        run.folder.write(run.folder.initial_record(run.recipe).model_copy(update={"state": state}))
        assert list(SlurmLauncher(array.parent, 1).launch([])) == []
        assert array.exists() == kept, state


def test_a_job_that_waits_to_do_another_recipe_in_a_runs_folder_is_named(
    run: PlannedRun, tmp_path: Path, programs: Callable[[str, str], None]
) -> None:
    array = tmp_path / "runs" / ".slurm" / "fvae-lora-x"
    array.mkdir(parents=True)
    (array / "7_1_submitted.pkl").touch()
    other = run.recipe.model_copy(update={"seed": 2}).model_dump_json()
    (array / "runs.json").write_text(json.dumps([["elsewhere", ""], [str(run.folder.path), other]]))
    programs("sbatch", "exit 1")
    programs("squeue", "echo '7_1|fvae-lora-x|PENDING|0|'")
    with pytest.raises(UserError, match=r"lora-seed1: job 7_1 does another recipe there; `scancel 7_1` ends it"):
        run_sweep([run], SlurmLauncher(array.parent, 1), quiet())
