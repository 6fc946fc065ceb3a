"""Where a sweep's runs are done: in processes of this machine (`local`) or in jobs of a cluster (`slurm`)."""

import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fvae_lora_experiments.sweep.plan import PlannedRun

LOCK_WAIT_S = 5.0
"""How long a process of an earlier, killed sweep may take to let go of its run's folder."""


@dataclass(frozen=True)
class Ended:
    """How the process of a run came to its end.

    Args:
        run: the run.
        code: its exit code, negative for a signal; None where there is none: a job that the cluster ended.
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
    """How a sweep stands: the runs that are under way, and those that ended since the last news."""

    running: list[PlannedRun] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class Launcher(Protocol):
    """A place where runs are done."""

    def launch(self, runs: Sequence[PlannedRun]) -> Generator[Progress, None, None]:
        """Does the runs, each in its own process, and gives news until every one has ended.

        Closed early, it leaves nothing behind but what `interrupt_message` tells of.

        Raises:
            UserError: the runs cannot be started here, a folder is in use. Nothing was started.
        """
        ...

    @property
    def interrupt_message(self) -> str:
        """What goes on when the sweep is interrupted, or nothing."""
        ...


def refuse_folders_in_use(runs: Sequence[PlannedRun]) -> None:
    """Checks that the runs' folders can be written to and that nobody is at work there.

    Raises:
        UserError: they cannot, or somebody is.
    """
    for run in runs:
        with run.folder.locked(LOCK_WAIT_S):
            pass


def describe_exit(code: int) -> str:
    """An exit code in words; a shell's 128 + N, like a process's own -N, is signal N."""
    number = -code if code < 0 else code - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit code {code}"
