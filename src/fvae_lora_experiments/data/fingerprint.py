"""A data set's identity: a hash of its content, whatever its name and place."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fvae_lora_experiments.data.classes import class_names


@dataclass(frozen=True)
class Identity:
    """Hashes of a data set's content."""

    fingerprint: str
    """SHA-256 of the classes and, split by split and row by row, of the label, the content and the group, if any."""
    contents: dict[str, list[str]]
    """SHA-256 of each row without its label, group and split: by split, in the order of the rows."""


Content = Callable[[dict[str, Any], str], bytes]


def identify(splits: dict[str, Dataset], content: Content, shared_content: Content | None = None) -> Identity:
    """The identity of a data set.

    Args:
        splits: the official splits, with a `label` where they have classes and a `group` where they have groups.
        content: the bytes of a row; its second argument says where the row is, for messages.
        shared_content: likewise the bytes by which a row is found again in another split; None for the content.
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
