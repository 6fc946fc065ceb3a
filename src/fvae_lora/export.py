"""The small adapter for inference: encoder 1's mean and B, nothing of what training needed."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from .config import FVAELoraConfig

TRAINING_ONLY = ("encoder2_", "decoder_", "log_tau", "_logvar_")


def export_for_inference(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` loads, with what inference needs alone.

    Its outputs in eval mode equal the full adapter's; it cannot be trained further. The folder appears whole or not at
    all.

    Args:
        model: A peft model with an FVAE-LoRA adapter.
        folder: Folder to write to; must not exist, or be empty.
        adapter_name: Which adapter.

    Raises:
        ValueError: If there is no such FVAE-LoRA adapter, if it samples at inference (which needs the log-variance), or
            if the folder holds something.
    """
    config = model.peft_config.get(adapter_name) if isinstance(model, PeftModel) else None
    if not isinstance(config, FVAELoraConfig):
        raise ValueError(f"adapter_name: the model has no FVAE-LoRA adapter named {adapter_name!r}")
    if config.sample_at_inference:
        raise ValueError("sample_at_inference: an adapter that samples at inference cannot be exported without it")
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"folder: {target} exists and is not empty")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    kept = {
        key: value.contiguous()
        for key, value in state.items()
        if not (".fvae_lora_vae." in key and any(part in key.rpartition(".")[2] for part in TRAINING_ONLY))
    }
    exported = copy.copy(config)
    exported.inference_only = exported.inference_mode = True
    if exported.base_model_name_or_path is None:
        exported.base_model_name_or_path = model.get_base_model().__dict__.get("name_or_path") or None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unfinished:
        inside = Path(unfinished, target.name)
        inside.mkdir()
        save_file(kept, inside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        exported.save_pretrained(inside, auto_mapping_dict=_auto_mapping(model) if config.task_type is None else None)
        inside.replace(target)


def _auto_mapping(model: PeftModel) -> dict[str, str]:
    base = type(model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}
