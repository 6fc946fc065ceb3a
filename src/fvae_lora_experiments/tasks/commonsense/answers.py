"""Answers that a model writes, and what they say."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from fvae_lora_experiments.tasks.batches import padded


@torch.no_grad()
def write_answers(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What the model writes after each prompt, as its `generation_config` says."""
    ids, mask = padded(prompts, tokenizer.pad_token_id, "left", next(model.parameters()).device)
    written = model.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts


def parse(text: str, options: Sequence[str]) -> int | None:
    """The number of the option that a text names, by the first label of the options' kind in it, as the field does.

    None if there is no such label (`answer1`, for example; `Answer1` and `1` are none), or if it is not one of
    `options`.
    """
    kind = options[0].rstrip("0123456789")
    label = re.search("|".join(options) if kind == options[0] else rf"{kind}\d+", text)
    return options.index(label.group()) if label and label.group() in options else None
