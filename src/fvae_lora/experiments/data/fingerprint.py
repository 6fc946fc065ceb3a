"""A data set's identity: a hash of what is in it, whatever it is called and wherever it lies."""

import hashlib
from pathlib import Path
from typing import Any

from datasets import Dataset


def fingerprint(splits: dict[str, Dataset]) -> str:
    """SHA-256 over the classes and, split by split and row by row, the label and the image's bytes."""
    total = hashlib.sha256()
    for name in sorted(splits):
        rows = splits[name]
        total.update(repr((name, rows.features["label"].names, len(rows))).encode())
        for row in rows:
            total.update(repr(row["label"]).encode() + hashlib.sha256(image_bytes(row["image"])).digest())
    return total.hexdigest()


def image_bytes(image: dict[str, Any]) -> bytes:
    """The encoded bytes of an image that is not decoded yet."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
