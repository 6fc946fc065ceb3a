"""The modules of a model that a recipe's targets and layers select."""

import re
import warnings
from collections.abc import Sequence

from peft.utils.other import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fvae_lora import resolve_targets
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.heads import head_modules

NAME = re.compile(r"[\w.]+")
"""A module's name, as opposed to a regular expression."""


def adapted_modules(model: PreTrainedModel, wanted: Sequence[str] | str) -> list[str]:
    """The selected modules of `model`: full names or their last parts.

    Args:
        model: not adapted yet.
        wanted: names, also old ones such as ViT's `query`, which is `q_proj` in transformers 5; or, as in peft,
            `all-linear` or a regular expression for whole names. A single name is taken as that name.

    Raises:
        UserError: the model has no module of a name; lists the names of its linear layers.
    """
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        others = (*head_modules(model), *_output_layers(model))
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        return [name for name in linear if not f"{name}.".startswith(tuple(f"{other}." for other in others))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recipes use the old names on purpose, because they fit more models
            found = resolve_targets(model, [wanted] if isinstance(wanted, str) and NAME.fullmatch(wanted) else wanted)
    except re.error as error:
        raise UserError(f"adapter.target_modules: {wanted!r} is not a regular expression: {error}") from error
    except ValueError as error:
        raise UserError(f"adapter.{error}") from error
    if isinstance(found, str):
        return [name for name, _ in model.named_modules() if match_target_against_key(found, name)]
    return sorted(found)


def _output_layers(model: PreTrainedModel) -> list[str]:
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if output is not None and module is output]


def in_layers(model: PreTrainedModel, targets: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Full names of the selected modules inside these blocks, numbered as in peft.

    Raises:
        UserError: there are none in one of the blocks.
    """
    ends = tuple(f".{target}" for target in targets)
    blocks = {
        name: int(block[1])
        for name, _ in model.named_modules()
        if (name in targets or name.endswith(ends)) and (block := re.match(r".*?\.[^.]*\.(\d+)\.", name))
    }
    if missing := sorted({*layers} - {*blocks.values()}):
        there = sorted({*blocks.values()})
        known = f"0 to {there[-1]}" if there == [*range(len(there))] and there else ", ".join(map(str, there)) or "none"
        raise UserError(
            f"adapter.layers: block {missing[0]} of {type(model).__name__} has nothing to adapt; allowed are {known}"
        )
    return [name for name, block in blocks.items() if block in layers]
