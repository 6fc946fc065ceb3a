"""Runs as jobs of a SLURM cluster, submitted through submitit.

A sweep's jobs are an array. They belong to SLURM, not to the process that submitted them: if that is stopped or killed,
they go on, and the same command finds them again. What this needs is written before they are submitted: the array's
name is the name of a folder, and `runs.json` in that folder says which run folder and recipe each job is for. submitit
pickles the same two as text beside it, only for the job to read; results are the runs' records. The folder is deleted
when all its runs are complete; until then it keeps the jobs' output.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fvae_lora_experiments.errors import RunError, UserError, first_line
from fvae_lora_experiments.run.folder import RunFolder, write_atomically
from fvae_lora_experiments.sweep.launcher import Ended, Progress, describe_exit, refuse_folders_in_use
from fvae_lora_experiments.sweep.plan import PlannedRun

NAME = "fvae-lora-"
POLL_S, LONGEST_POLL_S = 0.5, 10.0
NO_ANSWER_LIMIT_S = 600.0
"""How long SLURM may not answer before a sweep gives up."""

FINAL_STATES = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""Final states of a job."""


@dataclass(frozen=True)
class _Job:
    """A line of squeue: `number` is 12, or 12_3 in an array; `status` is as from wait(2)."""

    number: str
    name: str
    state: str
    status: int

    @property
    def index(self) -> int:
        """Its index in the array."""
        return int(self.number.partition("_")[2] or 0)


class SlurmLauncher:
    """Does runs in jobs of a cluster, each on one node, by default without a GPU.

    Args:
        folder: for submitit's files and the jobs' output; on a file system that the nodes share.
        jobs: runs at the same time.
        processes: processes per run.
        partition: as for sbatch, like the following; None is the cluster's default.
        account: the account to charge.
        time: a run's time limit.
        gpus: GPUs per run.
        cpus: cores per run; None is one per process.

    Raises:
        UserError: there is no SLURM here.
    """

    def __init__(
        self,
        folder: Path,
        jobs: int,
        processes: int = 1,
        partition: str | None = None,
        account: str | None = None,
        time: str | None = None,
        gpus: int | None = None,
        cpus: int | None = None,
    ):
        if not shutil.which("sbatch") or not shutil.which("squeue"):
            raise UserError("--launcher slurm: there is no SLURM here (no sbatch and squeue); try --launcher local")
        self.folder, self.processes = folder.resolve(), processes
        cpus = cpus or processes
        self.options = {
            "partition": partition,
            "account": account,
            "time": time,
            "gpus_per_node": gpus or None,
            "cpus_per_task": cpus,
            "array_parallelism": jobs,
            "setup": [f"export OMP_NUM_THREADS={max(1, cpus // processes)}"],
            "additional_parameters": {
                "no-requeue": True
            },  # a lost node is a failed run, which the same command repeats
            "use_srun": False,
            "stderr_to_stdout": True,
        }
        self.jobs: dict[str, PlannedRun] = {}

    @property
    def interrupt_message(self) -> str:
        """That the jobs go on, and how to end them."""
        arrays = sorted({number.partition("_")[0] for number in self.jobs})
        return f"the jobs go on: the same command waits for them, `scancel {' '.join(arrays)}` ends them"

    def launch(self, runs: Sequence[PlannedRun]) -> Generator[Progress, None, None]:
        """See `Launcher`. Runs for which an earlier sweep's job is active are waited for, not submitted again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to: {error.strerror}") from error
        with FileLock(self.folder / ".lock"):  # of two concurrent sweeps, the second must see the first one's jobs
            self.jobs = self._earlier_jobs(runs)
            under_way = {run.folder.path for run in self.jobs.values()}
            new = [run for run in runs if run.folder.path not in under_way]
            refuse_folders_in_use(new)
            self.jobs |= self._submit(new)
        last_end = last_answer = time.monotonic()
        while self.jobs:
            time.sleep(min(POLL_S + (time.monotonic() - last_end) / 10, LONGEST_POLL_S))
            try:
                known = {job.number: job for job in _squeue()}
                last_answer = time.monotonic()
            except UserError as error:
                if time.monotonic() - last_answer > NO_ANSWER_LIMIT_S:
                    raise RunError(f"{error}; the jobs may go on, the same command looks for them") from error
                continue
            over = [number for number in self.jobs if number not in known or known[number].state in FINAL_STATES]
            ended = [self._ended(self.jobs.pop(number), number, known.get(number)) for number in over]
            last_end = time.monotonic() if ended else last_end
            yield Progress([run for number, run in self.jobs.items() if known[number].state != "PENDING"], ended)
        self._remove_complete()

    def _earlier_jobs(self, runs: Sequence[PlannedRun]) -> dict[str, PlannedRun]:
        """The active jobs of earlier sweeps."""
        by_path = {_path(run): run for run in runs}
        jobs = {}
        for job in _squeue():
            folder = self.folder / job.name
            if job.state in FINAL_STATES or not job.name.startswith(NAME) or not (folder / "runs.json").exists():
                continue
            path, recipe = json.loads((folder / "runs.json").read_text(encoding="utf-8"))[job.index]
            if not (folder / f"{job.number}_submitted.pkl").exists():  # its sweep was killed while submitting
                _call("scancel", job.number)
            elif (run := by_path.get(path)) is not None:
                if recipe != run.recipe.model_dump_json():
                    raise UserError(
                        f"{path}: job {job.number} does another recipe there; `scancel {job.number}` ends it"
                    )
                jobs[job.number] = run
        return jobs

    def _submit(self, runs: Sequence[PlannedRun]) -> dict[str, PlannedRun]:
        """Submits runs in as many arrays as SLURM's limit requires, each starting when the previous one has ended."""
        jobs: dict[str, PlannedRun] = {}
        arrays: list[str] = []
        longest = _longest_array() if runs else 1
        for start in range(0, len(runs), longest):
            part = runs[start : start + longest]
            try:
                numbers = self._submit_array(part, after=arrays[-1:])
            except UserError:
                if arrays:
                    _call("scancel", *arrays)
                raise
            jobs |= zip(numbers, part, strict=True)
            arrays.append(numbers[0].partition("_")[0])
        return jobs

    def _submit_array(self, runs: Sequence[PlannedRun], after: Sequence[str]) -> list[str]:
        import submitit

        folder = self.folder / f"{NAME}{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        work = [(_path(run), run.recipe.model_dump_json()) for run in runs]
        write_atomically(folder / "runs.json", json.dumps(work))
        executor = submitit.SlurmExecutor(folder)
        order = {"dependency": f"afterany:{after[0]}"} if after else {}
        executor.update_parameters(job_name=folder.name, **order, **self.options)
        try:
            with contextlib.redirect_stderr(
                io.StringIO()
            ):  # submitit prints sbatch's message in addition to raising it
                jobs = executor.map_array(do_job, *zip(*work, strict=True), [self.processes] * len(work))
        except submitit.core.utils.FailedJobError as error:  # from sbatch
            shutil.rmtree(folder)
            raise UserError(f"--launcher slurm: {first_line(error)}") from error
        return [job.job_id for job in jobs]

    def _remove_complete(self) -> None:
        """Removes the folders of arrays whose runs are all complete."""
        for notes in self.folder.glob(f"{NAME}*/runs.json"):
            paths = [Path(path) for path, _ in json.loads(notes.read_text(encoding="utf-8"))]
            with contextlib.suppress(UserError):  # incomplete record
                if all((record := RunFolder(path).read()) and record.state == "complete" for path in paths):
                    shutil.rmtree(notes.parent, ignore_errors=True)

    def _ended(self, run: PlannedRun, number: str, job: _Job | None) -> Ended:
        output = ""
        for log in self.folder.glob(f"{NAME}*/{number}_0_log.out"):
            output = log.read_text(encoding="utf-8", errors="replace")
        output = re.sub(r"^submitit .*\n", "", output, flags=re.MULTILINE)
        if job is None:
            return Ended(run, None, f"SLURM no longer knows job {number}", output)
        if job.state in ("COMPLETED", "FAILED"):
            code = os.waitstatus_to_exitcode(job.status)
            return Ended(run, code, describe_exit(code), output)
        return Ended(run, None, f"SLURM ended job {number}: {job.state}", output)


def do_job(folder: str, recipe: str, count: int) -> None:
    """What a job does: the same as a local process. Arguments as for `child.do_run`."""
    from fvae_lora_experiments.sweep.child import do_run

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, but a cancelled job must end at once
    do_run(folder, recipe, count)


def _path(run: PlannedRun) -> str:
    return str(run.folder.path.resolve())


def _squeue() -> list[_Job]:
    """The user's jobs, including those that ended some minutes ago.

    Raises:
        UserError: SLURM does not answer.
    """
    fields = ("JobArrayID", "Name", "State", "exit_code")
    output = _call("squeue", "--me", "--array", "--states=all", "--noheader", "-O", ",".join(f"{f}:|" for f in fields))
    lines = (line.split("|") for line in output.splitlines())
    return [_Job(number, name, state, int(status)) for number, name, state, status, *_ in lines]


def _longest_array() -> int:
    """How many jobs an array may have on this cluster; 1 if there are no arrays.

    Raises:
        UserError: SLURM does not answer.
    """
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(size[1])) if size else 1


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise UserError(f"--launcher slurm: {first_line(done.stderr) or f'{command[0]} failed'}")
    return done.stdout
