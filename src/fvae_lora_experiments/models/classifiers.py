"""Pretrained models with a head for the classes of a data set."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from fvae_lora_experiments.models.heads import draw_new_head
from fvae_lora_experiments.models.pretrained import load, load_model


def load_classifier(source: str, kind: Any, classes: list[str]) -> tuple[PreTrainedModel, set[str]]:
    """A model in float32 that classifies into `classes`, or predicts one number if there are none.

    Unless the model was trained on exactly these classes, it gets a new head, drawn from torch's global generator.

    Args:
        source: a folder or a name on the hub.
        kind: the transformers class that loads it, such as `AutoModelForImageClassification`.
        classes: names, in the order of their numbers.

    Returns:
        The model, and the names of its parameters that are missing in `source`.

    Raises:
        UserError, Exception: as `pretrained.load_model`.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if classes:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
        head = labels | {"problem_type": "single_label_classification"}
    trained_on = list(load(AutoConfig, source).id2label.values())
    model, missing = load_model(kind, source, **head, dtype=torch.float32)
    if trained_on != classes:
        draw_new_head(model)
    return model, missing
