"""A data set's identity: a hash of what is in it, whatever it is called and wherever it lies."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fvae_lora_experiments.data.classes import class_names


@dataclass(frozen=True)
class Identity:
    """What is in a data set, as hashes."""

    fingerprint: str
    """SHA-256 over the classes and, split by split and row by row, the label, the content and the group, if any."""
    contents: dict[str, list[str]]
    """SHA-256 of what each row is, whatever its label, group and split, by split and in the order of its rows."""


Content = Callable[[dict[str, Any], str], bytes]


def identify(splits: dict[str, Dataset], content: Content, shared_content: Content | None = None) -> Identity:
    """The identity of a data set.

    Args:
        splits: the official splits, with a `label` where they have classes and a `group` where they have groups.
        content: gives the bytes of a row; its second argument says where the row is, for messages.
        shared_content: likewise what is the same in rows of different splits that are the same; None is the content.
    """
    total = hashlib.sha256()
    contents: dict[str, list[str]] = {name: [] for name in splits}
    for name in sorted(splits):
        rows = splits[name]
        groups = class_names(rows, "group")
        total.update(repr((name, class_names(rows), len(rows), *groups)).encode())
        for number, row in enumerate(rows, 1):
            where = f"split {name}, row {number}"
            digest = hashlib.sha256(content(row, where))
            contents[name].append(
                (hashlib.sha256(shared_content(row, where)) if shared_content else digest).hexdigest()
            )
            total.update(repr(row.get("label")).encode() + digest.digest())
            if groups:
                total.update(repr(row["group"]).encode())
    return Identity(total.hexdigest(), contents)


def fingerprint(splits: dict[str, Dataset], content: Content) -> str:
    """The fingerprint alone, see `identify`."""
    return identify(splits, content).fingerprint
