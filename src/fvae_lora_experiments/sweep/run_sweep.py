"""A sweep: the planned runs, each in its own process; finished runs are not repeated."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.places import without_paths
from fvae_lora_experiments.signals import Terminated
from fvae_lora_experiments.sweep.launcher import LOCK_WAIT_S, Ended, Launcher
from fvae_lora_experiments.sweep.plan import PlannedRun
from fvae_lora_experiments.sweep.progress_display import ProgressDisplay

REFUSED = 2
"""The exit code of a run that was refused."""


def run_sweep(runs: Sequence[PlannedRun], launcher: Launcher, console: Console) -> list[str]:
    """Does the runs that are not done yet.

    Args:
        runs: the plan.
        launcher: where they are done.
        console: where progress is shown.

    Returns:
        A line for each run that failed. Its record says why, unless it was refused or nothing can be written.

    Raises:
        UserError: a folder is in use, or holds another run or an incomplete record, and nothing was started; or all
            runs were refused.
    """
    to_do = [run for run in runs if not run.is_done()]
    if len(to_do) < len(runs):
        console.print(f"{len(runs) - len(to_do)} of {len(runs)} runs are done already", highlight=False)
    failures: list[str] = []
    refused = 0
    with ProgressDisplay(len(runs), to_do, console) as display, contextlib.closing(launcher.launch(to_do)) as launched:
        try:
            for progress in launched:
                ends = [(ended.run, _failure(ended)) for ended in progress.ended]
                display.show(progress.running, ends)
                failures += [f"{run.name}: {failure}" for run, failure in ends if failure]
                refused += sum(ended.code == REFUSED for ended in progress.ended)
        except (KeyboardInterrupt, Terminated):
            if launcher.interrupt_message:
                console.print(launcher.interrupt_message, highlight=False)
            raise
    if failures and refused == len(runs):
        raise UserError(failures[0])
    return failures


def _failure(ended: Ended) -> str | None:
    """Why a run failed, or None; marks its record as failed if its process had no time to do so."""
    folder, lines = ended.run.folder, [line.removeprefix("fvae-lora: ") for line in ended.last_lines]
    try:
        record = folder.read()
    except UserError as error:
        return str(error)
    if ended.code == 0 or (record and record.state == "complete"):
        return None
    if ended.code == REFUSED and lines:
        return lines[-1]
    if ended.code == 1 and record and record.state == "failed":
        return f"failed: {record.reason}"
    reason = ": ".join([ended.how, " | ".join(lines)]) if lines else ended.how
    recipe = ended.run.recipe
    reason = without_paths(reason, folder.path, Path(recipe.dataset), Path(recipe.model))
    with contextlib.suppress(UserError), folder.locked(LOCK_WAIT_S):  # if locked, it goes on; it may also be read-only
        folder.mark_failed(reason, folder.initial_record(recipe))
    return f"failed: {reason}"
