"""The small adapter for inference: encoder 1's mean and B, without anything that only training needs."""

from __future__ import annotations

import copy
import os
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter_folder import new_folder
from .config import FVAELoraConfig

TRAINING_ONLY = ("encoder2_", "decoder_", "log_tau", "_logvar_")


def export_for_inference(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` loads, with only what inference needs.

    Its outputs in eval mode equal the full adapter's; it cannot be trained further. The folder is written completely or
    not at all.

    Args:
        model: A peft model with an FVAE-LoRA adapter.
        folder: Folder to write to; must not exist, or be empty.
        adapter_name: Which adapter.

    Raises:
        ValueError: If there is no such FVAE-LoRA adapter, if it samples at inference (which needs the log-variance), or
            if the folder is not empty.
    """
    exported = copy.copy(deterministic_config(model, adapter_name))
    with new_folder(folder) as inside:
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        kept = {key: value for key, value in state.items() if not is_training_only(key)}
        exported.inference_only = exported.inference_mode = True
        write_adapter(model, exported, kept, inside)


def is_training_only(name: str) -> bool:
    """Whether a parameter of an FVAE-LoRA adapter is not needed at inference.

    Args:
        name: Its name in a model or in a checkpoint.

    Returns:
        True if only training needs it; False for parameters of anything else than an FVAE-LoRA adapter.
    """
    return ".fvae_lora_vae." in name and any(part in name.rpartition(".")[2] for part in TRAINING_ONLY)


def deterministic_config(model: nn.Module, adapter_name: str) -> FVAELoraConfig:
    """The configuration of an FVAE-LoRA adapter that takes z1's mean at inference.

    Args:
        model: A peft model.
        adapter_name: Which adapter.

    Raises:
        ValueError: If there is no such FVAE-LoRA adapter, or if it samples at inference.
    """
    config = model.peft_config.get(adapter_name) if isinstance(model, PeftModel) else None
    if not isinstance(config, FVAELoraConfig):
        raise ValueError(f"adapter_name: the model has no FVAE-LoRA adapter named {adapter_name!r}")
    if config.sample_at_inference:
        raise ValueError(
            "sample_at_inference: an adapter that samples at inference needs its log-variance and cannot be exported"
        )
    return config


def write_adapter(model: PeftModel, config: PeftConfig, state: dict[str, Tensor], folder: Path) -> None:
    """Write an adapter's weights and configuration, including what peft's auto classes need to find the base model.

    Args:
        model: The model that the adapter belongs to.
        config: The adapter's configuration; the base model's name is added if it is missing.
        state: The adapter's weights, as `peft.get_peft_model_state_dict` names them.
        folder: Folder to write to.
    """
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    classes = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    tensors = {key: value.contiguous() for key, value in state.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(folder, auto_mapping_dict=classes if config.task_type is None else None)
