"""Tiny models with an adapter in LoRA's place, and what the tests of that look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import Tensor, nn

from fvae_lora import FVAELoraConfig
from fvae_lora.layer import FVAELoraLayer
from tiny import BUILDERS, TARGETS, batch_for, logits, randomised

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None}


def config(kind: str, **fields: object) -> FVAELoraConfig:
    fields = {"r": 4, "decoder_hidden_dims": [8], "target_modules": TARGETS[kind], "task_type": TASKS[kind]} | fields
    return FVAELoraConfig(**fields)


def adapted(kind: str = "bert", adapter_name: str = "default", **fields: object) -> PeftModel:
    return randomised(get_peft_model(BUILDERS[kind](), config(kind, **fields), adapter_name=adapter_name))


def evaluated(model: nn.Module, kind: str = "bert") -> Tensor:
    return logits(model.eval(), kind)


def samples(model: nn.Module, kind: str = "bert") -> bool:
    batch = batch_for(BUILDERS[kind]())
    return not torch.equal(model(**batch).logits, model(**batch).logits)


def adapter_modules(model: nn.Module, name: str = "default") -> set[str]:
    """Names of the modules that have this adapter."""
    suffix = f".fvae_lora_B.{name}.weight"
    names = [key.removesuffix(suffix) for key, _ in model.named_parameters() if key.endswith(suffix)]
    return {key.removeprefix("base_model.model.") for key in names}


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, FVAELoraLayer))
