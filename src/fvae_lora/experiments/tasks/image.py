"""Image classification with any `AutoModelForImageClassification`."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
)

from fvae_lora.experiments.data import Splits, open_source
from fvae_lora.experiments.data.images import Images, augmentation, process
from fvae_lora.experiments.data.images import image_content as content
from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.heads import draw_new_head
from fvae_lora.experiments.names import is_local
from fvae_lora.experiments.recipe import Recipe

__all__ = ["METRIC", "content", "datasets", "load_model", "metrics", "open_source"]

METRIC = "accuracy"

BUILT_IN = {"vit-fashion-mnist": Path(str(files("fvae_lora.experiments"))) / "assets" / "vit-fashion-mnist"}
"""Models that come with the package."""


def load_model(name: str, classes: list[str]) -> tuple[PreTrainedModel, Any]:
    """The model in float32 with a head for `classes`, and its image processor.

    Unless the model was trained on these very classes, the head is a new one, drawn from torch's global generator.

    Raises:
        UserError: no such model, or not one that classifies images.
    """
    source = str(BUILT_IN.get(name, name))
    if is_local(source) and not Path(source).is_dir():
        raise UserError(f"model {name}: no such folder")
    try:
        trained_on = list(AutoConfig.from_pretrained(source).id2label.values())
        model = AutoModelForImageClassification.from_pretrained(
            source,
            id2label=dict(enumerate(classes)),
            label2id={c: i for i, c in enumerate(classes)},
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"model {name}: not to be loaded for image classification: {line}") from error
    if trained_on != classes:
        draw_new_head(model)
    return model, processor


def datasets(recipe: Recipe, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Images]:
    """The three splits as tensors; the recipe's augmentation is applied to train and to nothing else."""
    mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
    height, width = process(processor, Image.new(mode, (64, 64))).shape[-2:]
    augment = augmentation(recipe.image, (height, width))
    return {
        "train": Images(splits.train, "train", processor, mode, augment),
        "validation": Images(splits.validation, "validation", processor, mode),
        "test": Images(splits.test, "test", processor, mode),
    }


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, a fraction."""
    return {METRIC: float(np.mean(prediction.predictions == prediction.label_ids))}
