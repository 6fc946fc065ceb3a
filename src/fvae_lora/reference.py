"""The reference implementation's configuration and checkpoints (idiap/FVAE-LoRA, a fork of peft 0.13)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn

from . import adapter_folder
from .config import FVAELoraConfig
from .module_names import current_name
from .registration import REFERENCE_TYPES

TAU_OFFSET = 1e-5  # the reference adds it to the stored tau
UNUSED_KEYS = ("lora_E", "ranknum")
ADAPTER_KEY = re.compile(r"^(?P<layer>.+?)\.(?P<rest>lora_(?:A|B|E)(?:\..+)?|ranknum)$")
ENCODER = "lora_A.views_conditionalGaussianEncoders_list."
DECODER = "lora_A.views_conditionalGaussianDecoders."

# Fields of its configuration of which only one value is supported.
ONLY_SUPPORTED = {
    "encoder_nn_type": "mlp",
    "decoder_nn_type": "mlp",
    "num_of_z_sampled": 1,
    "force_classical_ae": False,
    "force_classical_vae": False,
    "force_minhyp": False,
    "force_test_vae": False,
    "use_dora": False,
    "use_rslora": False,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "z1z2_orthogonal_reg": 0,
    "enc_l2_reg": 0,
    "dec_l2_reg": 0,
}
# Fields without effect: inherited from LoRA, or never read by the reference.
IGNORED = {
    "r",
    "lora_dropout",
    "z2_latent_std",
    "init_lora_weights",
    "loftq_config",
    "megatron_config",
    "megatron_core",
}
IGNORED |= {"scalar_decoder_std", "peft_type", "auto_mapping", "peft_version"}
PASSED_ON = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
}
PASSED_ON |= {"layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out"}


def FVAEPEFTConfig(  # noqa: N802
    *,
    latent_dim: int = 128,
    latent_fusion: str = "concat",
    enc_num_of_layer: int = 3,
    enc_hidden_layer: int = 1024,
    enc_dropout: float = 0.0,
    encoder_use_common_hidden_layer: bool = True,
    dec_num_of_layer: int = 3,
    dec_hidden_layer: int = 1024,
    dec_dropout: float = 0.1,
    z2_latent_mean: float = 1.5,
    z2_latent_std: float = 1.0,
    lambda_downstream: float = 1.0,
    lambda_reconstruction: float = 1.0,
    lambda_kl_z1: float = 1.0,
    lambda_z1_l2: float = 1.0,
    lambda_z2_l2: float = 1.0,
    lora_alpha: float = 8,
    bias: str = "none",
    **others: Any,
) -> FVAELoraConfig:
    """A configuration by the reference's field names, as in its quick start, with its profile of the method.

    The profile: ``task_weight * L_task`` plus the *mean* over layers of the negative ELBO, means of the sampled z1^2
    and (z2 - m)^2 in place of Gamma, and the scale ``lora_alpha / (latent_dim + 1e-5)``.

    Args:
        latent_dim: Dimension of both latents, and so the rank (its `r` is ignored).
        latent_fusion: ``"concat"`` or ``"average"``.
        enc_num_of_layer: Number of hidden layers of the encoders.
        enc_hidden_layer: Their width.
        enc_dropout: Dropout after each ReLU of the encoders.
        encoder_use_common_hidden_layer: Whether both heads share the hidden layers.
        dec_num_of_layer: Number of hidden layers of the decoder.
        dec_hidden_layer: Their width.
        dec_dropout: Dropout after each ReLU of the decoder.
        z2_latent_mean: m of the prior of z2.
        z2_latent_std: s of the prior of z2; never enters the reference's loss.
        lambda_downstream: Weight of the task loss.
        lambda_reconstruction: Weight of the negative log-likelihood.
        lambda_kl_z1: Weight of KL(q1 || p1).
        lambda_z1_l2: Weight of mean(z1^2).
        lambda_z2_l2: Weight of mean((z2 - m)^2).
        lora_alpha: The scale's numerator.
        bias: ``"none"``, ``"all"`` or ``"lora_only"``.
        **others: ``target_modules``, ``modules_to_save``, ``task_type`` and so on are passed on; fields that the
            reference has but never uses are accepted and ignored.

    Returns:
        A configuration for `peft.get_peft_model`.

    Raises:
        ValueError: If a field asks for a mode that is not supported; the message begins with the field's name.
        TypeError: If the reference has no such field.
    """
    for name, supported in ONLY_SUPPORTED.items():
        value = others.pop(name, supported)
        if value != supported and value is not None:
            raise ValueError(f"{name} must be {supported!r}, not {value!r}: other values are not supported")
    if unknown := sorted(others.keys() - IGNORED - PASSED_ON):
        raise TypeError(f"FVAEPEFTConfig has no field {', '.join(unknown)}")
    if z2_latent_std <= 0:
        raise ValueError(f"z2_latent_std must be above 0, not {z2_latent_std!r}")
    return FVAELoraConfig(
        r=latent_dim,
        lora_alpha=lora_alpha,
        encoder_hidden_dims=[enc_hidden_layer] * enc_num_of_layer,
        encoder_dropout=enc_dropout,
        shared_encoder_trunk=encoder_use_common_hidden_layer,
        decoder_hidden_dims=[dec_hidden_layer] * dec_num_of_layer,
        decoder_dropout=dec_dropout,
        latent_fusion=latent_fusion,
        residual_prior_mean=z2_latent_mean,
        residual_prior_std=z2_latent_std,
        objective="reference",
        elbo_weight=1.0,
        reconstruction_weight=lambda_reconstruction,
        kl_weight=lambda_kl_z1,
        factorization_weight_z1=lambda_z1_l2,
        factorization_weight_z2=lambda_z2_l2,
        task_weight=lambda_downstream,
        layer_reduction="mean",
        bias=bias.replace("lora_only", "fvae_lora_only"),
        **{name: value for name, value in others.items() if name in PASSED_ON},
    )


def load_reference_adapter(
    base_model: nn.Module, folder: str | os.PathLike[str], is_trainable: bool = False
) -> PeftModel:
    """Load an adapter folder that the reference implementation saved, also with module names of older transformers.

    Args:
        base_model: The model that the adapter was trained on.
        folder: The adapter's folder, with ``adapter_config.json`` and ``adapter_model.safetensors``.
        is_trainable: Whether to train it further; otherwise it is frozen and in eval mode.

    Returns:
        The peft model, with the reference's profile of the method.

    Raises:
        ValueError: If the folder is not a reference adapter, is damaged, needs something unsupported, or does not fit
            the model, which then stays unchanged.
    """
    path = Path(folder)
    fields = adapter_folder.check_json(path / CONFIG_NAME)
    if fields.get("peft_type") not in REFERENCE_TYPES:
        raise ValueError(
            f"{path / CONFIG_NAME} has peft_type {fields.get('peft_type')!r}, which is not one of the reference's "
            f"({', '.join(REFERENCE_TYPES)}); load it with peft.PeftModel.from_pretrained"
        )
    adapter_folder.shapes(path)
    try:
        config = FVAEPEFTConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{path / CONFIG_NAME}: {error}") from None
    state = convert_state_dict(load_file(path / SAFETENSORS_WEIGHTS_NAME), base_model)
    config.base_model_name_or_path = config.base_model_name_or_path or base_model.__dict__.get("name_or_path")
    config.inference_mode = not is_trainable
    config.checkpoint_shapes = {key: tuple(value.shape) for key, value in state.items()}
    model = get_peft_model(base_model, config)
    set_peft_model_state_dict(model, state)
    return model if is_trainable else model.eval()


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a reference checkpoint's keys to ours and to the model's, and tau to log tau.

    Args:
        state: The checkpoint.
        model: The model that the adapter belongs to.

    Returns:
        A state dict for `peft.set_peft_model_state_dict`.

    Raises:
        ValueError: If a key of the adapter is unknown, or a tau is not positive.
    """
    converted = {}
    for key, value in state.items():
        match = ADAPTER_KEY.match(key.removeprefix(adapter_folder.PEFT_PREFIX))
        if match is None:
            converted[key] = value
            continue
        if match["rest"].startswith(UNUSED_KEYS):
            continue
        if match["rest"].endswith("scale_tril"):
            value = value + TAU_OFFSET
            if not (value > 0).all():
                raise ValueError(f"{key}: tau must be positive")
            value = torch.log(value)
        layer = current_name(model, match["layer"])
        converted[f"{adapter_folder.PEFT_PREFIX}{layer}.{our_name(match['rest'])}"] = value
    return converted


def our_name(name: str) -> str:
    """Our name of one of the reference's parameters, both relative to the adapted module.

    Args:
        name: For example ``lora_A.views_conditionalGaussianEncoders_list.0.mean.weight``.

    Raises:
        ValueError: If the reference has no parameter of that name.
    """
    if name == "lora_B":
        return "fvae_lora_B.weight"
    encoder = re.fullmatch(
        re.escape(ENCODER) + r"([01])\.(?:layers(?:_(mean|logvar))?\.(\d+)|(mean|logvar))\.(\w+)", name
    )
    decoder = re.fullmatch(re.escape(DECODER) + r"(?:layers\.(\d+)|(output)_layer)\.(\w+)", name)
    if encoder is not None:
        which, trunk, depth, head, kind = encoder.groups()
        part = f"encoder{int(which) + 1}" + (f"_{trunk}" if trunk else "")
        return f"fvae_lora_vae.{part}_{head or f'hidden{depth}'}_{kind}"
    if decoder is not None:
        depth, output, kind = decoder.groups()
        return f"fvae_lora_vae.decoder_{output or f'hidden{depth}'}_{kind}"
    if name == f"{DECODER}scale_tril":
        return "fvae_lora_vae.log_tau"
    raise ValueError(f"{name} is not a known parameter of the reference's adapters")
