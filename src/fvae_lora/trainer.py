"""transformers' Trainer with the ELBO weighted correctly in all of its settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .hooks import ATTRIBUTE
from .loss import last_forwards, recorders, with_elbo
from .loss_log import LossLog
from .masks import SEQUENCE_KINDS, count_tokens, share

# A Trainer for the type checker; at run time a plain mixin, to be put in front of any subclass of the Trainer.
_Base: Any = Trainer if TYPE_CHECKING else object


class ElboTrainerMixin(_Base):
    """Weights the ELBO by tokens, for `transformers.Trainer` and its subclasses.

    Use: ``class MyTrainer(ElboTrainerMixin, SFTTrainer)``. An optimizer's step gets the mean of the ELBO over all its
    tokens that are not padding, across accumulated micro-batches and processes. Where the tokens of a step cannot be
    counted before it, as in GRPO, which generates them, it is the mean over micro-batches. It is added to whatever loss
    the Trainer or one of its subclasses computes: the model's, one with label smoothing, or its own. A model without
    FVAE-LoRA layers trains as with the plain Trainer.

    Its logs break the loss down: ``loss = task_weight * task_loss + the sum of elbo/<term>``, all means over the steps
    since the last log. The terms are those of the negative ELBO with all their weights, summed over layers;
    with ``trainer.log_elbo_per_layer = True`` there is ``elbo/<layer>/<term>`` too.

    Attributes:
        log_elbo_per_layer: Whether the logs hold each layer's terms.

    Raises:
        RuntimeError: In training on several GPUs with `torch.nn.DataParallel`, which splits what the layers record.
    """

    log_elbo_per_layer: bool = False
    _tokens_in_step: list[Tensor | int] | None = None
    _loss_log: LossLog | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        self._loss_log = LossLog()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; the training loss is logged with the parts it is made of."""
        if self._loss_log is not None and "loss" in logs:

            def over_processes(sums: Tensor) -> Tensor:
                reduced: Tensor = self.accelerator.reduce(sums, "mean")
                return reduced

            logs |= self._loss_log.means(self.state.global_step, over_processes, self.log_elbo_per_layer)
        super().log(logs, *args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer's step, whose tokens are counted here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        root = _adapted_model(self.model)
        if root is not None and batches and isinstance(batches[0], Mapping):
            counts = zip(*(count_tokens(root, batch).values() for batch in batches), strict=True)
            self._tokens_in_step = self._over_processes([sum(of_sequence) for of_sequence in counts], device)
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, adding this micro-batch's share of the step's ELBO to whatever `compute_loss` returns.

        Args:
            model: The model, wrapped as the Trainer does.
            inputs: A micro-batch.
            *args: As the Trainer's.
            **kwargs: As the Trainer's.

        Returns:
            The loss, detached.
        """
        if _adapted_model(self.model) is None:
            step: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return step
        if self.args.n_gpu > 1:
            raise RuntimeError("FVAE-LoRA does not support torch.nn.DataParallel; use torchrun or accelerate launch")
        # The loss is intercepted between compute_loss and the backward, so that subclasses may compute it as they like.
        attributes: dict[str, Any] = self.__dict__
        own = {name: value for name, value in attributes.items() if name == "compute_loss"}
        attributes["compute_loss"] = functools.partial(self._loss_with_elbo, self.compute_loss)
        try:
            step = super().training_step(model, inputs, *args, **kwargs)
        finally:
            del attributes["compute_loss"]
            attributes |= own
        return step

    def _loss_with_elbo(
        self, compute_loss: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        num_items = kwargs.get("num_items_in_batch")
        shares = self._shares(inputs, num_items)
        announced = {"labels": inputs.get("labels")}
        collecting = recorders(self.model)
        for recorder in collecting:
            recorder.clear()
            recorder.micro_batch = announced
        try:
            result = compute_loss(model, inputs, *args, **kwargs)
        finally:
            for recorder in collecting:
                recorder.micro_batch = None
        task_loss, *outputs = result if isinstance(result, tuple) else (result,)
        groups = last_forwards(self.model)
        loss = with_elbo(task_loss, [(group, shares) for group in groups])
        if self._loss_log is not None:
            forwards = [forward for group in groups for forward in group]
            self._loss_log.add(task_loss, forwards, self._divisor(num_items), self.state.global_step)
        return (loss, *outputs) if outputs else loss

    def _over_processes(self, counts: list[Tensor | int], device: torch.device) -> list[Tensor | int]:
        """Sums over all processes, which stay on the device."""
        if self.accelerator.num_processes == 1:
            return counts
        mine = [n.to(device) if isinstance(n, Tensor) else torch.full((), n, device=device) for n in counts]
        return list(self.accelerator.reduce(torch.stack(mine), "sum").unbind())

    def _shares(self, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> dict[str, Tensor | float]:
        """This micro-batch's share of the step's tokens, scaled as the rest of the Trainer's step expects."""
        root = _adapted_model(self.model)
        if self._tokens_in_step is None or root is None:  # nothing to count before the step, so micro-batches are equal
            return dict.fromkeys(SEQUENCE_KINDS, self._divisor(num_items) / self.current_gradient_accumulation_steps)
        # The gradients of the processes are averaged.
        parts = self.accelerator.num_processes * self._divisor(num_items)
        counts = count_tokens(root, inputs).items()
        return {name: parts * share(n, total) for (name, n), total in zip(counts, self._tokens_in_step, strict=True)}

    def _divisor(self, num_items: Tensor | int | None) -> int:
        """What the Trainer divides a loss by: the step's micro-batches, unless the loss is normalised over the step."""
        normalised = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        if getattr(Trainer, "loss_is_scaled_for_ga", ...) is None and self.loss_is_scaled_for_ga is not None:
            normalised = self.loss_is_scaled_for_ga  # a Trainer that has this setting follows it
        return 1 if normalised else self.current_gradient_accumulation_steps


class FVAELoraTrainer(ElboTrainerMixin, Trainer):
    """`transformers.Trainer` with `ElboTrainerMixin`."""


def _adapted_model(model: nn.Module) -> nn.Module | None:
    """The first adapted model inside a model, whose forward the hooks watch."""
    return next((module for module in model.modules() if ATTRIBUTE in vars(module)), None)
