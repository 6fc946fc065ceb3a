"""What AdaLoRA needs from the training loop: its schedule of ranks and its regulariser."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

ALL_RANKS = 0.1
"""The share of the steps before the first rank is pruned."""
FINAL_RANKS = 0.3
"""The share of the steps after the last rank was pruned."""


class RankSchedule(TrainerCallback):
    """Prunes ranks between two optimizer steps, on a schedule that follows the length of training."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the schedule: the length of training is known now."""
        config = kwargs["model"].peft_config["default"]
        config.total_step = state.max_steps
        config.tinit = int(ALL_RANKS * state.max_steps)
        config.tfinal = max(1, int(FINAL_RANKS * state.max_steps))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prunes while the gradients, from which the ranks' importance is estimated, still exist."""
        kwargs["model"].base_model.update_and_allocate(state.global_step)


def orthogonality(model: PeftModel) -> Tensor:
    """The weighted mean over all P of ||P P^T - I||, P being A (r, in) and B^T (r, out); a scalar.

    AdaLoRA's own forward adds it to the loss, but a `PeftModel` without a task type does not call that forward.
    """
    factors = [p if "lora_A" in n else p.T for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    distances = [torch.linalg.matrix_norm(p @ p.T - torch.eye(len(p), device=p.device)) for p in factors]
    weight: float = model.peft_config["default"].orth_reg_weight
    return weight * torch.stack(distances).mean()
