"""A recorded run is repeated: what differs from then is said first, and then how its scores compare."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.report.numbers import UNKNOWN
from fvae_lora_experiments.reproduce.recorded import Recorded
from fvae_lora_experiments.reproduce.verdict import FEWEST_SIBLINGS, Verdict, judge, siblings
from fvae_lora_experiments.run.archive import StoredRun
from fvae_lora_experiments.run.environment import cores, git_commit, hardware, versions
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record, printable
from fvae_lora_experiments.run.runner import open_base, open_data, run_recipe
from fvae_lora_experiments.sweep.local import most_threads

SHOWN = 12
"""How much of a hash or a commit is shown."""

WORDS = {"equal": "equal to the bit", "within": "within the seeds' spread", "differs": "differs"}
STYLES = {"equal": "green", "within": "green", "differs": "red"}


@dataclass(frozen=True)
class Condition:
    """Something that a run's numbers may depend on: what it was, and what it is."""

    name: str
    then: str
    now: str


def reproduce(recorded: Recorded, out: Path, quiet: bool, console: Console) -> list[str]:
    """Repeats a run with its recipe, after checking that data and model are still its own.

    Args:
        recorded: the run.
        out: the folder of the repeated run; one that was begun there is resumed.
        quiet: no progress bars.
        console: gets what differs, and what came out.

    Returns:
        The names of the scores that are neither equal nor within the spread of the seeds.

    Raises:
        UserError: data or model are other ones, and nothing was run; or as `run_recipe`.
        RunError: the run failed; the same command resumes it.
    """
    recipe, folder = recorded.recipe, RunFolder(out)
    what = f"{recipe.method}, seed {recipe.seed}, split seed {recipe.data.split_seed}"
    _say(f"{recorded.source}: {what}, learning rate {recipe.train.learning_rate:g}", console)
    with _as_many_threads(recorded.record):
        _refuse_other_sources(recorded)
        begun = folder.read()
        done = begun if begun and begun.state == "complete" else None
        if done:
            _say(f"{out}: was repeated already; another --out repeats it again", console)
        _print_conditions(_conditions(recorded, done), console)
        repeated = StoredRun(out.name, run_recipe(recipe, out, quiet), "", folder.events)
    seeds = siblings(recorded.run, recorded.others)
    verdicts = judge(recorded.run, repeated, seeds)
    _print_verdicts(verdicts, len(seeds), console)
    _say(f"The run is in {out}", console)
    return [verdict.score for verdict in verdicts if verdict.answer == "differs"]


@contextmanager
def _as_many_threads(record: Record) -> Iterator[None]:
    """As many threads as the recorded run had, if they may be used: sums of floats depend on their number."""
    before, then = torch.get_num_threads(), _hardware(record).get("threads")
    if isinstance(then, int) and 1 <= then <= min(cores(), most_threads()):
        torch.set_num_threads(then)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _refuse_other_sources(recorded: Recorded) -> None:
    try:
        open_data(recorded.recipe, recorded.record)
        open_base(recorded.recipe, recorded.record)
    except UserError as error:
        raise UserError(f"{recorded.source}: {error}; nothing was run") from error


def _conditions(recorded: Recorded, done: Record | None) -> Iterator[Condition]:
    """All that was recorded, with what it is now, or was in the repeated run if that is done.

    Data and model have been compared.
    """
    record = recorded.record
    if done:
        found, commit, here = done.versions, done.git_commit, _hardware(done)
    else:
        found, commit, here = versions(record.versions), git_commit(), hardware()
    for name, source in (("data", record.dataset), ("model", record.model)):
        shown = f"{source.name} {source.fingerprint[:SHOWN]}"
        yield Condition(name, shown, shown)
    for name, last in record.versions.items():
        earlier = [under[name] for under in record.earlier_versions if name in under]
        yield Condition(
            printable(name), ", then ".join(map(printable, [*earlier, last])), printable(found.get(name, UNKNOWN))
        )
    yield Condition("git commit", _short(record.git_commit), _short(commit))
    for name, then in _hardware(record).items():
        yield Condition(printable(name), printable(then), printable(here.get(name, UNKNOWN)))
    precision = recorded.recipe.train.precision
    yield Condition("precision", precision, precision)


def _hardware(record: Record) -> dict[str, Any]:
    return record.hardware if isinstance(record.hardware, dict) else {}


def _short(commit: str | None) -> str:
    """A commit as it is shown, with its mark of uncommitted changes."""
    own, dash, dirty = (commit or UNKNOWN).partition("-")
    return own[:SHOWN] + dash + dirty


def _print_conditions(conditions: Iterable[Condition], console: Console) -> None:
    known = list(conditions)
    same = ", ".join(f"{each.name} {each.then}" for each in known if each.then == each.now)
    _say(f"The same: {same}", console)
    for each in known:
        if each.then != each.now:
            _say(Text(f"Differs: {each.name} {each.then} when it was recorded, {each.now} now", "yellow"), console)


def _print_verdicts(verdicts: Sequence[Verdict], sibling_count: int, console: Console) -> None:
    for each in verdicts:
        now = UNKNOWN if each.repeated is None else f"{each.repeated:.9g}"
        numbers = now if each.answer == "equal" else f"recorded {each.recorded:.9g}, now {now}"
        if each.interval:
            numbers += "; a further seed is expected from {:.6g} to {:.6g}".format(*each.interval)
        line = Text.assemble(f"{printable(each.score)}: ", (WORDS[each.answer], STYLES[each.answer]), f" ({numbers})")
        _say(line, console)
    if sibling_count < FEWEST_SIBLINGS:
        needed = f"{FEWEST_SIBLINGS} finished runs beside it with its settings and other seeds"
        _say(f"No spread to compare with: that needs {needed}; found {sibling_count}", console)


def _say(line: str | Text, console: Console) -> None:
    console.print(line, highlight=False, soft_wrap=True)
