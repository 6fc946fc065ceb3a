"""Runs as processes on this machine, whose cores and GPUs are divided among them."""

import contextlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import IO

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.environment import cores
from fvae_lora_experiments.sweep.launcher import Ended, Progress, describe_exit, refuse_folders_in_use
from fvae_lora_experiments.sweep.plan import PlannedRun

POLL_S = 0.5
OUTPUT_BYTES = 2**16

THREAD_LIMITS = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Environment variables that limit the threads of a process."""


class LocalLauncher:
    """Does runs in processes that end with this one.

    Args:
        jobs: runs at the same time; the machine's cores are divided among them, up to the user's limit on threads.
        processes: processes per run.
        gpus: GPUs per run, exclusively. With None, a run has one if there are any, possibly shared.

    Raises:
        UserError: there are not enough GPUs.
    """

    interrupt_message = ""

    def __init__(self, jobs: int, processes: int = 1, gpus: int | None = None):
        self.processes = processes
        threads = {"OMP_NUM_THREADS": str(max(1, min(cores() // (jobs * processes), most_threads())))}
        self.shares = [threads | visible for visible in _gpus(jobs, gpus)]

    def launch(self, runs: Sequence[PlannedRun]) -> Generator[Progress, None, None]:
        """See `Launcher`."""
        refuse_folders_in_use(runs)
        waiting = list(runs)
        workers = [_Worker(share, self.processes) for share in self.shares]
        try:
            while waiting or any(worker.run for worker in workers):
                for worker in workers:
                    if waiting and worker.run is None:
                        worker.begin(waiting.pop(0))
                wait([worker.channel for worker in workers if worker.run], POLL_S)
                ended = [end for worker in workers if (end := worker.ended())]
                yield Progress([worker.run for worker in workers if worker.run], ended)
        finally:
            for worker in workers:
                worker.end()


class _Worker:
    """A share of the machine, and the process (`sweep.child`) that does one run after another there."""

    def __init__(self, share: dict[str, str], processes: int):
        self.share, self.processes = share, processes
        self.run: PlannedRun | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def begin(self, run: PlannedRun) -> None:
        """Requests a run."""
        if self.process is None or self.process.poll() is not None:
            self.channel, theirs = Pipe()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "fvae_lora_experiments.sweep.child"],
                    stdin=theirs.fileno(),
                    stdout=self.output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self.share,
                )
        self.run, self.output_start = run, self._output_size()
        with contextlib.suppress(ConnectionError):  # the process has ended, which `ended` reports
            self.channel.send((str(run.folder.path), run.recipe.model_dump_json(), self.processes))

    def ended(self) -> Ended | None:
        """How its run ended, or None if it has not, or there is none."""
        if self.run is None or self.process is None:
            return None
        code = self.process.poll()
        if code is None:
            with contextlib.suppress(EOFError, ConnectionError):  # it is about to exit
                code = self.channel.recv() if self.channel.poll() else None
        if code is None:
            return None
        run, self.run = self.run, None
        begin = max(self.output_start, self._output_size() - OUTPUT_BYTES)
        said = os.pread(
            self.output.fileno(), OUTPUT_BYTES, begin
        )  # not read(): the file offset is shared with the process
        return Ended(run, code, describe_exit(code), said.decode(errors="replace"))

    def _output_size(self) -> int:
        return os.fstat(self.output.fileno()).st_size

    def end(self) -> None:
        """Ends the process, which exits when its channel is closed."""
        if self.process is not None:
            self.channel.close()
            self.process.wait()


def most_threads() -> float:
    """The smallest limit on threads that the environment sets."""
    set_by_user = (os.environ.get(name, "").split(",")[0].strip() for name in THREAD_LIMITS)
    return min((int(limit) for limit in set_by_user if limit.isdecimal() and int(limit)), default=math.inf)


def _gpus(jobs: int, each: int | None) -> list[dict[str, str]]:
    """For each concurrent run, the environment variable with its GPUs."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else list(map(str, range(count)))
    if each is None:
        return [{"CUDA_VISIBLE_DEVICES": names[slot % count]} if count else {} for slot in range(jobs)]
    if jobs * each > count:
        raise UserError(f"--gpus {each}: with --jobs {jobs} that takes {jobs * each} GPUs; this machine has {count}")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[slot * each : (slot + 1) * each])} for slot in range(jobs)]
