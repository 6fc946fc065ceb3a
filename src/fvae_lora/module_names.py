"""Names of modules that changed between versions of transformers, or differ between architectures."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

SYNONYMS = (
    {"query", "q_proj", "q_lin", "q"},
    {"key", "k_proj", "k_lin", "k"},
    {"value", "v_proj", "v_lin", "v"},
    {"o_proj", "out_proj", "out_lin", "o"},
)


def current_parameter(name: str) -> str:
    """The current name of a parameter in an adapter's file, given its name in version 0.1.

    B was a parameter then and is now a module with a weight, because software on top of peft looks for the adapter's
    name between two dots.
    """
    return f"{name}.weight" if name.endswith(".fvae_lora_B") else name


@functools.cache
def register_old_names() -> None:
    """Register the names of version 0.1 for transformers' ``load_adapter``, which has its own list of renamings.

    There is a list per model type, and a "legacy" one for all of them.
    """
    with_adapters_name = WeightRenaming(r"(fvae_lora_B\.[^.]+)$", r"\1.weight")
    known = get_checkpoint_conversion_mapping("legacy") or []
    register_checkpoint_conversion_mapping("legacy", [*known, with_adapters_name], overwrite=True)


def current_name(model: nn.Module, name: str) -> str:
    """A module's name in the installed transformers, given its name in an older version.

    Args:
        model: The model.
        name: Full name of a module, a layer of a checkpoint for example.

    Returns:
        The name in the model, or `name` itself if transformers has no renaming for it.
    """
    modules = dict(model.named_modules())
    if name in modules or not isinstance(model, PreTrainedModel):
        return name
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    renamed, _ = rename_source_key(f"{name}.weight", renamings, [])
    renamed = renamed.removesuffix(".weight")
    return renamed if renamed in modules else name


def resolve_targets(model: nn.Module, targets: Iterable[str] | str) -> set[str] | str:
    """Replace target names that the model has under another name, with a warning.

    Args:
        model: The model to be adapted.
        targets: Names of modules, full or their last parts, or one regular expression.

    Returns:
        Targets that each match a module.

    Raises:
        ValueError: If a target matches nothing, not even under another name; the message lists the candidates.
    """
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        if not any(match_target_against_key(targets, name) for name in names):
            raise ValueError(_no_match(model, targets))
        return targets
    resolved = {target: _resolve(model, names, target) for target in sorted(targets)}
    if changed := {old: new for old, new in resolved.items() if old != new}:
        changes = ", ".join(f"{old} -> {new}" for old, new in changed.items())
        warnings.warn(f"target_modules: {type(model).__name__} has other names for these: {changes}", stacklevel=2)
    return set(resolved.values())


def _resolve(model: nn.Module, names: list[str], target: str) -> str:
    def found(name: str) -> bool:
        return any(other == name or other.endswith(f".{name}") for other in names)

    if found(target):
        return target
    if (renamed := current_name(model, target)) != target:
        return renamed
    parent, _, last = target.rpartition(".")
    others = next((group for group in SYNONYMS if last in group), set())
    for prefix in {f"{parent}." if parent else "", ""}:
        candidates = sorted(name for name in others if found(prefix + name))
        if len(candidates) == 1:
            return prefix + candidates[0]
    raise ValueError(_no_match(model, target))


def is_all_linear(targets: Iterable[str] | str | None) -> bool:
    """Whether targets are peft's ``"all-linear"``, in upper or lower case as peft accepts it."""
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def warn_of_experts(model: nn.Module, targets: Iterable[str] | str | None) -> None:
    """Warn of the weights of a mixture of experts that are not adapted although the targets ask for them.

    Experts and routers whose weights are bare parameters rather than linear layers cannot be adapted. What older
    versions of transformers called ``gate_proj`` and ``up_proj`` is now ``gate_up_proj``.

    Args:
        model: The model to be adapted.
        targets: Names, a regular expression or ``"all-linear"``.
    """

    def asked_for(name: str) -> bool:
        if is_all_linear(targets):
            return True
        if isinstance(targets, str):
            return match_target_against_key(targets, name)
        words = set(name.rpartition(".")[2].split("_"))
        return any(words.issuperset(target.rpartition(".")[2].split("_")) for target in targets or ())

    left_out = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in expert_weights(model) if asked_for(name))
    if left_out:
        warnings.warn(
            f"target_modules: {', '.join(left_out)} of {type(model).__name__} are not adapted: parameters that "
            "belong to no linear layer cannot be",
            stacklevel=2,
        )


def expert_weights(model: nn.Module) -> Iterator[str]:
    """Names of the weights of experts and routers that belong to no linear layer."""
    linear = (nn.Linear, Conv1D, nn.Embedding, BaseTunerLayer)
    for name, module in model.named_modules():
        path = f"{name}.{type(module).__name__}".lower()
        if isinstance(module, linear) or not ("expert" in path or "router" in path):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and "bias" not in parameter_name:
                yield f"{name}.{parameter_name}"


def _no_match(model: nn.Module, target: str) -> str:
    linear: set[str] = set()
    adapted: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(adapted):
            continue  # part of an adapted layer
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            adapted = (*adapted, f"{name}.")
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer):
            linear.add(name.rpartition(".")[2])
    could_be = ", ".join(sorted(name for name in linear if not re.fullmatch(r"\d*", name))) or "none"
    where = type(model).__name__
    message = f"target_modules: {target!r} matches no module of {where}; its linear layers are named {could_be}"
    experts = sorted({".".join(name.split(".")[-2:]) for name in expert_weights(model)})
    return message + (f"; {', '.join(experts)} are bare parameters, which cannot be targets" if experts else "")


def abbreviated(names: list[str], limit: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
