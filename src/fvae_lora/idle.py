"""Layers that are adapted and never run: their parameters would silently stay untrained."""

from __future__ import annotations

import re
import warnings

from torch import nn

from .layer import FVAELoraLayer
from .module_names import abbreviated
from .recorder import Forward, Recorder

WATCHED_FORWARDS = 100


def warn_of_idle_layers(model: nn.Module, recorder: Recorder, forward: Forward) -> None:
    """Warn, once, of adapted layers that do not run; called at the end of each training forward.

    Some models read a layer's weight and never call the layer, as with Mamba's ``dt_proj`` or the ``out_proj`` of
    `torch.nn.MultiheadAttention`. Layers whose names differ only in numbers do the same work: if one of them runs, the
    others may still get their turn, such as an expert without a token yet or a layer that was dropped at random. So the
    first training forward reports kinds of layers of which none ran, the last of `WATCHED_FORWARDS` all others.

    Args:
        model: The adapted model.
        recorder: Its recorder.
        forward: The forward that has ended.
    """
    if recorder.training_forwards >= WATCHED_FORWARDS or not (model.training and forward.trains):
        return
    recorder.ran.update(run.layer for run in forward.runs)  # compiled layers are only seen here
    first, last = recorder.training_forwards == 0, recorder.training_forwards == WATCHED_FORWARDS - 1
    trained = [m for m in model.modules() if isinstance(m, FVAELoraLayer) and m.trains] if first or last else []
    if first and not trained:
        return  # the adapters are disabled
    recorder.training_forwards += 1
    kinds = {_without_numbers(name) for name in recorder.ran} if first else set()
    idle = [
        layer.name
        for layer in trained
        if layer.name not in recorder.ran
        and (last or _without_numbers(layer.name) not in kinds)
        and (recorder.ran or layer.records)  # compiled layers without an ELBO are never seen
    ]
    recorder.ran.update(idle)  # reported
    if idle:
        forwards = "a training forward" if first else f"{WATCHED_FORWARDS} training forwards"
        warnings.warn(
            f"adapted layers that did not run in {forwards} of {type(model).__name__} are not trained by it: "
            f"{abbreviated(idle)}; if the model never calls them, leave them out of target_modules",
            stacklevel=2,
        )


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
