"""In training the host waits for the device no more often than with LoRA.

It waits where it reads a number from a tensor. Where CUDA is, torch itself says when it waits.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from by_hand import collated, rows_for
from fvae_lora import FVAELoraConfig, FVAELoraTrainer, add_elbo
from tiny import BUILDERS, TARGETS, batch_for

READING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")


class _Reads(TorchDispatchMode):
    """Where numbers were read: the operation, and the innermost line outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in READING:
            self.add(name)
        return function(*args, **(kwargs or {}))

    def add(self, name: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.found[name, f"{frames[-1].filename}:{frames[-1].lineno}"] += 1


@contextmanager
def reads() -> Iterator[Counter[tuple[str, str]]]:
    """Counts how often numbers are read, and where."""
    to_list = Tensor.tolist
    with _Reads() as counting, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", lambda tensor: counting.add("tolist") or to_list(tensor))
        yield counting.found


def adapted(kind: str, config: type[PeftConfig]) -> PeftModel:
    return get_peft_model(BUILDERS[kind](torch.float32), config(r=4, target_modules=TARGETS[kind])).train()


def own_loss(kind: str, model: PeftModel, batch: dict[str, Any]) -> None:
    labels = batch.pop("labels")
    read = {"decoder_input_ids": labels.clamp(min=0)} if kind == "t5" else {}
    loss = model(**batch, **read).logits.float().square().mean()
    (add_elbo(loss, model) if model.peft_type == "FVAE_LORA" else loss).backward()


def step(kind: str, model: PeftModel, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()


def step_of_items(kind: str, model: PeftModel, batch: dict[str, Any]) -> None:
    model(**batch, **({"num_items_in_batch": torch.tensor(20)} if kind in ("llama", "gpt2") else {})).loss.backward()


@pytest.mark.parametrize("train", [step, step_of_items, own_loss])
@pytest.mark.parametrize(
    "kind", ["vit", "bert", "llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "t5"))]
)
def test_a_step_reads_no_more_numbers(kind: str, train: Callable[[str, PeftModel, dict[str, Any]], None]) -> None:
    found = {}
    for config in (LoraConfig, FVAELoraConfig):
        model = adapted(kind, config)
        batch = batch_for(model.get_base_model())
        train(kind, model, batch.copy())  # what is looked at once
        with reads() as found[config]:
            train(kind, model, batch.copy())
    assert found[FVAELoraConfig] <= found[LoraConfig]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_trainer_reads_no_more_numbers(kind: str, tmp_path: Path) -> None:
    """Between logs, with padding, over micro-batches; for a log both read the loss, and FVAE-LoRA its terms."""
    found = {}
    for config, trainer in ((LoraConfig, Trainer), (FVAELoraConfig, FVAELoraTrainer)):
        settings: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        settings |= {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(str(tmp_path), logging_steps=100, **settings)
        rows = rows_for(kind, [3, 6, 4, 5])
        training = trainer(adapted(kind, config), arguments, train_dataset=rows, data_collator=collated)
        training.train()  # what is looked at once
        with reads() as found[config]:
            training.train()
    between_logs = Counter({at: n for at, n in found[FVAELoraConfig].items() if "loss_log.py" not in at[1]})
    assert between_logs.total() <= found[LoraConfig].total()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA says when it waits")
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_a_step_waits_no_more_often_for_cuda(kind: str) -> None:
    waits = {}
    for config in (LoraConfig, FVAELoraConfig):
        model = adapted(kind, config).cuda()
        batch = {name: value.cuda() for name, value in batch_for(model.get_base_model()).items()}
        step(kind, model, batch)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(kind, model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits[config] = sum("synchroniz" in str(warning.message) for warning in caught)
    assert waits[FVAELoraConfig] <= waits[LoraConfig]
