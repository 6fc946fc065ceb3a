"""The loss of an optimizer's step written out from the paper's formula, to hold every way of getting it to.

Nothing here uses the method's own objective, masks or recorder. Noise is left out: samples are means.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from fvae_lora import FVAELoraConfig
from fvae_lora.layer import FVAELoraLayer
from tiny import BUILDERS, TARGETS, randomised

Batch = dict[str, Any]
Gradients = dict[str, Tensor]
Valid = Callable[[str, Batch, torch.Size], Tensor]


def config(kind: str, **fields: Any) -> FVAELoraConfig:
    """A configuration in which each weight has a value of its own and the ELBO is no small part of the loss."""
    small = {"r": 3, "residual_dim": 2, "decoder_hidden_dims": [5], "elbo_weight": 0.1, "kl_weight": 2.0}
    weights = {"reconstruction_weight": 0.7, "factorization_weight": 0.3, "lora_alpha": 4.0}
    return FVAELoraConfig(**{"target_modules": TARGETS.get(kind), **small, **weights, **fields})


def adapted(kind: str | PreTrainedModel, dtype: torch.dtype = torch.float64, **fields: Any) -> PeftModel:
    """A tiny model in training mode with adapters at which every gradient is there."""
    base = BUILDERS[kind](dtype) if isinstance(kind, str) else kind
    name = kind if isinstance(kind, str) else kind.config.model_type
    model = randomised(get_peft_model(base, config(name, **fields)))
    return model.train()


def elbo_of_tokens(layer: FVAELoraLayer, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What an adapter adds to a layer's output, (..., out), and L_FVAE of each token, (...,)."""
    vae, B = layer.fvae_lora_vae[adapter], layer.fvae_lora_B[adapter].weight
    settings, w = vae.config, dict(vae.named_parameters())

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}_weight"].mT + w[f"{name}_bias"]

    def encode(name: str) -> tuple[Tensor, Tensor]:
        hidden = linear(f"{name}_hidden0", x).relu()
        return linear(f"{name}_mean", hidden), linear(f"{name}_logvar", hidden)

    update = settings.lora_alpha / B.shape[-1] * encode("encoder1")[0] @ B.mT
    if settings.elbo_stop_gradient:
        x = x.detach()
    (mean1, logvar1), (mean2, logvar2) = encode("encoder1"), encode("encoder2")
    m, s, r1, r2 = settings.residual_prior_mean, settings.residual_prior_std, mean1.shape[-1], mean2.shape[-1]
    decoded = linear("decoder_output", linear("decoder_hidden0", torch.cat([mean1, mean2], -1)).relu())
    tau = w["log_tau"].exp()
    log_p = (-((x - decoded) ** 2) / (2 * tau**2) - tau.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
    kl = 0.5 * (mean1**2 + logvar1.exp() - 1 - logvar1).sum(-1)
    gamma = (
        -0.5 * ((mean2 - m) ** 2 + logvar2.exp()).sum(-1) / s**2
        - r2 * math.log(s)
        + 0.5 * (mean1**2 + logvar1.exp()).sum(-1)
        + (r1 - r2) / 2 * math.log(2 * math.pi)
    )
    elbo = settings.reconstruction_weight * log_p - settings.kl_weight * kl + settings.factorization_weight * gamma
    return update, elbo


@contextmanager
def layers_by_hand() -> Iterator[dict[tuple[str, str], list[Tensor]]]:
    """Adapted layers compute as written above; gives L_FVAE of the tokens of each layer's runs."""
    found: dict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def forward(layer: FVAELoraLayer, x: Tensor) -> Tensor:
        result = layer.base_layer(x)
        layer.recorder.ran.add(layer.name)
        for adapter in [] if layer.disable_adapters else layer.active_adapters:
            update, elbo = elbo_of_tokens(layer, adapter, x)
            found[layer.name, adapter].append(elbo)
            result = result + update
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FVAELoraLayer, "forward", forward)
        yield found


def where_attended(layer: str, batch: Batch, tokens: torch.Size) -> Tensor:
    """1 for every token but padding."""
    mask = batch.get("attention_mask")
    return torch.ones(tokens) if mask is None or mask.shape != tokens else mask


def elbo_by_hand(model: nn.Module, batches: Sequence[Batch], valid: Valid = where_attended) -> tuple[Tensor, list[Any]]:
    """The negative ELBO of a step, the mean over the tokens of all its batches, and the model's outputs."""
    sums: dict[tuple[str, str], Tensor | float] = defaultdict(float)
    counts: dict[tuple[str, str], Tensor | float] = defaultdict(float)
    outputs = []
    for batch in batches:
        with layers_by_hand() as found:
            outputs.append(model(**batch))
        for key, runs in found.items():
            for per_token in runs:
                counted = valid(key[0], batch, per_token.shape).to(per_token)
                sums[key] = sums[key] + (per_token * counted).sum()
                counts[key] = counts[key] + counted.sum()
    settings = {layer.name: layer.fvae_lora_vae for layer in model.modules() if isinstance(layer, FVAELoraLayer)}
    weight = {key: settings[key[0]][key[1]].config.elbo_weight for key in sums}
    return -sum(weight[key] * sums[key] / counts[key] for key in sums), outputs


@contextmanager
def plain_elbo(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Adapted layers compute as written above; gives the negative ELBO of what was run, whoever ran it.

    It is the mean over the tokens of all runs with a graph that are no padding by the masks that the model was given.
    """
    masks: list[Tensor | None] = []

    def look(_: nn.Module, __: Any, given: Batch) -> None:
        if torch.is_grad_enabled():
            masks.append(given.get("attention_mask"))

    def mean(layer: str, adapter: str, runs: list[Tensor]) -> Tensor:
        counted = [
            torch.ones_like(run) if mask is None else mask.to(run) for run, mask in zip(runs, masks, strict=True)
        ]
        total = sum((run * tokens).sum() for run, tokens in zip(runs, counted, strict=True))
        return -vaes[layer][adapter].config.elbo_weight * total / sum(tokens.sum() for tokens in counted)

    def with_graph(runs: list[Tensor]) -> list[Tensor]:
        return [run for run in runs if run.requires_grad]

    vaes = {layer.name: layer.fvae_lora_vae for layer in model.modules() if isinstance(layer, FVAELoraLayer)}
    watched = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    hook = watched.register_forward_pre_hook(look, with_kwargs=True)
    with layers_by_hand() as found:
        yield lambda: sum(mean(*key, trained) for key, runs in found.items() if (trained := with_graph(runs)))
    hook.remove()


class PlainTrainer:
    """In front of a Trainer: its loss and the ELBO by hand. Gradient checkpointing would compute the layers again."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        with plain_elbo(self.model) as elbo:
            loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + elbo() / (self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1)


def labels_in(batch: Batch, shifted: bool = False) -> Tensor:
    """How many labels count."""
    return ((batch["labels"][..., 1:] if shifted else batch["labels"]) != -100).sum()


def loss_by_hand(model: nn.Module, batches: Sequence[Batch], valid: Valid = where_attended) -> Tensor:
    """The model's own loss, a mean over the labels of all batches, and the ELBO."""
    elbo, outputs = elbo_by_hand(model, batches, valid)
    counts = [labels_in(batch, shifted=model.get_base_model().loss_type == "ForCausalLM") for batch in batches]
    return sum(output.loss * count for output, count in zip(outputs, counts, strict=True)) / sum(counts) + elbo


def gradients(model: nn.Module, backward: Callable[[], Tensor | None]) -> Gradients:
    """The gradients that a loss, or what runs the backward itself, gives to the parameters."""
    model.zero_grad(set_to_none=True)
    loss = backward()
    if loss is not None:
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
    """The same parameters have gradients, and each is the same up to its size times the tolerance."""
    assert found.keys() == expected.keys()
    assert any("decoder" in name for name in expected), "the expected gradients have none of the ELBO"
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


class StepGradients(TrainerCallback):
    """Those of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Gradients] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        named = (model.module if hasattr(model, "module") else model).named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trainer_gradients(
    trainer_class: type[Trainer],
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    accumulation: int,
    folder: Any,
    data_collator: Callable[..., Batch] | None = None,
    compute_loss_func: Callable[..., Tensor] | None = None,
    **arguments: Any,
) -> list[Gradients]:
    """The gradients of each optimizer step of one epoch, in which the parameters stay as they are."""
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        **arguments,
    )
    seen = StepGradients()
    trainer_class(
        model=model,
        args=settings,
        train_dataset=list(rows),
        data_collator=data_collator or collated,
        compute_loss_func=compute_loss_func,
        callbacks=[seen],
    ).train()
    return seen.steps


def rows_for(kind: str, lengths: Sequence[int]) -> list[Batch]:
    """One row for each length, without padding; of images, as many."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        pixels = torch.randn(len(lengths), 3, 8, 8, generator=generator, dtype=torch.float64)
        return [{"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(pixels)]
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(1, 60, (length,), generator=generator)
        labels = torch.tensor(i % 3) if kind == "bert" else ids.flip(0)[: max(2, length - 2)] if kind == "t5" else ids
        if kind == "llama":
            labels = ids.clone()
            labels[0] = -100  # nothing predicts it, and padding on the left must not
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def collated(rows: Sequence[Batch], side: str = "right", length: int = 0) -> Batch:
    """A batch, its texts padded to the longest row or a given length."""
    padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def stacked(name: str) -> Tensor:
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].dim() != 1:
            return torch.stack(values)
        longest = max(length, *(len(value) for value in values))
        missing = [(longest - len(value), 0) if side == "left" else (0, longest - len(value)) for value in values]
        return torch.stack([F.pad(v, pad, value=padding[name]) for v, pad in zip(values, missing, strict=True)])

    return {name: stacked(name) for name in rows[0]}
