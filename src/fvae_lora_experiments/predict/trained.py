"""A finished run, ready to be used."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvae_lora_experiments.run.finished import usable_run
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import open_base, with_adapter
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Task, load_task


@dataclass(frozen=True)
class Trained:
    """What a run has trained: a model in eval mode, and what prepares its inputs, as transformers' pipelines take them.

    For images and texts `pipeline(task, model=trained.model, image_processor=...)` works, or `tokenizer=`.
    """

    recipe: Recipe
    record: Record
    task: Task
    model: nn.Module
    processor: Any

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers; none where there are no classes."""
        return [str(name) for name in self.record.dataset.classes]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
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
    base, processor = open_base(recipe, record)
    trained = on_accelerator(with_adapter(base, RunFolder(Path(path)).adapter).eval(), base)
    return Trained(recipe, record, load_task(recipe), trained, processor)


def on_accelerator(model: nn.Module, base: nn.Module) -> nn.Module:
    """`model` on the accelerator, if there is one and its `base` is not quantised, which is there already."""
    if torch.accelerator.is_available() and not getattr(base, "is_quantized", False):
        model.to(torch.accelerator.current_accelerator())
    return model
