"""Which files in a folder are data, which split they belong to, and what is left out.

The rules are the same for all tasks:

- Hidden files and what archives and file managers leave behind (`.ipynb_checkpoints`, `__MACOSX`, `._3.png`) are
  skipped.
- A folder belongs to a split if its whole name says so, in any case (`Test`, `val`, `training_set`, `train2017`), and
  so does everything below it; a file does if one of its words says so (`train_data.csv`,
  `Test-00000-of-00002.parquet`).
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

FILLER_WORDS = frozenset({"set", "split", "data", "dataset", "images", "image", "imgs", "img", "files", "folder"})
"""Words that may stand beside a split's in a folder's name; with any other word it is a class: `train station`."""

SYSTEM_NAMES = frozenset({"__macosx", "__pycache__", "@eadir", "thumbs.db", "desktop.ini", "lost+found"})
"""Names, in lower case, that programs give to files and folders of their own."""

DESCRIPTIONS = frozenset(
    {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json", "readme.md"}
)
"""Files that describe a data set by the conventions of the hub; they are not tables."""


@dataclass
class Notes:
    """What was noticed while a data set was opened; the summary before training shows it."""

    sources: dict[str, str] = field(default_factory=dict)
    """Where each official split comes from, in words."""
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """For each reason why something is not used, what it is and how often: `{"not an image": {".txt": 3}}`."""
    warnings: list[str] = field(default_factory=list)

    def leave_out(self, why: str, what: str, count: int = 1) -> None:
        """Notes `count` files, say, that are not used."""
        self.left_out.setdefault(why, Counter())[what] += count

    def add(self, others: "Notes") -> None:
        """Adds the notes of others."""
        self.sources |= others.sources
        self.warnings += others.warnings
        for why, kinds in others.left_out.items():
            for what, count in kinds.items():
                self.leave_out(why, what, count)


def words(name: str) -> list[str]:
    """The words of a name in lower case; everything but letters separates: `Test_data-2.csv` has test, data, csv."""
    return [word for word in re.split(r"[\W\d_]+", name.lower()) if word]


def split_of_folder(name: str) -> str | None:
    """Which split a folder of that name holds; None if it is not a split's."""
    first, *others = words(name) or [""]
    return SPLIT_NAMES.get(first) if FILLER_WORDS.issuperset(others) else None


def splits_of_file(name: str) -> set[str]:
    """The splits in a file's name: one, none, or too many."""
    return {SPLIT_NAMES[word] for word in words(stem(name)) if word in SPLIT_NAMES}


def stem(name: str) -> str:
    """A file's name without the suffixes of its format."""
    return re.sub(r"(\.(parquet|jsonl?|csv|tsv|gz))+$", "", name, flags=re.IGNORECASE)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or was left by a program."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def visible_files(folder: Path, notes: Notes) -> list[Path]:
    """All files in `folder` and below it, sorted, without those that are hidden, which are noted."""
    return sorted(_visible(folder, notes, set()))


def _visible(folder: Path, notes: Notes, above: set[str]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:  # a link to a folder above it
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from error
    for entry in entries:
        if is_hidden(entry.name):
            notes.leave_out("hidden or system files", "._*" if entry.name.startswith("._") else entry.name)
        elif entry.is_dir():
            yield from _visible(folder / entry.name, notes, above | {here})
        else:
            yield folder / entry.name


def has_suffix(file: Path, suffixes: Collection[str]) -> bool:
    """Whether a file's name ends with one of `suffixes`, in any case."""
    return file.name.lower().endswith(tuple(suffixes))


def refuse_duplicate_split(folder: Path, split: str, shown: str) -> None:
    """Raises the `UserError` for a split that has two files or folders."""
    raise UserError(
        f"dataset {folder}: {shown} are both {split}; keep one, or put what belongs together into one folder"
    )


def enumerate_names(names: Sequence[str], of: str = "") -> str:
    """`a, b and c`; a long list is shortened, to its first and last if `of` says what its names are."""
    if len(names) > 4:
        return (
            f"{len(names)} {of}, {names[0]} to {names[-1]}"
            if of
            else f"{', '.join(names[:3])} and {len(names) - 3} more"
        )
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def refuse_duplicate_folders(folder: Path, files: Iterable[Path]) -> None:
    """Raises `UserError` if two folders side by side that hold some of the files are the same split's."""
    found: dict[tuple[Path, str], set[str]] = {}
    for file in files:
        for parent in file.relative_to(folder).parents:
            if split := split_of_folder(parent.name):
                found.setdefault((parent.parent, split), set()).add(f"{parent}/")
    for (_, split), names in found.items():
        if len(names) > 1:
            refuse_duplicate_split(folder, split, enumerate_names(sorted(names)))


def describe_contents(folder: Path) -> str:
    """What a folder holds, in a few words, for error messages."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in visible_files(folder, Notes()))
    if not counts:
        return "nothing"
    return ", ".join(f"{count} {'file' if count == 1 else 'files'} {kind}" for kind, count in counts.most_common(4))
