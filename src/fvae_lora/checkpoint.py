"""What an adapter's folder holds, read without loading it, so that a bad one is refused before a model is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

PEFT_PREFIX = "base_model.model."


def check_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say in one line what is wrong with the file.

    Args:
        path: The file, an adapter's ``adapter_config.json``.

    Returns:
        The object.

    Raises:
        ValueError: If the file is missing, cut off or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in an adapter's folder; reads the file's header alone.

    Args:
        folder: The adapter's folder, with ``adapter_model.safetensors``.

    Raises:
        ValueError: If that file is missing, truncated or no safetensors file, or if weights of the method's own are no
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
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    if wrong := sorted(key for key, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))):
        raise ValueError(f"{path} must hold floating-point numbers, not {dtypes[wrong[0]]}, in {some(wrong)}")
    return shapes


def check_fit(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    prefix: str,
    model: nn.Module,
) -> None:
    """Refuse weights that do not fit a model, before anything of the model is changed.

    Args:
        found: Names and shapes in the checkpoint, without ``base_model.model.``.
        expected: Names and shapes that the adapter's layers will have.
        prefix: What marks the adapter's own parameters, ``fvae_lora_``.
        model: The model to be adapted.

    Raises:
        ValueError: If a weight is missing, belongs to no layer of the model, or has another shape.
    """
    where = type(model).__name__
    own = {key for key in found if f".{prefix}" in f".{key}"} - _parameters_of_modules(model)
    if missing := sorted(expected.keys() - own):
        raise ValueError(f"the adapter does not fit {where}: it lacks {some(missing)}")
    if extra := sorted(own - expected.keys()):
        raise ValueError(f"the adapter does not fit {where}, which has no place for {some(extra)}")
    base = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for key, shape in found.items():
        wanted = expected.get(key) or base.get(key.replace(".base_layer.", "."))
        if wanted is not None and wanted != shape:
            raise ValueError(f"the adapter does not fit {where}: {key} has shape {shape}, the model needs {wanted}")


def _parameters_of_modules(model: nn.Module) -> set[str]:
    """Names of a model's parameters without an adapter; a module of its own may have a name like the adapter's."""
    return {name.replace(".original_module.", ".") for name, _ in model.named_parameters()}


def some(names: list[str], limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
