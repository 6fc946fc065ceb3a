"""Stand-ins for what a study needs: a model on the meta device and a batch of the right shape, from published facts.

Neither data, nor weights, nor tokenizers, nor a network are needed.
"""

from collections.abc import Callable
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fvae_lora_experiments.data import split
from fvae_lora_experiments.data.image_inputs import process
from fvae_lora_experiments.models.pretrained import load_classifier, load_model, loading
from fvae_lora_experiments.published import PublishedData, configuration_of
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task

Batch = dict[str, Any]

ANSWER_TOKENS = 8
"""`the correct answer is answer1` and the end token, in Llama's tokens or a few more."""


def stand_in(recipe: Recipe, facts: PublishedData, size: int) -> tuple[PreTrainedModel, Batch]:
    """The pretrained model with its head, and a batch. To be called in `without_weights`.

    Args:
        recipe: the recipe. A model other than those of `published` needs its own configuration at hand.
        facts: of its data set.
        size: rows of the batch.

    Raises:
        UserError: the model has no configuration.
    """
    model = str(configuration_of(recipe.model) or recipe.model)
    with loading(model, "from its configuration"):
        return _MADE_BY[recipe.task](recipe.model_copy(update={"model": model}), facts, size)


def training_rows(recipe: Recipe, facts: PublishedData) -> int:
    """How many rows the protocol leaves to train on, of classes that are all of the same size."""
    label = ClassLabel(names=_classes(facts)) if facts.classes else Value("float32")
    official: dict[str, Dataset] = {}
    for name, count in facts.rows.items():
        labels = [row % (facts.classes or 1) for row in range(count)]
        official[name] = Dataset.from_dict({"label": labels}, Features(label=label))
    settings = recipe.data.model_copy(update={"group_column": None, "average": "plain"})
    return len(split(official, settings, recipe.seed).train)


def _classes(facts: PublishedData) -> list[str]:
    return [str(label) for label in range(facts.classes or 0)]


def _image(recipe: Recipe, facts: PublishedData, size: int) -> tuple[PreTrainedModel, Batch]:
    model, processor = load_task(recipe).load_model(_classes(facts))
    pixels = process(processor, Image.new("RGB", (64, 64)))
    return model, {"pixel_values": pixels.expand(size, *pixels.shape), "labels": torch.zeros(size, dtype=torch.long)}


def _text(recipe: Recipe, facts: PublishedData, size: int) -> tuple[PreTrainedModel, Batch]:
    model, _ = load_classifier(recipe.model, AutoModelForSequenceClassification, _classes(facts))
    labels = torch.zeros(size, dtype=torch.long if facts.classes else torch.float32)
    return model, {"input_ids": _tokens(size, facts.length or recipe.text.max_length), "labels": labels}


def _commonsense(recipe: Recipe, facts: PublishedData, size: int) -> tuple[PreTrainedModel, Batch]:
    model, _ = load_model(AutoModelForCausalLM, recipe.model)
    ids = _tokens(size, facts.length or 0)
    return model, {
        "input_ids": ids,
        "position_ids": ids,
        "labels": ids[:, -ANSWER_TOKENS - 1 :],
        "logits_to_keep": torch.arange(-ANSWER_TOKENS - 1, 0),
    }


def _phonemes(recipe: Recipe, facts: PublishedData, size: int) -> tuple[PreTrainedModel, Batch]:
    model, _ = load_task(recipe).load_model(_classes(facts))
    return model, {"input_values": torch.zeros(size, facts.length or 0), "labels": _tokens(size, 1)}


def _tokens(rows: int, length: int) -> torch.Tensor:
    return torch.zeros(rows, length, dtype=torch.long)


_MADE_BY: dict[str, Callable[[Recipe, PublishedData, int], tuple[PreTrainedModel, Batch]]] = {
    "image": _image,
    "text": _text,
    "commonsense": _commonsense,
    "phonemes": _phonemes,
}
