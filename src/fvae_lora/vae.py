"""The variational autoencoder of one adapted layer: two Gaussian encoders and a decoder.

Parameters are registered flat (``encoder1_mean_weight``, not ``encoder1.mean.weight``), because peft looks for the
adapter's name in the last or second-to-last place of a parameter's name, in every version it had.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FVAELoraConfig

LOGVAR_RANGE = (-20.0, 20.0)
"""Log-variances are clamped to it: standard deviations from 4.5e-5 to 2.2e4."""


class FVAE(nn.Module):
    r"""Encoders ``q1(z1 | x)``, ``q2(z2 | x)`` and decoder ``p(x | z1, z2) = N(g([z1; z2]), diag tau^2)``.

    A configuration with ``elbo_weight=0`` has neither the second encoder nor the decoder; one with
    ``inference_only`` has nothing but the mean of the first encoder.

    Args:
        config: The adapter's configuration.
        in_features: Dimension d of x.
        rank: Dimension r of z1.
    """

    decoder_output_weight: nn.Parameter
    decoder_output_bias: nn.Parameter

    def __init__(self, config: FVAELoraConfig, in_features: int, rank: int) -> None:
        super().__init__()
        self.config = config
        self.in_features = in_features
        self.rank = rank
        self.residual_dim = config.residual_dim or rank
        self.input_dropout = nn.Dropout(config.lora_dropout)
        self.encoder_dropout = nn.Dropout(config.encoder_dropout)
        self.decoder_dropout = nn.Dropout(config.decoder_dropout)
        hidden = [rank] if config.encoder_hidden_dims is None else config.encoder_hidden_dims
        self.encoder_depth = len(hidden)
        self.decoder_depth = len(config.decoder_hidden_dims)
        heads = ("mean",) if config.inference_only else ("mean", "logvar")

        self._add_encoder("encoder1", [in_features, *hidden], rank, heads)
        if config.has_residual:
            self._add_encoder("encoder2", [in_features, *hidden], self.residual_dim, heads)
            latent = rank if config.latent_fusion == "average" else rank + self.residual_dim
            widths = [latent, *config.decoder_hidden_dims]
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
                self._add_linear(f"decoder_hidden{i}", fan_in, fan_out)
            self._add_linear("decoder_output", widths[-1], in_features)
            self.log_tau = nn.Parameter(torch.empty(in_features))
        self.reset_parameters()

    def _add_encoder(self, name: str, widths: list[int], out_features: int, heads: tuple[str, ...]) -> None:
        for trunk in self._trunks(name, heads):
            for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
                self._add_linear(f"{trunk}_hidden{i}", fan_in, fan_out)
        for head in heads:
            self._add_linear(f"{name}_{head}", widths[-1], out_features)

    def _trunks(self, encoder: str, heads: tuple[str, ...]) -> list[str]:
        return [encoder] if self.config.shared_encoder_trunk else [f"{encoder}_{head}" for head in heads]

    def _add_linear(self, name: str, in_features: int, out_features: int) -> None:
        self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(out_features, in_features)))
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(out_features)))

    def reset_parameters(self) -> None:
        """Initialise as the reference does: layers as `torch.nn.Linear`, both heads zero, tau = 1.

        So z1 begins as pure N(0, I) noise. With ``init_weights=False`` the heads are drawn like the other layers.
        """
        for name, parameter in self.named_parameters():
            layer, _, kind = name.rpartition("_")
            if name == "log_tau" or (self.config.init_weights and layer.split("_")[1:] in (["mean"], ["logvar"])):
                nn.init.zeros_(parameter)
            elif kind == "weight":
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            else:
                bound = 1 / math.sqrt(getattr(self, f"{layer}_weight").shape[1])
                nn.init.uniform_(parameter, -bound, bound)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply the layer of that name, (..., in) -> (..., out)."""
        return F.linear(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))

    def _hidden(self, name: str, x: Tensor, depth: int, dropout: nn.Dropout) -> Tensor:
        for i in range(depth):
            x = dropout(F.relu(self.linear(f"{name}_hidden{i}", x)))
        return x

    def encode_mean(self, encoder: str, x: Tensor) -> Tensor:
        """Mean of the posterior, all that inference needs.

        Args:
            encoder: ``"encoder1"`` or ``"encoder2"``.
            x: Inputs, (..., d).

        Returns:
            The mean, (..., r).
        """
        trunk = encoder if self.config.shared_encoder_trunk else f"{encoder}_mean"
        return self.linear(f"{encoder}_mean", self._hidden(trunk, x, self.encoder_depth, self.encoder_dropout))

    def encode(self, encoder: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, the latter clamped to [-20, 20].

        Args:
            encoder: ``"encoder1"`` or ``"encoder2"``.
            x: Inputs, (..., d).

        Returns:
            Mean and log-variance, each (..., r) and in at least fp32.
        """
        if self.config.shared_encoder_trunk:
            hidden = self._hidden(encoder, x, self.encoder_depth, self.encoder_dropout)
            mean, logvar = self.linear(f"{encoder}_mean", hidden), self.linear(f"{encoder}_logvar", hidden)
        else:
            mean = self.encode_mean(encoder, x)
            hidden = self._hidden(f"{encoder}_logvar", x, self.encoder_depth, self.encoder_dropout)
            logvar = self.linear(f"{encoder}_logvar", hidden)
        return raised(mean), raised(logvar).clamp(*LOGVAR_RANGE)

    def decode_hidden(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The decoder up to its last layer; that one belongs to the likelihood, see `kernels.likelihood`.

        Args:
            z1: Task latent, (..., r).
            z2: Residual latent, (..., residual_dim).

        Returns:
            The last hidden layer, (..., h).
        """
        fused = self.fuse(z1, z2).to(self.log_tau.dtype)
        return self._hidden("decoder", fused, self.decoder_depth, self.decoder_dropout)

    def fuse(self, z1: Tensor, z2: Tensor) -> Tensor:
        """What the decoder reads of both latents, (..., r) and (..., residual_dim)."""
        return (z1 + z2) / 2 if self.config.latent_fusion == "average" else torch.cat([z1, z2], dim=-1)


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A sample ``mean + sigma * noise`` by the reparametrisation trick, each (..., r)."""
    return mean + torch.exp(0.5 * logvar) * noise


def raised(x: Tensor) -> Tensor:
    """The tensor in at least fp32: half types are raised, float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
