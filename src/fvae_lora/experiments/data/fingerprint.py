"""A data set's identity: a hash of what is in it, whatever it is called and wherever it lies."""

import hashlib
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from fvae_lora.experiments.data.columns import class_names


def fingerprint(splits: dict[str, Dataset], content: Callable[[dict[str, Any], str], bytes]) -> str:
    """SHA-256 over the classes and, split by split and row by row, the label, the content and the group, if any.

    Args:
        splits: the official splits, with a `label` where they have classes and a `group` where they have groups.
        content: gives the bytes of a row; its second argument says where the row is, for messages.
    """
    total = hashlib.sha256()
    for name in sorted(splits):
        rows = splits[name]
        groups = class_names(rows, "group")
        total.update(repr((name, class_names(rows), len(rows), *groups)).encode())
        for number, row in enumerate(rows, 1):
            digest = hashlib.sha256(content(row, f"split {name}, row {number}")).digest()
            total.update(repr(row.get("label")).encode() + digest)
            if groups:
                total.update(repr(row["group"]).encode())
    return total.hexdigest()
