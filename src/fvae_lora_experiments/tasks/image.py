"""Image classification with any `AutoModelForImageClassification`."""

import hashlib
import inspect
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from fvae_lora_experiments.data import Splits, accuracies, open_images
from fvae_lora_experiments.data.files import Notes
from fvae_lora_experiments.data.image_decoding import ImageFacts, image_content, inspect_images
from fvae_lora_experiments.data.image_inputs import Images, augmentation, process
from fvae_lora_experiments.models.pretrained import load, load_classifier, loading
from fvae_lora_experiments.places import MODELS
from fvae_lora_experiments.run.folder import write_atomically
from fvae_lora_experiments.tasks import Task


class ImageTask(Task):
    """Images and their classes; judged by accuracy or worst-group accuracy, a fraction."""

    predicts_rows = True

    def open_source(self, notes: Notes | None = None) -> dict[str, Dataset]:
        """As `data.images.open_images`."""
        return open_images(self.recipe.dataset, self.recipe.data, notes)

    def content(self, row: dict[str, Any], where: str) -> bytes:
        """The encoded image."""
        return image_content(row, where)

    def look_at_images(self, official: dict[str, Dataset], fingerprint: str, quiet: bool) -> ImageFacts:
        """Decodes each image once; the facts are cached with the data sets, by fingerprint."""
        settings = self.recipe.image
        opened = settings.model_dump_json(include={"range", "background"})
        key = hashlib.sha256(f"{fingerprint} {opened}".encode()).hexdigest()
        file = Path(datasets.config.HF_DATASETS_CACHE) / "fvae-lora" / "images" / f"{key}.json"
        with suppress(OSError, ValueError, TypeError):
            return ImageFacts(**json.loads(file.read_text(encoding="utf-8")))
        facts = inspect_images(official, settings, quiet)
        with suppress(OSError):  # then it is done again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asdict(facts)))
        return facts

    def load_model(self, classes: list[str]) -> tuple[PreTrainedModel, Any]:
        """The model in float32 with a head for `classes`, and its image processor, both for the recipe's image size.

        Unless the model was trained on exactly these classes, it gets a new head, drawn from torch's global generator.

        Raises:
            UserError: the model does not exist, or is not an image classifier.
        """
        model, processor = load_image_classifier(self.recipe.model, classes)
        if self.recipe.image.size is not None:
            _resize(model, processor, self.recipe.image.size)
        return model, processor

    def datasets(self, splits: Splits, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
        """The three splits as tensors; only train is augmented."""
        mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
        height, width = process(processor, Image.new(mode, (64, 64))).shape[-2:]
        augment = augmentation(self.recipe.image, (height, width))
        return {
            name: Images(rows, name, processor, mode, self.recipe.image, augment if name == "train" else None)
            for name, rows in splits.by_name.items()
        }

    def scores(self, outputs: np.ndarray, labels: np.ndarray, rows: Any) -> dict[str, float]:
        """Accuracy, and that of each group if the data has groups."""
        return accuracies(outputs == labels, rows.rows)


def load_image_classifier(name: str, classes: list[str]) -> tuple[PreTrainedModel, Any]:
    """The image classifier of that name and its processor, see `ImageTask.load_model`."""
    source = str(MODELS.get(name, name))
    with loading(source, "for image classification"):
        model, _ = load_classifier(source, AutoModelForImageClassification, classes)
        return model, load(AutoImageProcessor, source)


def _resize(model: PreTrainedModel, processor: Any, side: int) -> None:
    """Makes `processor` give squares of `side` pixels, and `model` interpolate its position embeddings to them."""
    processor.size = {"shortest_edge": side} if "shortest_edge" in processor.size else {"height": side, "width": side}
    if getattr(processor, "crop_size", None):
        processor.crop_size = {"height": side, "width": side}
    if any("interpolate_pos_encoding" in inspect.signature(module.forward).parameters for module in model.modules()):
        model.register_forward_pre_hook(
            lambda _, arguments, options: (arguments, options | {"interpolate_pos_encoding": True}), with_kwargs=True
        )
