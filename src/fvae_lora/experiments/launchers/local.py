"""Runs as processes of this machine, which is shared out among them."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import IO

import torch

from fvae_lora.experiments.launchers import Ended, News, ending, refuse_folders_in_use
from fvae_lora.experiments.plan import Planned
from fvae_lora.experiments.surroundings import cores

POLL_S = 0.5
OUTPUT_BYTES = 2**16


class LocalLauncher:
    """Does runs in processes whose life is tied to this one's.

    Args:
        jobs: processes at once; the machine's cores, and its GPUs if it has any, are shared out among them.
    """

    parting = ""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def launch(self, runs: Sequence[Planned]) -> Generator[News, None, None]:
        """See `Launcher`."""
        refuse_folders_in_use(runs)
        waiting = list(runs)
        workers = [_Worker(_share(slot, self.jobs)) for slot in range(self.jobs)]
        try:
            while waiting or any(worker.run for worker in workers):
                for worker in workers:
                    if waiting and worker.run is None:
                        worker.begin(waiting.pop(0))
                wait([worker.channel for worker in workers if worker.run], POLL_S)
                ended = [end for worker in workers if (end := worker.ended())]
                yield News([worker.run for worker in workers if worker.run], ended)
        finally:
            for worker in workers:
                worker.end()


class _Worker:
    """A share of the machine, and the process (`worker`) that does one run after the other there."""

    def __init__(self, share: dict[str, str]):
        self.share = share
        self.run: Planned | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def begin(self, run: Planned) -> None:
        """Asks for a run."""
        if self.process is None or self.process.poll() is not None:
            self.channel, theirs = Pipe()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "fvae_lora.experiments.worker"],
                    stdin=theirs.fileno(),
                    stdout=self.output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self.share,
                )
        self.run, self.said_before = run, self._said()
        with contextlib.suppress(ConnectionError):  # it has ended: `ended` tells
            self.channel.send((str(run.folder.path), run.recipe.model_dump_json()))

    def ended(self) -> Ended | None:
        """How its run ended, or None if it has not, or there is none."""
        if self.run is None or self.process is None:
            return None
        code = self.process.poll()
        if code is None:
            with contextlib.suppress(EOFError, ConnectionError):  # it is about to end
                code = self.channel.recv() if self.channel.poll() else None
        if code is None:
            return None
        run, self.run = self.run, None
        begin = max(self.said_before, self._said() - OUTPUT_BYTES)
        said = os.pread(self.output.fileno(), OUTPUT_BYTES, begin)  # the place in the file is the process's
        return Ended(run, code, ending(code), said.decode(errors="replace"))

    def _said(self) -> int:
        return os.fstat(self.output.fileno()).st_size

    def end(self) -> None:
        """Lets the process go: it notices that its channel is closed."""
        if self.process is not None:
            self.channel.close()
            self.process.wait()


def _share(slot: int, jobs: int) -> dict[str, str]:
    """A process's share of the machine, in environment variables."""
    share = {"OMP_NUM_THREADS": str(max(1, cores() // jobs))}
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        share["CUDA_VISIBLE_DEVICES"] = (visible.split(",") if visible else list(map(str, range(gpus))))[slot % gpus]
    return share
