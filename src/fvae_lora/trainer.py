"""transformers' Trainer with the ELBO weighted right in every one of its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .hooks import ATTRIBUTE
from .loss_log import LossLog
from .masks import count_tokens
from .recorder import MicroBatch
from .training import recorders, with_elbo

# For the type checker a Trainer; at run time a plain mixin, to stand before any of the Trainer's subclasses.
_Base: Any = Trainer if TYPE_CHECKING else object


class ElboTrainerMixin(_Base):
    """Weights the ELBO by tokens, for `transformers.Trainer` and its subclasses.

    Use: ``class MyTrainer(ElboTrainerMixin, SFTTrainer)``. An optimizer's step gets the mean of the ELBO over all its
    tokens that are no padding, across accumulated micro-batches and processes. It is added to whatever loss the
    Trainer behind the mixin computes: the model's, one with label smoothing, one of its own. A model without FVAE-LoRA
    layers trains as with the plain Trainer.

    Its logs say what the loss is made of: ``loss = task_weight * task_loss + the sum of elbo/<term>``, all means over
    the steps since the last log. The terms are those of the negative ELBO with all their weights, summed over layers;
    with ``trainer.log_elbo_per_layer = True`` there is ``elbo/<layer>/<term>`` too.

    Attributes:
        log_elbo_per_layer: Whether the logs hold each layer's terms.

    Raises:
        RuntimeError: In training on several GPUs with `torch.nn.DataParallel`, which splits what the layers record.
    """

    log_elbo_per_layer: bool = False
    _tokens_in_step: list[int] | None = None
    _loss_log: LossLog | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        self._loss_log = LossLog()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; beside the training loss stands what it is made of."""
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
        root = _root(self.model)
        if root is not None and batches and isinstance(batches[0], Mapping):
            counts = torch.tensor([list(count_tokens(root, batch).values()) for batch in batches], device=device)
            self._tokens_in_step = self.accelerator.reduce(counts.sum(0), "sum").tolist()
        return batches, num_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The task loss and, in training, this micro-batch's share of the ELBO of the step.

        Args:
            model: The model, wrapped as the Trainer does.
            inputs: A micro-batch.
            return_outputs: Whether to return the model's outputs as well.
            num_items_in_batch: Number of labels in the step, as the Trainer counts them.

        Returns:
            A scalar, and with `return_outputs` the outputs behind it.
        """
        root = _root(self.model)
        if root is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.n_gpu > 1:
            raise RuntimeError("FVAE-LoRA does not support torch.nn.DataParallel; use torchrun or accelerate launch")
        shares = self._shares(root, inputs, num_items_in_batch)
        micro_batches = {recorder: MicroBatch(inputs.get("labels")) for recorder in recorders(self.model)}
        for recorder, micro_batch in micro_batches.items():
            recorder.micro_batch = micro_batch
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            for recorder in micro_batches:
                recorder.micro_batch = None
        task_loss, *outputs = result if return_outputs else (result,)
        loss = with_elbo(task_loss, [(micro_batch.forwards, shares) for micro_batch in micro_batches.values()])
        if self._loss_log is not None:
            forwards = [forward for micro_batch in micro_batches.values() for forward in micro_batch.forwards]
            self._loss_log.add(task_loss, forwards, self._divisor(num_items_in_batch), self.state.global_step)
        return (loss, *outputs) if return_outputs else loss

    def _shares(self, root: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> dict[str, float]:
        """This micro-batch's share of the step's tokens, in the scale that the Trainer's later steps expect."""
        if self._tokens_in_step is None:
            return {}
        # The gradients of the processes are averaged.
        parts = self.accelerator.num_processes * self._divisor(num_items)
        counts = count_tokens(root, inputs).items()
        return {name: parts * n / max(total, 1) for (name, n), total in zip(counts, self._tokens_in_step, strict=True)}

    def _divisor(self, num_items: Tensor | int | None) -> int:
        """What the Trainer divides a loss by: the step's micro-batches, unless the loss is normalised over the step."""
        normalised = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        if getattr(Trainer, "loss_is_scaled_for_ga", ...) is None and self.loss_is_scaled_for_ga is not None:
            normalised = self.loss_is_scaled_for_ga  # a Trainer that knows this setting goes by it
        return 1 if normalised else self.current_gradient_accumulation_steps


class FVAELoraTrainer(ElboTrainerMixin, Trainer):
    """`transformers.Trainer` with `ElboTrainerMixin`."""


def _root(model: nn.Module) -> nn.Module | None:
    """The first adapted model inside a model, whose forward the hooks watch."""
    return next((module for module in model.modules() if ATTRIBUTE in vars(module)), None)
