"""The summary of a data set as training would see it, before any time is spent on training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from fvae_lora_experiments.data.classes import class_names
from fvae_lora_experiments.data.files import Notes

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console

    from fvae_lora_experiments.data.fingerprint import Identity
    from fvae_lora_experiments.data.image_decoding import ImageFacts
    from fvae_lora_experiments.data.splits import Splits
    from fvae_lora_experiments.tasks import Task

WIDTH = 80
MOST_SHOWN = 12
"""How many classes or groups are listed; a longer list is shortened."""


@dataclass(frozen=True)
class Summary:
    """What was found. All paths are relative to the data set."""

    name: str
    task: str
    rows: dict[str, int]
    """Of each split of the run."""
    sources: dict[str, str]
    """Where each split comes from, in words."""
    counts: dict[str, dict[str, dict[str, int]]]
    """Rows of each `class` and `group`, if there are any: by their names and by split."""
    left_out: dict[str, dict[str, int]]
    """For each reason why something is not used, what it is and how often."""
    also_in_train: dict[str, int]
    """Rows of validation and test whose content is also in train, as it was before validation was drawn from it."""
    images: ImageFacts | None = None
    cut: dict[str, int] = field(default_factory=dict)
    """Rows too long for the model, by split, if the tokenizer is known."""
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What a record keeps in addition to the splits."""
        kept = asdict(self)
        return {key: kept[key] for key in ("counts", "left_out", "also_in_train", "images", "warnings")}


def summarise(
    task: Task, official: dict[str, Dataset], identity: Identity, notes: Notes, quiet: bool = True
) -> Summary:
    """Summarises a data set after looking at all of it.

    Args:
        task: the task to train.
        official: the official splits, as the task opened them.
        identity: their identity.
        notes: what was noticed when they were opened.
        quiet: no progress bar.

    Raises:
        UserError: rows that cannot be used, or splits that cannot be drawn.
    """
    images = task.look_at_images(official, identity.fingerprint, quiet)
    hashed = {name: rows.add_column("content", identity.contents[name]) for name, rows in official.items()}
    splits = task.split(hashed)
    contents = {name: rows["content"][:] for name, rows in splits.by_name.items()}
    train = set(contents["train"])
    seen = train.union(contents["validation"] if "of train" in splits.validation_from else [])
    counts = {what: _counts(splits, column) for what, column in (("class", "label"), ("group", "group"))}
    counts = {what: of for what, of in counts.items() if of}
    also_in_train = {
        "validation": sum(content in train for content in contents["validation"]),
        "test": sum(content in seen for content in contents["test"]),
    }
    return Summary(
        name=task.recipe.dataset,
        task=task.recipe.task,
        rows=splits.sizes,
        sources=_sources(splits, notes),
        counts=counts,
        left_out={why: dict(kinds.most_common()) for why, kinds in notes.left_out.items()},
        also_in_train=also_in_train,
        images=images,
        warnings=[*notes.warnings, *_warnings(counts, also_in_train), *(images.warnings() if images else [])],
    )


def _counts(splits: Splits, column: str) -> dict[str, dict[str, int]]:
    """Rows by name and by split; none unless each row has one name."""
    names = class_names(splits.train, column)
    if not names or not isinstance(splits.train[0][column], int):
        return {}
    by_split = {
        split: np.bincount(rows[column][:], minlength=len(names)).tolist() for split, rows in splits.by_name.items()
    }
    return {name: {split: counts[i] for split, counts in by_split.items()} for i, name in enumerate(names)}


def _sources(splits: Splits, notes: Notes) -> dict[str, str]:
    def describe(text: str) -> str:
        official = re.fullmatch(r"the official (\w+) split", text)
        own = official and notes.sources.get(official[1])
        return f"{text}, {own}" if own else text

    drawn = [text for text in (splits.validation_from, splits.test_from) if "of train" in text]
    train = notes.sources.get("train", "the data set")
    return {
        "train": f"{train}, without the rows drawn from it" if drawn else train,
        "validation": describe(splits.validation_from),
        "test": describe(splits.test_from),
    }


def _warnings(counts: Mapping[str, Mapping[str, Mapping[str, int]]], also_in_train: Mapping[str, int]) -> Iterable[str]:
    for what, rows in counts.items():
        for split in ("train", "validation", "test"):
            if absent := [name for name, of in rows.items() if not of[split]]:
                more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
                yield f"no row in {split} of {what} {', '.join(absent[:5])}{more}"
    for split, count in also_in_train.items():
        if count:
            yield f"{count} {'row' if count == 1 else 'rows'} of {split} also in train"


def print_summary(summary: Summary, console: Console) -> None:
    """Prints a summary, at most 80 columns wide."""

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), width=min(WIDTH, console.width), highlight=False)

    line(f"Data: {summary.name}, read for the task {summary.task}", "bold")
    table = _table(["split", "rows", "from"], {"rows"})
    for split, count in summary.rows.items():
        table.add_row(split, f"{count:,}", Text(summary.sources[split]))
    console.print(table, width=min(WIDTH, console.width), highlight=False)
    for what, rows in summary.counts.items():
        console.print(_counts_table(what, rows), width=min(WIDTH, console.width), highlight=False)
    for why, kinds in summary.left_out.items():
        line(f"Left out, {why}: {', '.join(f'{kind} ({count:,})' for kind, count in _most_common(kinds).items())}")
    if not summary.left_out:
        line("Left out: nothing")
    if summary.images:
        line(f"Images: {summary.images.in_words()}")
    if summary.cut:
        line(f"Rows cut: {', '.join(f'{count:,} of {split}' for split, count in summary.cut.items())}")
    shared = [f"{count:,} of {summary.rows[split]:,} {split} rows" for split, count in summary.also_in_train.items()]
    line(f"Also in train: {', '.join(shared)}")
    for warning in summary.warnings:
        line(f"Warning: {warning}", "yellow")


def _most_common(kinds: Mapping[str, int]) -> dict[str, int]:
    """The most common kinds, and the sum of the others."""
    shown = dict(list(kinds.items())[:6])
    rest = sum(kinds.values()) - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def _counts_table(what: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    splits = list(next(iter(rows.values())))
    table = _table([what, *splits], set(splits))
    shown = list(rows.items()) if len(rows) <= MOST_SHOWN else list(rows.items())[: MOST_SHOWN - 2]
    for name, of in shown:
        table.add_row(Text(name), *(f"{of[split]:,}" for split in splits))
    if rest := list(rows.values())[len(shown) :]:
        spans = [f"{min(of[split] for of in rest):,} to {max(of[split] for of in rest):,}" for split in splits]
        table.add_row(f"{len(rest)} more, each", *spans)
    return table


def _table(columns: list[str], numbers: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            no_wrap=name != "from",
            overflow="fold" if name == "from" else "ellipsis",
        )
    return table
