"""How models and data sets are named: on the command line, and in records that must not tell where somebody works."""

import os
import sys
from pathlib import Path


def is_local(name: str) -> bool:
    """Whether `name` means a folder here rather than `name` or `owner/name` on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def short_name(name: str) -> str:
    """A folder's own name; a name on the hub as it is."""
    return Path(name).resolve().name if is_local(name) else name


def portable_path(name: str, folder: Path) -> str:
    """`name` as a record in `folder` may keep it: a path relative to `folder`, a name on the hub as it is.

    Where the relative path would lead through the directories above home (and so past a user's name), the last
    component alone is kept.
    """
    if not Path(name).exists():
        return name
    target, folder, home = Path(name).resolve(), folder.resolve(), Path.home().resolve()
    common = Path(os.path.commonpath([target, folder]))
    if home.is_relative_to(common) and home != common:
        return target.name
    relative = os.path.relpath(target, folder)
    return relative if relative.startswith(".") else f"./{relative}"


def resolve_portable(name: str, folder: Path) -> str:
    """The inverse of `portable_path`: what to open for a `name` that the record in `folder` keeps."""
    return str(folder / name) if name.startswith(".") else name


def without_paths(text: str, *places: Path) -> str:
    """`text` as a record may keep it: paths in it that lead through `places`, here, home or Python's begin there."""
    for place in (*places, Path.cwd(), Path.home(), Path(sys.prefix)):
        text = text.replace(f"{place.resolve()}/", "").replace(f"{place}/", "")
    return text
