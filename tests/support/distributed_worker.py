"""What two processes compute, for ``test_distributed``: run by torchrun with the file that the gradients go to."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer, set_seed

import fvae_lora.objective
from by_hand import Batch, adapted, rows_for, trainer_gradients
from fvae_lora import FVAELoraTrainer

LENGTHS = [3, 9, 4, 6, 8, 2, 5, 7]
TRAINERS = {"stock": Trainer, "ours": FVAELoraTrainer}


def checkpointing(use_reentrant: bool) -> dict[str, Any]:
    """Arguments that turn it on."""
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    return kwargs | {"ddp_find_unused_parameters": False}


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing_factor": 0.2},
    "checkpointed": checkpointing(False),
    "reentrant": checkpointing(True),
}
CASES = [
    *[
        (kind, trainer, "plain", average)
        for kind in ("vit", "bert", "llama")
        for trainer in TRAINERS
        for average in (0, 1)
    ],
    *[("vit", "ours", settings, 1) for settings in ("smoothed", "checkpointed", "reentrant")],
    ("vit", "stock", "reentrant", 1),
]


def model_and_rows(kind: str) -> tuple[Any, list[Batch]]:
    """The same in every process."""
    set_seed(0)
    model = adapted(kind)
    model.enable_input_require_grads()  # for reentrant checkpoints
    return model, rows_for(kind, LENGTHS)


def main(target: str) -> None:
    """One step of each case over all rows: two per micro-batch, two micro-batches in each process."""
    fvae_lora.objective.draw = lambda mean, logvar, noise: mean  # as in `by_hand`
    torch.set_num_threads(1)
    Trainer._get_train_sampler = lambda trainer, *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    found = {}
    for kind, trainer, settings, average in CASES:
        model, rows = model_and_rows(kind)
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"average_tokens_across_devices": bool(average), **SETTINGS[settings]}
            (step,) = trainer_gradients(TRAINERS[trainer], model, rows, 2, 2, folder, **arguments)
        name = f"{kind}/{trainer}/{settings}/{average}"
        found |= {f"{name}:{key.removeprefix('module.')}": gradient.contiguous() for key, gradient in step.items()}
    if os.environ["RANK"] == "0":
        save_file(found, target)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
