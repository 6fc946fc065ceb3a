"""What two processes compute and save, for ``test_sharded``: run by torchrun with the folder to write to."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import set_seed

import fvae_lora.objective
from by_hand import Batch, adapted, collated, rows_for

ROWS = rows_for("bert", [6] * 8)


def model_of_all() -> PeftModel:
    """The same in every process; its classifier is trained and saved too."""
    set_seed(0)
    return adapted("bert", modules_to_save=["classifier"])


def whole(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Gradients by name, put together from their shards."""
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in parameters
        if p.grad is not None
    }


def sharded(rank: int, folder: Path) -> dict[str, Tensor]:
    """FSDP2, each process with half of the rows; two micro-batches of two."""
    model = model_of_all()
    for layer in model.get_base_model().bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    for start in (0, 4):
        (model(**micro_batch(start, rank)).loss / 2).backward()
    gradients = whole(model.named_parameters())
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    return gradients


def accelerated(accelerator: Accelerator, folder: Path) -> dict[str, Tensor]:
    """DistributedDataParallel through accelerate, with its gradient accumulation."""
    model = accelerator.prepare(model_of_all())
    for start in (0, 4):
        with accelerator.accumulate(model):
            accelerator.backward(model(**micro_batch(start, accelerator.process_index)).loss)
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, state_dict=accelerator.get_state_dict(model)
    )
    return whole(model.named_parameters())


def micro_batch(start: int, rank: int) -> Batch:
    """Two rows for a process."""
    return collated(ROWS[start + 2 * rank : start + 2 * rank + 2])


def main(folder: Path) -> None:
    """One optimizer's step over all rows, in each of the ways; the first process writes gradients and adapters."""
    fvae_lora.objective.draw = lambda mean, logvar, noise: mean  # as in `by_hand`
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    rank = accelerator.process_index
    for name, gradients in {
        "accelerate": accelerated(accelerator, folder / "accelerate"),
        "fsdp2": sharded(rank, folder / "fsdp2"),
    }.items():
        if rank == 0:
            save_file({key: value.contiguous() for key, value in gradients.items()}, folder / f"{name}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
