"""Names of models and data sets: the built-in ones, local copies, and paths as records hold them.

The local copy of a data set on the hub is looked for in the folder that the variable `FVAE_LORA_DATA_ROOT` names.
"""

import os
import sys
from importlib.resources import files
from pathlib import Path

MODELS = {"vit-fashion-mnist": Path(str(files("fvae_lora_experiments"))) / "assets" / "vit-fashion-mnist"}
"""Models that come with this package, and their folders."""

DIGITS = "sklearn-digits"
DATASETS = (DIGITS,)
"""Data sets that come with a package."""

DATA_ROOT = "FVAE_LORA_DATA_ROOT"


def is_local(name: str) -> bool:
    """Whether `name` is a local folder rather than `name` or `owner/name` on the hub."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def local_copy(name: str, config: str | None) -> Path | None:
    """The local copy of a data set: `ROOT/owner/name` or `ROOT/name`, or its configuration's folder in that."""
    root = os.environ.get(DATA_ROOT)
    for copy in (Path(root) / name, Path(root) / Path(name).name) if root else ():
        if copy.is_dir():
            return copy / config if config and (copy / config).is_dir() else copy
    return None


def short_name(name: str) -> str:
    """The last component of a folder's path; a name on the hub unchanged."""
    return Path(name).resolve().name if is_local(name) else name


def portable_path(name: str, folder: Path) -> str:
    """`name` as a record in `folder` may hold it: a path relative to `folder`, or a name on the hub unchanged.

    If the relative path would lead through the directories above home (and so contain a user's name), only the last
    component is kept.
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
    """The inverse of `portable_path`: what to open for a `name` in a record in `folder`."""
    return str(folder / name) if name.startswith(".") else name


def without_paths(text: str, *places: Path) -> str:
    """`text` as a record may hold it: paths in `places`, the working directory, home or Python's become relative."""
    for place in (*places, Path.cwd(), Path.home(), Path(sys.prefix)):
        text = text.replace(f"{place.resolve()}/", "").replace(f"{place}/", "")
    return text
