"""transformers' Trainer with the ELBO weighted right in every one of its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from .layer import FVAELoraLayer
from .masks import count_tokens
from .recorder import ATTRIBUTE
from .training import add_elbo, recorders

# For the type checker a Trainer; at run time a plain mixin, to stand before any of the Trainer's subclasses.
_Base: Any = Trainer if TYPE_CHECKING else object


class ElboTrainerMixin(_Base):
    """Weights the ELBO by tokens, for `transformers.Trainer` and its subclasses.

    Use: ``class MyTrainer(ElboTrainerMixin, SFTTrainer)``. An optimizer's step gets the mean of the ELBO over all its
    tokens that are no padding, across accumulated micro-batches and, with ``average_tokens_across_devices``, across
    ranks. Where the Trainer computes the loss itself (label smoothing, ``compute_loss_func``) the ELBO is added to
    that. A model without FVAE-LoRA layers trains as with the plain Trainer.

    Raises:
        RuntimeError: In training on several GPUs with `torch.nn.DataParallel`, which splits what the layers record.
    """

    _tokens_in_step: Mapping[str, Tensor] | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one optimizer's step, whose tokens are counted here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        root = _root(self.model)
        if root is not None and batches and isinstance(batches[0], Mapping):
            counts = [count_tokens(root, batch) for batch in batches]
            self._tokens_in_step = {
                sequence: torch.stack([count[sequence].to(device) for count in counts]).sum() for sequence in counts[0]
            }
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
        across_devices = (
            self.args.average_tokens_across_devices
            and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
            and num_items_in_batch is not None
        )
        shares = self._shares(root, inputs, num_items_in_batch, across_devices)
        for recorder in recorders(root):
            recorder.next_shares = shares
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        pending = [
            recorder.forward for recorder in recorders(root) if recorder.forward.calls and not recorder.forward.used
        ]
        if pending:
            # The plain Trainer multiplied the loss that it computed by the number of processes.
            processes = self.accelerator.num_processes if across_devices else 1
            for forward in pending:
                forward.shares = {sequence: share * processes for sequence, share in (shares or {}).items()}
            loss = add_elbo(loss, root)
        return (loss, outputs) if return_outputs else loss

    def _shares(
        self, root: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None, across_devices: bool
    ) -> dict[str, Tensor | float] | None:
        """This micro-batch's share of the step's tokens, in the scale that the Trainer's later steps expect."""
        if self._tokens_in_step is None:
            return None
        # Unless the loss is normalised over the whole step, the Trainer divides it by the number of micro-batches.
        normalised = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        if getattr(self, "loss_is_scaled_for_ga", None) is not None:
            normalised = self.loss_is_scaled_for_ga
        micro_batches = 1 if normalised else self.current_gradient_accumulation_steps
        shares: dict[str, Tensor | float] = {}
        for sequence, count in count_tokens(root, inputs).items():
            total = self._tokens_in_step[sequence].to(count.device)
            if across_devices and self.accelerator.num_processes > 1:
                total = self.accelerator.gather(total.to(self.args.device)).sum().to(count.device)
            shares[sequence] = micro_batches * count / total.clamp(min=1)
        return shares


class FVAELoraTrainer(ElboTrainerMixin, Trainer):
    """`transformers.Trainer` with `ElboTrainerMixin`."""


def _root(model: nn.Module) -> nn.Module | None:
    """The adapted model inside a model: the one whose forward the hooks watch."""
    for module in model.modules():
        if ATTRIBUTE in vars(module):
            return module
        if isinstance(module, FVAELoraLayer):
            break
    return None
