"""Predictions with uncertainty: z1 is sampled instead of taking its mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .evaluating import active_configs, evaluating
from .vae import raised


@dataclass(frozen=True)
class UncertainPrediction:
    """A prediction from draws of z1, in at least fp32.

    The entropies are over classes, in nats, and ``None`` for a regression. ``...`` is the batch and, for models with an
    output per token such as language models, the tokens.

    Attributes:
        mean: Mean over draws of the classes' probabilities, (..., classes), or of the values, (..., values).
        variance: Variance of the same over draws.
        entropy: Entropy of the mean: the total uncertainty, (...,).
        expected_entropy: Mean over draws of the entropy: the ambiguity of the input itself, (...,).
        mutual_information: Their difference, at least 0: the disagreement between draws, (...,).
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    mutual_information: Tensor | None = None


def predict_with_uncertainty(
    model: nn.Module,
    /,
    *args: Any,
    draws: int = 16,
    seed: int = 0,
    draws_at_once: int | None = None,
    regression: bool | None = None,
    **inputs: Any,
) -> UncertainPrediction:
    """Predict with z1 sampled in every adapted layer.

    The model runs in eval mode with ``sample_at_inference`` and without gradients. It and torch's generators are left
    as they were, even after an error. Rows are repeated so that one forward makes several draws; with inputs that
    cannot be repeated row by row (a cache, tensors of different lengths) each draw is a forward of its own.

    Args:
        model: An adapted model, or one that contains it, whose output has ``logits``, is a tuple or is a tensor.
        *args: Its inputs, for models that take them by position.
        draws: Number of draws.
        seed: Seed of the draws; the same inputs, seed and `draws_at_once` give the same prediction.
        draws_at_once: Maximum number of draws per forward; ``None`` means all, or as many as fit the memory of an
            accelerator.
        regression: Whether the outputs are values instead of logits of classes; ``None`` follows the model's
            configuration (``problem_type``, or a single label).
        **inputs: The model's inputs by name, as for a forward.

    Returns:
        Mean and variance over draws and, for classes, the entropies.

    Raises:
        ValueError: If `draws` or `draws_at_once` is below 1, if no FVAE-LoRA adapter is active, if one is
            ``inference_only``, if the classes are not mutually exclusive (``multi_label_classification``), or if the
            model returns no tensor.
    """
    for name, value in {"draws": draws, "draws_at_once": draws_at_once}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer, at least 1, not {value}")
    for name, config in active_configs(model).items():
        if config.inference_only:
            raise ValueError(
                f"adapter {name!r} is inference_only: it has only z1's mean, so there is nothing to sample; use the "
                "adapter that it was exported from"
            )
    settings = getattr(model, "config", None)
    problem = getattr(settings, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError("problem_type must not be multi_label_classification: the classes must be mutually exclusive")
    if regression is None:
        regression = problem == "regression" or (problem is None and getattr(settings, "num_labels", None) == 1)

    at_once = min(draws, draws_at_once or draws) if _repeatable(model, args, inputs) else 1
    with evaluating(model, sampling=True) as eager:
        while True:
            try:
                with _generators_seeded(model, seed):
                    outputs = _drawn(eager, args, inputs, draws, at_once)
                break
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once = math.ceil(at_once / 2)
    if regression:
        return UncertainPrediction(outputs.mean(0), outputs.var(0, correction=0))
    p = outputs.softmax(-1)
    entropy, expected = _entropy(p.mean(0)), _entropy(p).mean(0)
    disagreement = (entropy - expected).clamp(min=0)  # negative only by rounding
    return UncertainPrediction(p.mean(0), p.var(0, correction=0), entropy, expected, disagreement)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def _drawn(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], draws: int, at_once: int) -> Tensor:
    """The outputs of all draws, (draws, ...), in at least fp32."""
    found: list[Tensor] = []
    while len(found) < draws:
        repeats = min(at_once, draws - len(found))
        output = model(*(_repeated(v, repeats) for v in args), **{n: _repeated(v, repeats) for n, v in inputs.items()})
        found += raised(_logits(output)).chunk(repeats)
    return torch.stack(found)


def _repeated(value: Any, times: int) -> Any:
    return value.repeat(times, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def _repeatable(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> bool:
    """Whether the first dimension of every input is the batch."""
    values = [value for value in (*args, *inputs.values()) if not isinstance(value, bool | int | float | str | None)]
    rows = {len(value) if isinstance(value, Tensor) and value.dim() else None for value in values}
    sequence_first = any(getattr(module, "batch_first", True) is False for module in model.modules())
    return len(rows) == 1 and None not in rows and not sequence_first


def _logits(output: Any) -> Tensor:
    """The logits or values among a model's outputs."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list):
        logits = next((value for value in output if isinstance(value, Tensor) and value.dim()), None)
    if logits is None:
        logits = output
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return logits, a tuple or a tensor, not {type(output).__name__}")
    return logits


@contextmanager
def _generators_seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the generators that the model draws from, and restore them afterwards."""
    places = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kept = torch.get_rng_state(), {place: torch.get_device_module(place).get_rng_state(place) for place in places}
    try:
        torch.default_generator.manual_seed(seed)
        for place in places:
            with torch.get_device_module(place).device(place):
                torch.get_device_module(place).manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(kept[0])
        for place, state in kept[1].items():
            torch.get_device_module(place).set_rng_state(state, place)
