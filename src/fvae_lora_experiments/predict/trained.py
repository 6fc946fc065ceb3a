"""A finished run, loaded for predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from fvae_lora_experiments.process import quiet_models
from fvae_lora_experiments.run.finished import usable_run
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import open_base, with_adapter
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Task, load_task


@dataclass(frozen=True)
class Trained:
    """What a run has trained: a model in eval mode, and what prepares its inputs.

    Transformers' pipelines take both: `pipeline("image-classification", model=trained.unwrapped,
    image_processor=trained.processor)`, for texts with `tokenizer=`.
    """

    recipe: Recipe
    record: Record
    task: Task
    model: nn.Module
    processor: Any

    @property
    def unwrapped(self) -> Any:
        """The model by its class in transformers, which pipelines look for, with the adapter in it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers; empty if there are none."""
        return [str(name) for name in self.record.dataset.classes]

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device


def load_run(path: Path | str, model: str | None = None) -> Trained:
    """Loads a finished run on the accelerator, if there is one.

    Args:
        path: the run's folder.
        model: where the base model is, if not where the record says.

    Raises:
        UserError: no finished run there, a point of a grid, no adapter; another base model than the run had.
    """
    recipe, record = usable_run(Path(path), model)
    with quiet_models():
        base, processor = open_base(recipe, record)
        trained = on_accelerator(with_adapter(base, RunFolder(Path(path)).adapter).eval(), base)
    return Trained(recipe, record, load_task(recipe), trained, processor)


def on_accelerator(model: nn.Module, base: nn.Module) -> nn.Module:
    """`model` on the accelerator, if there is one and its `base` is not quantised, which is there already."""
    if torch.accelerator.is_available() and not getattr(base, "is_quantized", False):
        model.to(torch.accelerator.current_accelerator())
    return model
