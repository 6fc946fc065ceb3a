"""Pretrained models with a head for the classes of a data set."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.heads import draw_new_head
from fvae_lora.experiments.names import is_local


@contextmanager
def loading(name: str, role: str) -> Iterator[None]:
    """What goes wrong when a model or its processor is loaded is the user's mistake.

    Raises:
        UserError: in one line that names the model and its `role`, as "for transcription".
    """
    if is_local(name) and not Path(name).is_dir():
        raise UserError(f"model {name}: no such folder")
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"model {name}: not to be loaded {role}: {line}") from error


def load_classifier(source: str, kind: Any, classes: list[str]) -> tuple[PreTrainedModel, set[str]]:
    """A model in float32 that tells `classes` apart, or that gives one number if there are none.

    Unless the model was trained on these very classes, the head is a new one, drawn from torch's global generator.

    Args:
        source: a folder or a name on the hub.
        kind: the class of transformers that loads it, as `AutoModelForImageClassification`.
        classes: names, in the order of their numbers.

    Returns:
        The model, and the names of its parameters that `source` does not have.

    Raises:
        OSError, ValueError: as transformers', see `loading`.
    """
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if classes:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
        head = labels | {"problem_type": "single_label_classification"}
    trained_on = list(AutoConfig.from_pretrained(source).id2label.values())
    model, info = kind.from_pretrained(
        source, **head, ignore_mismatched_sizes=True, dtype=torch.float32, output_loading_info=True
    )
    if trained_on != classes:
        draw_new_head(model)
    return model, set(info["missing_keys"])
