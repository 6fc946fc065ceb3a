r"""The terms of the objective in closed form, and their weighted sum.

Per token, with the two posteriors ``q1 = N(mean1, sigma1^2)``, ``q2 = N(mean2, sigma2^2)`` and the priors
``p1 = N(0, I)``, ``p2 = N(m, s^2 I)``,

    L_FVAE = alpha E[log p(x | z1, z2)] - beta KL(q1 || p1) + delta Gamma,
    Gamma  = E[log p2(z2) - log p1(z1)].

Every function maps tensors of shape (..., dims) to one number per token, (...,); only the reconstruction is sampled.
Source: "Latent Space Factorization in LoRA", arXiv 2510.19640; the Gaussian integrals are standard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import FVAELoraConfig
from .kernels.likelihood import LOG_2PI, summed_log_likelihood
from .vae import FVAE, draw


def kl_to_prior(mean: Tensor, logvar: Tensor, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
    """KL(N(mean, sigma^2) || N(prior_mean, prior_std^2 I)), at least 0.

    Args:
        mean: (..., r).
        logvar: log sigma^2, (..., r).
        prior_mean: m.
        prior_std: s.

    Returns:
        (...,).
    """
    scaled = ((mean - prior_mean).square() + logvar.exp()) / prior_std**2
    return 0.5 * (scaled - 1 - logvar).sum(-1) + mean.shape[-1] * math.log(prior_std)


def gamma(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, prior_mean: float, prior_std: float
) -> Tensor:
    """Gamma = E[log p2(z2) - log p1(z1)] with z1 ~ q1, z2 ~ q2: what pushes the two latents apart.

    Args:
        mean1: (..., r1).
        logvar1: (..., r1).
        mean2: (..., r2).
        logvar2: (..., r2).
        prior_mean: m of p2.
        prior_std: s of p2.

    Returns:
        (...,).
    """
    r1, r2 = mean1.shape[-1], mean2.shape[-1]
    log_p2 = -0.5 * ((mean2 - prior_mean).square() + logvar2.exp()).sum(-1) / prior_std**2 - r2 * math.log(prior_std)
    log_p1 = -0.5 * (mean1.square() + logvar1.exp()).sum(-1)
    return log_p2 - log_p1 + 0.5 * (r1 - r2) * LOG_2PI


def w2(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of the two posteriors, which have equal dimensions.

    Args:
        mean1: (..., r).
        logvar1: (..., r).
        mean2: (..., r).
        logvar2: (..., r).

    Returns:
        (...,).
    """
    sigma1, sigma2 = torch.exp(0.5 * logvar1), torch.exp(0.5 * logvar2)
    return (mean1 - mean2).square().sum(-1) + (sigma1 - sigma2).square().sum(-1)


@dataclass
class TokenWeights:
    """How much each token of a layer's input counts: 1, or 0 for padding.

    Args:
        mask: 1.0 for tokens that count and 0.0 for padding, (...,); ``None`` where all count.
        count: How many tokens count.
    """

    mask: Tensor | None
    count: Tensor | int

    def mean(self, per_token: Tensor) -> Tensor:
        """Mean over the tokens that count; 0 where there are none.

        Args:
            per_token: (...,).

        Returns:
            A scalar.
        """
        return self.scaled(per_token.sum() if self.mask is None else (per_token * self.mask).sum())

    def scaled(self, summed: Tensor) -> Tensor:
        """A sum over the tokens that count, divided by their number."""
        return summed / (self.count.clamp(min=1) if isinstance(self.count, Tensor) else max(self.count, 1))

    def sample(self, shape: torch.Size, fraction: float, device: torch.device) -> tuple[Tensor, TokenWeights]:
        """Draw a share of the tokens such that sums over them are unbiased for sums over all.

        Args:
            shape: Shape of the tokens, (...,).
            fraction: The share, in (0, 1].
            device: Where the indices shall lie.

        Returns:
            Indices into the flattened tokens, (k,), and their weights, each the token's own times tokens / k.
        """
        tokens = shape.numel()
        k = max(1, math.ceil(fraction * tokens)) if tokens else 0
        chosen = torch.randperm(tokens, device=device)[:k]
        ones = torch.ones(k, device=device) if self.mask is None else self.mask.flatten()[chosen]
        return chosen, TokenWeights(ones * (tokens / max(k, 1)), self.count)


def standard_normal(x: Tensor, dims: int, parameter: Tensor) -> Tensor:
    """Noise from torch's global generator, which gradient checkpointing replays.

    Args:
        x: (..., d).
        dims: How many numbers for each of its tokens.
        parameter: One of the autoencoder's; the noise has its dtype, raised to at least fp32.

    Returns:
        (..., dims).
    """
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    # Not randn_like: torch.compile takes two of that of one tensor for the same noise.
    return torch.randn(*x.shape[:-1], dims, dtype=dtype, device=x.device)


@dataclass
class Draws:
    """All that chance has a part in when a layer runs in training.

    Args:
        noise1: What z1 is drawn with, (..., r).
        noise2: What z2 is drawn with, (k, residual_dim) for the chosen tokens or (..., residual_dim) for all.
        chosen: The tokens that the ELBO is estimated on, (k,), indices into the flattened ones; ``None`` for all.
        weights: How much each of these counts.
    """

    noise1: Tensor
    noise2: Tensor
    chosen: Tensor | None
    weights: TokenWeights

    @classmethod
    def of(cls, vae: FVAE, x: Tensor, weights: TokenWeights) -> Draws:
        """What a run on x, (..., d), of which the tokens have some weights, needs."""
        noise1 = standard_normal(x, vae.rank, vae.log_tau)
        chosen = None
        if vae.config.elbo_token_fraction < 1:
            chosen, weights = weights.sample(x.shape[:-1], vae.config.elbo_token_fraction, x.device)
        read = x if chosen is None else x.reshape(-1, x.shape[-1])[: len(chosen)]
        return cls(noise1, standard_normal(read, vae.residual_dim, vae.log_tau), chosen, weights)


@dataclass
class Posterior:
    """Mean, log-variance and a sample of a latent, each (..., r) and in at least fp32."""

    mean: Tensor
    logvar: Tensor
    sample: Tensor

    @classmethod
    def drawn(cls, moments: tuple[Tensor, Tensor], noise: Tensor) -> Posterior:
        """The posterior of that mean and log-variance, with ``mean + sigma * noise`` as its sample."""
        return cls(*moments, draw(*moments, noise))

    def chosen(self, tokens: Tensor | None) -> Posterior:
        """Some tokens alone, (k, r), by their indices; all, (..., r), without."""
        if tokens is None:
            return self
        return Posterior(*(t.reshape(-1, t.shape[-1])[tokens] for t in (self.mean, self.logvar, self.sample)))


ClosedForm = Callable[[FVAELoraConfig, Posterior, Posterior], Tensor]

CLOSED_FORMS: dict[str, ClosedForm] = {
    "kl_z1": lambda _, q1, q2: kl_to_prior(q1.mean, q1.logvar),
    "kl_z2": lambda c, q1, q2: kl_to_prior(q2.mean, q2.logvar, c.residual_prior_mean, c.residual_prior_std),
    "gamma": lambda c, q1, q2: gamma(
        q1.mean, q1.logvar, q2.mean, q2.logvar, c.residual_prior_mean, c.residual_prior_std
    ),
    "w2": lambda _, q1, q2: w2(q1.mean, q1.logvar, q2.mean, q2.logvar),
    "z1_l2": lambda _, q1, q2: q1.sample.square().mean(-1),
    "z2_l2": lambda c, q1, q2: (q2.sample - c.residual_prior_mean).square().mean(-1),
}
"""Every term but the reconstruction, from the two posteriors, one number per token.

``z1_l2`` and ``z2_l2`` are the reference's: of the sample, and a mean over dimensions.
"""


def coefficients(config: FVAELoraConfig) -> dict[str, float]:
    """The terms of the configured objective by name, each with its weight and sign in L, which is to be maximised."""
    delta = config.factorization_weight
    terms = {"reconstruction": config.reconstruction_weight, "kl_z1": -config.kl_weight}
    if config.objective == "vae2lat":
        return terms | {"kl_z2": -config.kl_weight}
    if config.objective == "fvae":
        return terms | {"gamma": delta}
    w1 = delta if config.factorization_weight_z1 is None else config.factorization_weight_z1
    w2 = delta if config.factorization_weight_z2 is None else config.factorization_weight_z2
    return terms | {"z1_l2": w1, "z2_l2": -w2}


def closed_forms(
    names: Iterable[str], config: FVAELoraConfig, weights: TokenWeights, q1: Posterior, q2: Posterior
) -> dict[str, Tensor]:
    """Some terms in closed form by name, means over the tokens that count."""
    return {name: weights.mean(CLOSED_FORMS[name](config, q1, q2)) for name in names if name != "reconstruction"}


@dataclass
class LayerElbo:
    """The ELBO of one layer's run, its terms means over the tokens that count.

    Args:
        config: The adapter's configuration.
        weights: Which tokens count, and how many.
        negative: The weighted sum of the terms, to be minimised; nothing else has a graph.
        weighted: The terms of the objective in the order of `coefficients`, with these, (terms,).
        names: The names of `terms`.
        terms: What `fvae_lora.elbo_terms` shows, without weights, (terms,).
    """

    config: FVAELoraConfig
    weights: TokenWeights
    negative: Tensor
    weighted: Tensor
    names: tuple[str, ...]
    terms: Tensor

    @classmethod
    def of(
        cls, config: FVAELoraConfig, weights: TokenWeights, reconstruction: Tensor, q1: Posterior, q2: Posterior
    ) -> LayerElbo:
        """The ELBO of two posteriors.

        Args:
            config: The adapter's configuration.
            weights: Which tokens count.
            reconstruction: E[log p(x | z1, z2)], a scalar.
            q1: Posterior of z1.
            q2: Posterior of z2.
        """
        trained = coefficients(config)
        values = {"reconstruction": reconstruction, **closed_forms(trained, config, weights, q1, q2)}
        weighted = torch.stack([weight * values[name] for name, weight in trained.items()])
        with torch.no_grad():
            shown = ["gamma", "w2"] if q1.mean.shape[-1] == q2.mean.shape[-1] else ["gamma"]
            values |= closed_forms([name for name in shown if name not in values], config, weights, q1, q2)
            terms = torch.stack(list(values.values()))
        return cls(config, weights, -weighted.sum(), weighted.detach(), tuple(values), terms)


def run(vae: FVAE, x: Tensor, encoder_input: Tensor, draws: Draws) -> tuple[Tensor, LayerElbo]:
    """What a layer's autoencoder makes of its input: the plain path.

    Args:
        vae: The layer's autoencoder, with the second encoder and the decoder.
        x: The layer's input and the reconstruction's target, (..., d); the gradient of the ELBO reaches it, unless the
            configuration stops it there.
        encoder_input: x after dropout, in the encoders' dtype, (..., d).
        draws: The noise, and which tokens count.

    Returns:
        z1, (..., r), and the ELBO.
    """
    config, chosen = vae.config, draws.chosen
    q1 = Posterior.drawn(vae.encode("encoder1", encoder_input), draws.noise1)
    z1 = q1.sample
    if config.elbo_stop_gradient:
        x, encoder_input = x.detach(), encoder_input.detach()
        q1 = Posterior.drawn(vae.encode("encoder1", encoder_input), draws.noise1)  # through z1 the task's reaches x
    if chosen is not None:
        x, encoder_input = (t.reshape(-1, t.shape[-1])[chosen] for t in (x, encoder_input))
    q1, q2 = q1.chosen(chosen), Posterior.drawn(vae.encode("encoder2", encoder_input), draws.noise2)
    summed = summed_log_likelihood(
        x,
        vae.decode_hidden(q1.sample, q2.sample),
        vae.decoder_output_weight,
        vae.decoder_output_bias,
        vae.log_tau,
        draws.weights.mask,
    )
    return z1, LayerElbo.of(config, draws.weights, draws.weights.scaled(summed), q1, q2)
