"""Which files of a folder are data, of which split they are, and what is left out.

The rules are the same for all tasks:

- Hidden names and what archives and file managers leave behind (`.ipynb_checkpoints`, `__MACOSX`, `._3.png`) are no
  data.
- A folder belongs to a split if its whole name says so, in any case (`Test`, `val`, `training_set`, `train2017`), and
  then so does all that is below it; a file if one of its words does (`train_data.csv`, `Test-00000-of-00002.parquet`).
- Tables are those of the first folder, from the top, in which any belongs to a split; what lies elsewhere is left out.
- Nothing is joined but parts of one table, whose names differ in their numbers, and the files of a split's folder.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fvae_lora_experiments.errors import UserError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "valset": "validation",
    "dev": "validation",
    "devset": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
    "testset": "test",
}
"""What splits are called, in any case."""

BESIDE = frozenset({"set", "split", "data", "dataset", "images", "image", "imgs", "img", "files", "folder"})
"""Words that may stand beside a split's in the name of a folder; with others it is a class: `train station`."""

NO_DATA = frozenset({"__macosx", "__pycache__", "@eadir", "thumbs.db", "desktop.ini", "lost+found"})
"""Names, in lower case, that no user gave."""

DESCRIPTIONS = frozenset(
    {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "readme.md"}
)
"""Files that describe a data set in the conventions of the hub; no tables."""


@dataclass
class Notes:
    """What was noticed while a data set was opened, for the summary before training."""

    sources: dict[str, str] = field(default_factory=dict)
    """Where each official split comes from, in words."""
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """Why something is not used, to what it is and how often that occurs: `{"not an image": {".txt": 3}}`."""
    warnings: list[str] = field(default_factory=list)

    def leave_out(self, why: str, what: str, count: int = 1) -> None:
        """Notes `count` files, say, that are not used."""
        self.left_out.setdefault(why, Counter())[what] += count

    def add(self, others: "Notes") -> None:
        """Takes over what others say."""
        self.sources |= others.sources
        self.warnings += others.warnings
        for why, kinds in others.left_out.items():
            for what, count in kinds.items():
                self.leave_out(why, what, count)


def words(name: str) -> list[str]:
    """The words of a name in lower case; all but letters cuts: `Test_data-2.csv` is test, data, csv."""
    return [word for word in re.split(r"[\W\d_]+", name.lower()) if word]


def split_of_folder(name: str) -> str | None:
    """The split that a folder of that name, or a split of that name on the hub, is."""
    first, *others = words(name) or [""]
    return SPLIT_NAMES.get(first) if BESIDE.issuperset(others) else None


def splits_of_file(name: str) -> set[str]:
    """The splits that a file's name speaks of: one, none, or too many."""
    return {SPLIT_NAMES[word] for word in words(stem(name)) if word in SPLIT_NAMES}


def stem(name: str) -> str:
    """A file's name without the formats that it ends with."""
    return re.sub(r"(\.(parquet|jsonl?|csv|tsv|gz))+$", "", name, flags=re.IGNORECASE)


def is_no_data(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or no user made it."""
    return name.startswith(".") or name.lower() in NO_DATA


def visible_files(folder: Path, notes: Notes) -> list[Path]:
    """All files in `folder` and below it, in order, but those that `is_no_data` tells of, which are noted."""
    return sorted(_visible(folder, notes, set()))


def _visible(folder: Path, notes: Notes, above: set[str]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:  # a link to where it lies
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if is_no_data(entry.name):
            notes.leave_out("hidden, or left by a program", "._*" if entry.name.startswith("._") else entry.name)
        elif entry.is_dir():
            yield from _visible(folder / entry.name, notes, above | {here})
        else:
            yield folder / entry.name


def has_suffix(file: Path, suffixes: Collection[str]) -> bool:
    """Whether a file's name ends with one of `suffixes`, in any case."""
    return file.name.lower().endswith(tuple(suffixes))


@dataclass(frozen=True)
class _Table:
    file: Path
    home: Path
    """The folder in which it, or the folder of its split, lies."""
    split: str | None
    entry: str
    """What is in that folder: the file's name, or that of the split's folder."""


def find_tables(folder: Path, suffixes: Sequence[str], notes: Notes) -> dict[str, list[Path]]:
    """The files of each split, in order; none where there is no table.

    Args:
        folder: the data set's.
        suffixes: those of tables, in lower case. Where a split has several formats the first of them is used.
        notes: gets what is left out, and where each split comes from.

    Raises:
        UserError: two files or folders for one split; a path that speaks of two; tables of which no split is known.
    """
    files = visible_files(folder, notes)
    tables = [
        _placed(folder, file) for file in files if has_suffix(file, suffixes) and file.name.lower() not in DESCRIPTIONS
    ]
    if not tables:
        return {}
    named = [table for table in tables if table.split]
    homes = {table.home for table in named or tables}
    top = min(len(home.parts) for home in homes)
    first = sorted(home for home in homes if len(home.parts) == top)
    if len(first) > 1:
        shown = listed([f"{home.relative_to(folder)}/" for home in first])
        raise UserError(f"dataset {folder}: tables in each of {shown}; name one of these folders as the data set")
    chosen = [table for table in named or tables if table.home == first[0]]
    for table in tables:
        if table.home != first[0] or (named and not table.split):
            where = "of no split" if table.home == first[0] else "in a folder that is no split's"
            notes.leave_out(where, str(table.file.relative_to(folder)))
    refuse_two_folders(folder, [table.file for table in chosen])
    by_split: dict[str, list[_Table]] = {}
    for table in chosen:
        _refuse_two_splits(folder, table)
        by_split.setdefault(table.split or "", []).append(table)
    found = {}
    for split, of_split in by_split.items():
        used = _of_first_format(folder, split or "train", of_split, suffixes, notes)
        _refuse_two_tables(folder, split, used)
        found[split or "train"] = [table.file for table in used]
        notes.sources[split or "train"] = listed(
            list(dict.fromkeys(_shown(folder, table) for table in used)), of="files"
        )
    return found


def _placed(folder: Path, file: Path) -> _Table:
    parts = file.relative_to(folder).parts
    for depth, part in enumerate(parts[:-1]):
        if split := split_of_folder(part):
            return _Table(file, folder.joinpath(*parts[:depth]), split, part)
    spoken = splits_of_file(file.name)
    return _Table(file, file.parent, min(spoken) if spoken else None, file.name)


def _shown(folder: Path, table: _Table) -> str:
    place = (table.home / table.entry).relative_to(folder)
    return str(place) if table.entry == table.file.name else f"{place}/"


def _refuse_two_splits(folder: Path, table: _Table) -> None:
    inside = table.file.relative_to(table.home)
    spoken = {split for part in inside.parts[:-1] if (split := split_of_folder(part))} | splits_of_file(inside.name)
    if len(spoken) > 1:
        both = " and of ".join(sorted(spoken))
        raise UserError(f"dataset {folder}: {table.file.relative_to(folder)}: its path speaks of {both}; rename it")


def _of_first_format(
    folder: Path, split: str, tables: Sequence[_Table], suffixes: Sequence[str], notes: Notes
) -> list[_Table]:
    suffix = next(s for s in suffixes if any(has_suffix(table.file, [s]) for table in tables))
    for table in tables:
        if not has_suffix(table.file, [suffix]):
            notes.leave_out(f"{split} is read from {suffix}", str(table.file.relative_to(folder)))
    return [table for table in tables if has_suffix(table.file, [suffix])]


def _refuse_two_tables(folder: Path, split: str, tables: Sequence[_Table]) -> None:
    """Several files are parts of one table, or lie in one folder of their split."""
    kinds: dict[str, str] = {}
    for table in tables:
        is_file = table.entry == table.file.name
        kinds.setdefault(re.sub(r"\d+", "", stem(table.entry)) if is_file else f"{table.entry}/", table.entry)
    if len(kinds) > 1:
        shown = listed([kind if kind.endswith("/") else entry for kind, entry in kinds.items()])
        if split:
            refuse_two_for_one(folder, split, shown)
        raise UserError(
            f"dataset {folder}: {shown}: which is train, validation or test? Say so in their names (train.csv, "
            "test.csv), or name one file as the data set"
        )


def refuse_two_for_one(folder: Path, split: str, shown: str) -> None:
    """Raises the `UserError` that says that a split has two files or folders."""
    raise UserError(
        f"dataset {folder}: {shown} are both {split}; keep one of them, or put what belongs together into one folder"
    )


def listed(names: Sequence[str], of: str = "") -> str:
    """`a, b and c`; many are shortened."""
    if len(names) > 4:
        return (
            f"{len(names)} {of}, {names[0]} to {names[-1]}"
            if of
            else f"{', '.join(names[:3])} and {len(names) - 3} more"
        )
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def refuse_two_folders(folder: Path, files: Iterable[Path]) -> None:
    """Raises `UserError` if two folders beside each other, in which some of the files lie, are the same split."""
    found: dict[tuple[Path, str], set[str]] = {}
    for file in files:
        for parent in file.relative_to(folder).parents:
            if split := split_of_folder(parent.name):
                found.setdefault((parent.parent, split), set()).add(f"{parent}/")
    for (_, split), names in found.items():
        if len(names) > 1:
            refuse_two_for_one(folder, split, listed(sorted(names)))


def what_is_there(folder: Path) -> str:
    """What a folder holds, in a few words, for the line that refuses it."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in visible_files(folder, Notes()))
    if not counts:
        return "nothing"
    return ", ".join(f"{count} {'file' if count == 1 else 'files'} {kind}" for kind, count in counts.most_common(4))
