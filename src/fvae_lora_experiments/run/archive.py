"""Reading stored runs, from their folders or many from one file, in whatever state they were left.

Such a file is gzip'd JSON lines: a run's name, its record and its learning curve per line. It holds everything that a
report needs, a hundred runs in a hundred kilobytes, but not the adapters.
"""

import contextlib
import getpass
import gzip
import io
import json
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.run.folder import RunFolder, write_atomically
from fvae_lora_experiments.run.record import Event, Record, parse_record, printable, read_events
from fvae_lora_experiments.schema import Recipe

CurvePoint = tuple[float, float]

ENDING = "runs.jsonl.gz"
"""The ending of the name of a file of runs, by which a report finds it in a folder."""


NAMES_OF_DATA = ("record.dataset.classes", "record.dataset.groups", "record.by_class")
"""Where a record has the names of classes and groups, which may look like anything."""


@dataclass(frozen=True)
class StoredRun:
    """A run: its name relative to where runs were searched, and its record, or None and the `error`."""

    name: str
    record: Record | None
    error: str = ""
    read_events: Callable[[], list[Event]] = list

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its recipe with defaults for keys that did not exist when it was written, for comparison with newer ones."""
        written = self.record.recipe if self.record else {}
        try:
            return Recipe.model_validate(written).model_dump()
        except ValidationError:
            return written

    @cached_property
    def events(self) -> list[Event]:
        """Its learning curve."""
        return self.read_events()

    def curve(self, event: str, score: str) -> list[CurvePoint]:
        """(epoch, score) of every event of that kind, in order."""
        measured = [(e.epoch, e.scores) for e in self.events if e.event == event]
        return sorted({epoch: scores[score] for epoch, scores in measured if score in scores}.items())

    def elbo(self) -> dict[str, dict[str, list[CurvePoint]]]:
        """{module: {term: [(epoch, value), ...]}}, modules and terms in order of appearance."""
        curves: dict[str, dict[str, dict[float, float]]] = {}
        for event in self.events:
            for module, terms in event.elbo.items():
                of_module = curves.setdefault(module, {})
                for term, value in terms.items():
                    of_module.setdefault(term, {})[event.epoch] = value
        return {
            printable(module): {term: sorted(curve.items()) for term, curve in terms.items()}
            for module, terms in curves.items()
        }


def read_runs(*places: Path) -> list[StoredRun]:
    """Reads all runs at or below `places`, sorted by path.

    Args:
        places: folders with runs and files of runs at any depth, or files of runs. If there are several, the names of
            the runs begin with theirs. A run that was unpacked beside its file is read from its folder.

    Raises:
        UserError: a place does not exist or has no run, or a file of runs cannot be read.
    """
    runs = []
    for place in places:
        found = list(_packed_in(place) if place.is_file() else _below(place))
        if not found:
            what = f"no run (a folder with a run.json, or a file {ENDING}) in it"
            raise UserError(f"{place}: {what if place.exists() else 'no such file or folder'}")
        above = folder_name(place) if len(places) > 1 else ""
        runs += [StoredRun("/".join(filter(None, (above, r.name))), r.record, r.error, r.read_events) for r in found]
    return sorted(runs, key=lambda run: PurePosixPath(run.name))


def runs_beside(folder: Path) -> list[StoredRun]:
    """The run in `folder` and those in the folders beside it, by the names of their folders; nothing deeper is read."""
    parent = folder.resolve().parent
    return [_in_folder(file.parent, printable(file.parent.name)) for file in sorted(parent.glob("*/run.json"))]


def is_run_name(name: str) -> bool:
    """Whether a run's name stays below the folder in which its own folder is made."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def folder_name(place: Path) -> str:
    """The name of the folder of a place, used to name its runs."""
    folder = place.resolve()
    return printable((folder.parent if folder.is_file() else folder).name)


def _below(root: Path) -> Iterator[StoredRun]:
    for parent, _, files in os.walk(root):
        folder = Path(parent)
        above = "" if folder == root else folder.relative_to(root).as_posix()
        if "run.json" in files or "metrics.jsonl" in files:
            yield _in_folder(folder, printable(above) or folder_name(root))
        for file in files:
            if file.endswith(ENDING):
                packed = (run for run in _packed_in(folder / file) if not (folder / run.name / "run.json").exists())
                for run in packed:
                    yield StoredRun(
                        printable(f"{above}/{run.name}".lstrip("/")), run.record, run.error, run.read_events
                    )


def _in_folder(folder: Path, name: str) -> StoredRun:
    try:
        return StoredRun(name, parse_record((folder / "run.json").read_bytes()), "", RunFolder(folder).events)
    except OSError as error:
        return StoredRun(name, None, f"run.json: {error.strerror}")
    except ValueError as error:
        return StoredRun(name, None, f"run.json: {error}")


def _packed_in(file: Path) -> Iterator[StoredRun]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _packed_run(line, f"{file}: line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a complete file of runs: {printable(str(error))}") from error


def _packed_run(line: str, where: str) -> StoredRun:
    try:
        packed = json.loads(line)
        name, record, curve = packed["run"], packed["record"], packed["curve"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a run with its record and its curve") from error
    if not (isinstance(name, str) and isinstance(record, dict) and isinstance(curve, list)):
        raise UserError(f"{where}: not a run with its record and its curve")
    try:
        return StoredRun(printable(name), parse_record(record), "", partial(read_events, curve))
    except ValueError as error:
        return StoredRun(printable(name), None, f"run.json: {error}")


def pack(place: Path, file: Path) -> int:
    """Writes all runs at or below `place` to `file`; the same runs give the same bytes.

    Returns:
        The number of runs.

    Raises:
        UserError: there is no run, a run cannot be read or reveals where it was done, two runs have one name, or the
            file exists already or its name does not end in `runs.jsonl.gz`. Nothing was written.
    """
    if not file.name.endswith(ENDING):
        raise UserError(f"{file}: expected a name that ends in {ENDING}, by which a report finds it")
    if file.exists():
        raise UserError(f"{file}: exists already")
    runs = read_runs(place)
    _refuse_namesakes(runs, place)
    lines = "".join(f"{json.dumps(_contents(run, place), separators=(',', ':'))}\n" for run in runs)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as out:  # without name and date, for reproducible bytes
        out.write(lines.encode())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, packed.getvalue())
    return len(runs)


def unpack(file: Path, folder: Path) -> int:
    """Restores the folders of the runs in `file` below `folder`, without adapters; `compare` can continue there.

    Returns:
        The number of runs.

    Raises:
        UserError: it is not a file of runs, or a run in it cannot be read, or its folder exists already or would be
            elsewhere. Nothing was written.
    """
    runs = read_runs(file)
    _refuse_namesakes(runs, file)
    targets = [(RunFolder(folder / run.name), run) for run in runs]
    for target, run in targets:
        if run.error:
            raise UserError(f"{file}: {run.name}: {run.error}")
        if not is_run_name(run.name):
            raise UserError(f"{file}: {run.name}: not the name of a run")
        if target.path.exists():
            raise UserError(f"{target.path}: exists already")
    for target, run in targets:
        assert run.record is not None
        target.path.mkdir(parents=True)
        target.restore(run.record, run.events)
    return len(runs)


def _refuse_namesakes(runs: Sequence[StoredRun], place: Path) -> None:
    for run, following in pairwise(runs):
        if run.name == following.name:
            raise UserError(f"{place}: {run.name}: there are two runs of this name")


def _contents(run: StoredRun, place: Path) -> dict[str, Any]:
    if run.record is None:
        raise UserError(f"{place}: {run.name}: {run.error}")
    curve = [event.contents() for event in run.events]
    contents = {"run": run.name, "record": run.record.contents(), "curve": curve}
    for where, text in _texts(contents):
        if not where.startswith(NAMES_OF_DATA) and tells_where(text):
            raise UserError(
                f"{place}: {run.name}: {where}: {printable(text)!r} reveals where the run was done; a file of runs "
                "may hold no absolute path, host or user"
            )
    return contents


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Each string in JSON `value`, keys included, with its dotted path."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, where)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield where, key
            yield from _texts(part, f"{where}.{key}".lstrip("."))


def tells_where(text: str) -> bool:
    """Whether a text tells where, or by whom, something was done: a path, a host, a user."""
    return bool(_identifying().search(text))


@cache
def _identifying() -> re.Pattern[str]:
    """Matches what identifies a machine or its user: absolute paths, paths from a home folder, host and user names."""
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], Path.home().name}
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        names.add(getpass.getuser())
    names -= {"", "root", "localhost", "user", "cpu", "cuda", *METHODS}
    own = "".join(rf"|(?<![\w-]){re.escape(name)}(?![\w-])" for name in sorted(names))
    return re.compile(r"^/\w|file://|(?<![\w./:~-])(?:/(?:[\w.@+-]+/)+|[A-Za-z]:[\\/]|\\\\\w|~(?:[A-Za-z]\w*)?/)" + own)
