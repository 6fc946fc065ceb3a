"""Running an adapted model in eval mode without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .config import FVAELoraConfig
from .layer import FVAELoraLayer
from .loss import recorders


@contextmanager
def evaluating(model: nn.Module, *, sampling: bool) -> Iterator[nn.Module]:
    """Run a model in eval mode, without gradients and compilation, and restore everything afterwards, even on errors.

    What training has recorded and not used yet is kept, and nothing is added to it.

    Args:
        model: An adapted model, or one that contains it.
        sampling: Whether the adapters sample z1 or take its mean, whatever their ``sample_at_inference`` is.

    Yields:
        The model, without the wrapper that `torch.compile` puts around it.

    Raises:
        ValueError: If no FVAE-LoRA adapter is active.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for config in active_configs(model).values()}.values()
    switches = [(config, config.sample_at_inference) for config in configs]
    with ExitStack() as stack:
        for recorder in recorders(model):
            stack.enter_context(recorder.set_aside())
        # A graph that was compiled earlier would not see the changed settings.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        try:
            model.eval()
            for config in configs:
                config.sample_at_inference = sampling
            yield getattr(model, "_orig_mod", model)
        finally:
            for module, training in modes:
                module.training = training
            for config, was in switches:
                config.sample_at_inference = was


def active_configs(model: nn.Module) -> dict[str, FVAELoraConfig]:
    """The configurations of the adapters that run in a model's forward, by adapter name.

    Args:
        model: An adapted model, or one that contains it.

    Raises:
        ValueError: If there is none, or if adapters are merged, so that their encoders do not run.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no FVAE-LoRA adapter")
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged and their encoders do not run; call unmerge_adapter() first")
    configs = {name: vae.config for layer in layers for name, vae in layer.active_vaes().items()}
    if not configs:
        raise ValueError(f"no FVAE-LoRA adapter of {type(model).__name__} is active")
    return configs


def adapted_layers(model: nn.Module) -> list[FVAELoraLayer]:
    """The layers of a model that have an FVAE-LoRA adapter, each once."""
    return [module for module in model.modules() if isinstance(module, FVAELoraLayer)]
