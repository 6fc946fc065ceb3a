"""The progress of a sweep, on the terminal or as lines of a log."""

import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fvae_lora_experiments.run.timing import REPORT_INTERVAL_S, eta
from fvae_lora_experiments.sweep.plan import PlannedRun


class ProgressDisplay:
    """Shows how many runs are done, running, failed and waiting, and when all will have ended.

    A terminal shows this, always up to date, below the lines of the runs that ended; a log has it in each of these
    lines, and in a line of its own from time to time.

    Args:
        total: the number of runs of the sweep.
        to_do: those that are not done yet.
        console: where to show it.
    """

    def __init__(self, total: int, to_do: Sequence[PlannedRun], console: Console):
        self.total, self.done, self.running, self.failed = total, total - len(to_do), 0, 0
        self.epochs = {run.folder.path: run.epochs_done() for run in to_do}
        self.all_epochs = sum(run.recipe.train.epochs for run in to_do)
        self.started = self.last_printed = time.monotonic()
        self.epochs_at_start = sum(self.epochs.values())
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[end]}"),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(self.counts(), total=self.all_epochs, completed=self.epochs_at_start, end="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def counts(self) -> str:
        """`3/12 done, 2 running, 1 failed, 6 waiting`."""
        waiting = self.total - self.done - self.running - self.failed
        return f"{self.done}/{self.total} done, {self.running} running, {self.failed} failed, {waiting} waiting"

    def eta(self) -> str:
        """`ends 14:05, in 0:12:03` at the speed per epoch so far; empty if nothing is known yet."""
        done = sum(self.epochs.values())
        if done in (self.epochs_at_start, self.all_epochs):
            return ""
        elapsed = time.monotonic() - self.started
        return eta(timedelta(seconds=round(elapsed * (self.all_epochs - done) / (done - self.epochs_at_start))))

    def _summary(self) -> str:
        return ", ".join(filter(None, (self.counts(), self.eta())))

    def _print(self, line: str) -> None:
        self.last_printed = time.monotonic()
        self.progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def show(self, running: Sequence[PlannedRun], ended: Sequence[tuple[PlannedRun, str | None]] = ()) -> None:
        """Updates the display.

        Args:
            running: the runs that are under way.
            ended: the runs that have ended since the last call, and why they failed, if they did.
        """
        self.running = len(running)
        self.epochs |= {run.folder.path: run.epochs_done() for run in running}
        self.epochs |= {run.folder.path: run.recipe.train.epochs for run, _ in ended}
        self.failed += sum(failure is not None for _, failure in ended)
        self.done += sum(failure is None for _, failure in ended)
        for run, failure in ended:
            line = f"{run.name}: {failure or 'done'}"
            self._print(f"{line} ({self._summary()})" if self.progress.disable else line)
        if self.progress.disable and time.monotonic() - self.last_printed >= REPORT_INTERVAL_S:
            self._print(self._summary())
        self.progress.update(self.task, completed=sum(self.epochs.values()), description=self.counts(), end=self.eta())
