"""How a causal language model answers: the likelihood of each option, and text that it generates."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fvae_lora_experiments.tasks.batches import padded, positions

Tokens = Sequence[int]


@torch.no_grad()
def log_likelihoods(model: nn.Module, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]) -> Tensor:
    """Log p(answer | prompt) for each option: the sum over the answer's tokens, not divided by their number.

    A prompt is read once, padded on the left; its options then continue from its keys and values.

    Args:
        model: in eval mode.
        prompts: each question's tokens.
        answers: each question's options, of at least two tokens each.

    Returns:
        (questions, most options), in nats, float32; minus infinity where a question has fewer options.
    """
    device = next(model.parameters()).device
    options = max(map(len, answers))
    some = answers[0][0]  # stands in for the options that a question does not have
    flat = [answer for own in answers for answer in (*own, *([some] * (options - len(own))))]
    ids, mask = padded(prompts, 0, "left", device)
    places = positions(mask)
    read = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
    cache = read.past_key_values
    cache.batch_repeat_interleave(options)

    targets, counted = padded(flat, 0, "right", device)
    mask, places = (x.repeat_interleave(options, 0) for x in (mask, places))
    steps = torch.arange(1, targets.shape[1], device=device)
    written = model(
        input_ids=targets[:, :-1],  # nothing is predicted after the last token
        attention_mask=torch.cat([mask, counted[:, :-1]], 1),
        position_ids=places[:, -1:] + steps,
        past_key_values=cache,
        use_cache=True,
    )
    logits = torch.cat([read.logits.repeat_interleave(options, 0), written.logits], 1).float()
    tokens = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    sums: Tensor = (tokens * counted).sum(-1).unflatten(0, (len(prompts), options))
    absent = torch.arange(options, device=device) >= torch.tensor([len(own) for own in answers], device=device)[:, None]
    return sums.masked_fill(absent, -torch.inf)


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
