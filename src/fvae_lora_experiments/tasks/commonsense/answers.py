"""Generating answers, and parsing them."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from fvae_lora_experiments.tasks.batches import padded


@torch.no_grad()
def write_answers(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the model generates after each prompt, with its `generation_config`."""
    ids, mask = padded(prompts, tokenizer.pad_token_id, "left", next(model.parameters()).device)
    written = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def parse(text: str, options: Sequence[str]) -> int | None:
    """The index of the option that a text names with the first label in it, as is customary for this benchmark.

    None if there is no label of the options' kind (such as `answer1`; not `Answer1` or `1`), or it is not one of
    `options`.
    """
    kind = options[0].rstrip("0123456789")
    label = re.search("|".join(options) if kind == options[0] else rf"{kind}\d+", text)
    return options.index(label.group()) if label and label.group() in options else None
