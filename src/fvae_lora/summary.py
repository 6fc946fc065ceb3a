"""What the adapted layers' autoencoders have made of a whole data set, gathered batch by batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inspection import Totals, read_inputs, reconstruction, token_scores
from .layer import FVAELoraLayer
from .vae import FVAE, raised


@dataclass(frozen=True)
class LayerSummary:
    """What one layer's autoencoder makes of a data set.

    All but the last two attributes are over the tokens that count, of all examples alike. Tensors are of float64 on the
    CPU.

    A share of variance is R^2 = 1 - sum ||x - g||^2 / sum ||x - mean||^2 over tokens, of the decoder's mean g at the
    posteriors' means: 1 where x is known, 0 where g is no better than the mean of all tokens, negative where it is
    worse; NaN where x does not vary.

    Attributes:
        tokens: How many tokens counted.
        log_likelihood: Mean log p(x | z1, z2) at the posteriors' means, summed over features, in nats.
        kl_z1: Mean KL(q1 || p1), in nats.
        gamma: Mean Gamma = E[log p2(z2) - log p1(z1)], in nats.
        w2: Mean W2^2(q1, q2); ``None`` where z1 and z2 differ in dimensions.
        r2: The decoder's share of variance with both latents.
        r2_z1: The same from z1 alone, z2 at its prior's mean m.
        r2_z2: The same from z2 alone, z1 at its prior's mean 0.
        update_norm: Root mean square of ||c B mean1(x)||, what the adapter adds.
        output_norm: Root mean square of ||W x + b||, what the frozen layer gives.
        z1_variance: Mean variance of the posterior of z1, (r,).
        z2_variance: The same of z2, (residual_dim,).
        z1_spread: Variance of the posterior's mean of z1, (r,); a unit in which it hardly varies says nothing of x.
        z2_spread: The same of z2, (residual_dim,).
        z1_mean: The posterior's mean of z1, averaged over each example's tokens, (examples, r); NaN where none counts.
        z2_mean: The same of z2, (examples, residual_dim).
    """

    tokens: int
    log_likelihood: float
    kl_z1: float
    gamma: float
    w2: float | None
    r2: float
    r2_z1: float
    r2_z2: float
    update_norm: float
    output_norm: float
    z1_variance: Tensor
    z2_variance: Tensor
    z1_spread: Tensor
    z2_spread: Tensor
    z1_mean: Tensor
    z2_mean: Tensor


def summarise_layers(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, LayerSummary]:
    """Ask every adapted layer's autoencoder what it makes of a data set.

    The model runs once for each batch, as in `fvae_lora.score_inputs`, and is left as it was. Of a batch only sums are
    kept, and of each example the latents' means.

    Args:
        model: An adapted model, or one that contains it.
        batches: Inputs as the model takes them by name. How they are cut into batches changes nothing.

    Returns:
        A summary by the name of the layer in the adapted model (with the adapter's name behind it where several are
        active); nothing of a layer in which no token counts.

    Raises:
        ValueError: As `fvae_lora.score_inputs`.
    """
    sums: dict[str, _Sums] = defaultdict(_Sums)
    for batch in batches:
        latents: dict[str, Totals] = defaultdict(Totals)

        def read(
            key: str,
            layer: FVAELoraLayer,
            adapter: str,
            x: Tensor,
            row: Tensor,
            rows: int,
            latents: dict[str, Totals] = latents,
        ) -> None:
            vae = layer.active_vaes()[adapter]
            scores = token_scores(vae, x)
            latents[key].add({name: scores[name] for name in ("z1_mean", "z2_mean")}, row, rows)
            if len(x):
                sums[key].add(scores | _further_scores(layer, adapter, vae, x, scores), raised(x))

        read_inputs(model, (), batch, read)
        for key, totals in latents.items():
            sums[key].rows.append({name: mean.cpu().double() for name, mean in totals.means().items()})
    return {key: found.summary() for key, found in sums.items() if found.tokens}


def _further_scores(
    layer: FVAELoraLayer, adapter: str, vae: FVAE, x: Tensor, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Squared errors of the decoder, and squared norms of both outputs of the layer, (tokens,)."""
    z1, z2 = scores["z1_mean"], scores["z2_mean"]
    prior1, prior2 = torch.zeros_like(z1), torch.full_like(z2, vae.config.residual_prior_mean)
    B = layer.B(adapter)
    update = F.linear((z1 * layer.scaling[adapter]).to(B.dtype), B)
    differences = {
        "error": raised(x) - reconstruction(vae, z1, z2),
        "error_z1": raised(x) - reconstruction(vae, z1, prior2),
        "error_z2": raised(x) - reconstruction(vae, prior1, z2),
        "update": raised(update),
        "output": raised(layer.frozen_output(x)),
    }
    return {name: value.square().sum(-1) for name, value in differences.items()}


class _Variance:
    """Mean and sum of squares around it, batch by batch; source: Chan, Golub and LeVeque 1983, "Algorithms for
    computing the sample variance".
    """  # noqa: D205

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add rows, (rows, ...)."""
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0).cpu().double()
        step, total = mean.cpu().double() - self.mean, self.count + count
        self.squares = self.squares + squares + step.square() * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


class _Sums:
    """What is kept of one layer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.totals: dict[str, Tensor] = {}
        self.moments = {name: _Variance() for name in ("x", "z1_mean", "z2_mean")}
        self.rows: list[dict[str, Tensor]] = []

    def add(self, scores: Mapping[str, Tensor], x: Tensor) -> None:
        self.tokens += len(x)
        for name, value in scores.items():
            total = value.sum(0).cpu().double()
            self.totals[name] = self.totals.get(name, 0) + total
        for name, moments in self.moments.items():
            moments.add(x if name == "x" else scores[name])

    def summary(self) -> LayerSummary:
        mean = {name: total / self.tokens for name, total in self.totals.items()}
        variance = (self.moments["x"].squares.sum() / self.tokens).item()

        def share(error: str) -> float:
            return 1 - mean[error].item() / variance if variance else math.nan

        return LayerSummary(
            tokens=self.tokens,
            log_likelihood=mean["log_likelihood"].item(),
            kl_z1=mean["kl_z1"].item(),
            gamma=mean["gamma"].item(),
            w2=mean["w2"].item() if "w2" in mean else None,
            r2=share("error"),
            r2_z1=share("error_z1"),
            r2_z2=share("error_z2"),
            update_norm=mean["update"].sqrt().item(),
            output_norm=mean["output"].sqrt().item(),
            z1_variance=mean["z1_variance"],
            z2_variance=mean["z2_variance"],
            z1_spread=self.moments["z1_mean"].squares / self.tokens,
            z2_spread=self.moments["z2_mean"].squares / self.tokens,
            z1_mean=torch.cat([row["z1_mean"] for row in self.rows]),
            z2_mean=torch.cat([row["z2_mean"] for row in self.rows]),
        )
