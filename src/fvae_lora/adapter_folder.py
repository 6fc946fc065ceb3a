"""An adapter's folder: what it must contain, its README, and writing a new one atomically.

A folder is checked without loading it, so that a bad one is refused before the model is changed. The README says how to
load it, because stock peft cannot unless this package is imported.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .module_names import abbreviated

PEFT_PREFIX = "base_model.model."
MARKER = "<!-- fvae-lora: how to load -->"


def check_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise with one line that says what is wrong with the file.

    Args:
        path: The file, an adapter's ``adapter_config.json``.

    Returns:
        The object.

    Raises:
        ValueError: If the file is missing or truncated, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in an adapter's folder; reads only the file's header.

    Args:
        folder: The adapter's folder, with ``adapter_model.safetensors``.

    Raises:
        ValueError: If that file is missing, truncated or not a safetensors file, or if the method's own weights are not
            floating-point numbers.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: the adapter's weights are missing")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(value.get_shape()) for key, value in slices.items()}
            dtypes = {key: value.get_dtype() for key, value in slices.items() if ".fvae_lora_" in key}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from None
    if wrong := sorted(key for key, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))):
        raise ValueError(f"{path} must hold floating-point numbers, not {dtypes[wrong[0]]}, in {abbreviated(wrong)}")
    return shapes


def check_names(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    prefix: str,
    model: nn.Module,
) -> None:
    """Refuse weights for layers that the model does not have, before the model is changed.

    Args:
        found: Names and shapes in the checkpoint, without ``base_model.model.``.
        expected: Names and shapes that the adapter's layers will have.
        prefix: The prefix of the adapter's own parameters, ``fvae_lora_``.
        model: The model to be adapted.

    Raises:
        ValueError: If a weight is missing, or belongs to no layer of the model.
    """
    own = {key for key in found if f".{prefix}" in f".{key}"} - _parameters_of_modules(model)
    if missing := sorted(expected.keys() - own):
        raise ValueError(f"the adapter does not fit {type(model).__name__}: it lacks {abbreviated(missing)}")
    if extra := sorted(own - expected.keys()):
        raise ValueError(
            f"the adapter does not fit {type(model).__name__}, which has no place for {abbreviated(extra)}"
        )


def _parameters_of_modules(model: nn.Module) -> set[str]:
    """Names of a model's parameters without an adapter; a module of its own may have a name like the adapter's."""
    return {name.replace(".original_module.", ".") for name, _ in model.named_parameters()}


def check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], model: nn.Module
) -> None:
    """Refuse weights of the wrong shape, before the model is changed.

    Args:
        found: As in `check_names`.
        expected: As in `check_names`.
        model: The model to be adapted.

    Raises:
        ValueError: If a weight's shape differs from that of the layer's or the base model's weight of that name.
    """
    base = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for key, shape in found.items():
        wanted = expected.get(key) or base.get(key.replace(".base_layer.", "."))
        if wanted is not None and wanted != shape:
            where = type(model).__name__
            raise ValueError(f"the adapter does not fit {where}: {key} has shape {shape}, the model needs {wanted}")


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder to write into, which gets its name once it is complete.

    Args:
        folder: The folder; must not exist, or be empty.

    Raises:
        ValueError: If it is not empty.
    """
    target = Path(folder).resolve()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"folder: {target} exists and is not empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unfinished:
        inside = Path(unfinished, target.name)
        inside.mkdir()
        yield inside
        inside.replace(target)


def write_loading_instructions(folder: Path, rank: int, base_model: str | None) -> None:
    """Add to the README of an adapter's folder what has to be installed and imported to load it.

    Args:
        folder: The adapter's folder; its README is created if there is none, and left alone if it has the section.
        rank: The adapter's rank.
        base_model: Name of the model that it belongs to, if known.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if MARKER in text:
        return
    base = " ".join(str(base_model or "the base model").replace("`", "'").split())  # one line
    section = f"""{MARKER}
## How to load this adapter

It is an FVAE-LoRA adapter (rank {rank}). Install `fvae-lora` beside peft and import it before loading; without
the import peft stops with `KeyError: 'FVAE_LORA'`.

```sh
pip install fvae-lora
```

```python
import fvae_lora  # registers FVAE_LORA with peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")  # base_model: {base}
```
"""
    readme.write_text(f"{text.rstrip()}\n\n{section}" if text else section, encoding="utf-8")
