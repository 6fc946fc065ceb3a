"""Ablations of FVAE-LoRA: its noise and its initialisation, each removed by itself.

The ReLU is removed by `fvae.encoder_hidden_dims=[]`, the ELBO by `fvae.elbo_weight=0`. Without all four, what remains
is LoRA, except for the mean's bias.
"""

import math

from torch import nn

from fvae_lora import LOGVAR_RANGE


def ablate(model: nn.Module, noise: bool, start: str) -> None:
    """Changes the newly created adapters of `model` in place.

    Args:
        model: the adapted model.
        noise: False fixes z1's standard deviation at its minimum.
        start: "lora" starts with B at zero and z1's mean at random; "method" leaves both as they are.
    """
    for name, parameter in model.named_parameters():
        part = name.rpartition(".")[2]
        if not noise and part in ("encoder1_logvar_weight", "encoder1_logvar_bias"):
            nn.init.constant_(parameter, LOGVAR_RANGE[0] if part.endswith("bias") else 0)
            parameter.requires_grad_(False)
        if start == "lora":
            if ".fvae_lora_B." in name:
                nn.init.zeros_(parameter)
            elif part == "encoder1_mean_weight":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
