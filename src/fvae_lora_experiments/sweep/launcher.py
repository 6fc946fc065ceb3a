"""The interface of what runs a sweep: processes on this machine (`local`) or jobs of a cluster (`slurm`)."""

import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fvae_lora_experiments.sweep.plan import PlannedRun

LOCK_WAIT_S = 5.0
"""How long a process of an earlier, killed sweep may take to release its run's folder."""


@dataclass(frozen=True)
class Ended:
    """How the process of a run ended.

    Args:
        run: the run.
        code: its exit code, negative for a signal; None for a job that the cluster ended.
        how: the end in words, `killed by SIGKILL`.
        output: the end of what it wrote.
    """

    run: PlannedRun
    code: int | None
    how: str
    output: str

    @property
    def last_lines(self) -> list[str]:
        """The last three lines that the process wrote."""
        return [line.strip() for line in self.output.splitlines() if line.strip()][-3:]


@dataclass(frozen=True)
class Progress:
    """The state of a sweep: the runs that are under way, and those that ended since the last report."""

    running: list[PlannedRun] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class Launcher(Protocol):
    """Runs the runs of a sweep."""

    def launch(self, runs: Sequence[PlannedRun]) -> Generator[Progress, None, None]:
        """Does the runs, each in its own process, and reports progress until all have ended.

        Closed early, it leaves nothing behind except what `interrupt_message` says.

        Raises:
            UserError: the runs cannot be started here, or a folder is in use. Nothing was started.
        """
        ...

    @property
    def interrupt_message(self) -> str:
        """What continues after the sweep was interrupted; empty if nothing does."""
        ...


def refuse_folders_in_use(runs: Sequence[PlannedRun]) -> None:
    """Checks that the runs' folders are writable and not in use.

    Raises:
        UserError: a folder is not writable, or in use.
    """
    for run in runs:
        with run.folder.locked(LOCK_WAIT_S):
            pass


def describe_exit(code: int) -> str:
    """An exit code in words; 128 + N from a shell, like -N from a process, is signal N."""
    number = -code if code < 0 else code - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit code {code}"
