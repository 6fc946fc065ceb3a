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


@dataclass
class Posterior:
    """What a layer's forward hands to its objective, each (..., r) and in at least fp32."""

    mean: Tensor
    logvar: Tensor
    sample: Tensor

    @classmethod
    def drawn(cls, vae: FVAE, encoder: str, x: Tensor) -> Posterior:
        """What an encoder, ``"encoder1"`` or ``"encoder2"``, makes of its input (..., d), and a sample of that."""
        mean, logvar = vae.encode(encoder, x)
        return cls(mean, logvar, draw(mean, logvar))

    def flat(self, chosen: Tensor) -> Posterior:
        """The chosen tokens alone, (k, r)."""
        return Posterior(*(t.reshape(-1, t.shape[-1])[chosen] for t in (self.mean, self.logvar, self.sample)))

    def detached(self) -> Posterior:
        """The same without graph."""
        return Posterior(self.mean.detach(), self.logvar.detach(), self.sample.detach())


def elbo(vae: FVAE, x: Tensor, encoder_input: Tensor, q1: Posterior, weights: TokenWeights) -> LayerElbo:
    """The ELBO of one layer: from its input and the first posterior, which the layer's output has used already.

    Args:
        vae: The layer's autoencoder, with the second encoder and the decoder.
        x: The layer's input and the reconstruction's target, (..., d); the gradient reaches it, unless the
            configuration stops it there.
        encoder_input: x after dropout, in the encoders' dtype, (..., d).
        q1: Posterior of z1, with the sample that reached B.
        weights: Which tokens count.

    Returns:
        The layer's terms.
    """
    config = vae.config
    if config.elbo_token_fraction < 1:
        chosen, weights = weights.sample(x.shape[:-1], config.elbo_token_fraction, x.device)
        x, encoder_input = (t.reshape(-1, t.shape[-1])[chosen] for t in (x, encoder_input))
        q1 = q1.flat(chosen)
    if config.elbo_stop_gradient:
        x, encoder_input = x.detach(), encoder_input.detach()
        q1 = Posterior.drawn(vae, "encoder1", encoder_input)  # through the one at hand the task's gradient reaches x
    q2 = Posterior.drawn(vae, "encoder2", encoder_input)
    reconstruction = summed_log_likelihood(
        x,
        vae.decode_hidden(q1.sample, q2.sample),
        vae.decoder_output_weight,
        vae.decoder_output_bias,
        vae.log_tau,
        weights.mask,
    )
    return LayerElbo(config, weights, weights.scaled(reconstruction), q1, q2)


@dataclass
class LayerElbo:
    """The terms of one layer's ELBO, means over the tokens that count."""

    config: FVAELoraConfig
    weights: TokenWeights
    reconstruction: Tensor
    q1: Posterior
    q2: Posterior

    def kl_z1(self) -> Tensor:
        """KL(q1 || p1)."""
        return self.weights.mean(kl_to_prior(self.q1.mean, self.q1.logvar))

    def kl_z2(self) -> Tensor:
        """KL(q2 || p2)."""
        m, s = self.config.residual_prior_mean, self.config.residual_prior_std
        return self.weights.mean(kl_to_prior(self.q2.mean, self.q2.logvar, m, s))

    def gamma(self) -> Tensor:
        """The factorisation term Gamma."""
        m, s = self.config.residual_prior_mean, self.config.residual_prior_std
        return self.weights.mean(gamma(self.q1.mean, self.q1.logvar, self.q2.mean, self.q2.logvar, m, s))

    def w2(self) -> Tensor:
        """W2^2(q1, q2), a diagnostic."""
        return self.weights.mean(w2(self.q1.mean, self.q1.logvar, self.q2.mean, self.q2.logvar))

    def z1_l2(self) -> Tensor:
        """The reference's mean of z1^2, of the sample and over dimensions."""
        return self.weights.mean(self.q1.sample.square().mean(-1))

    def z2_l2(self) -> Tensor:
        """The reference's mean of (z2 - m)^2, of the sample and over dimensions."""
        return self.weights.mean((self.q2.sample - self.config.residual_prior_mean).square().mean(-1))

    def weighted(self) -> dict[str, Tensor]:
        """The terms of the configured objective by name, each with its weight and sign.

        Their sum is L, to be maximised.
        """
        config = self.config
        delta = config.factorization_weight
        terms = {
            "reconstruction": config.reconstruction_weight * self.reconstruction,
            "kl_z1": -config.kl_weight * self.kl_z1(),
        }
        if config.objective == "vae2lat":
            return terms | {"kl_z2": -config.kl_weight * self.kl_z2()}
        if config.objective == "fvae":
            return terms | {"gamma": delta * self.gamma()}
        w1 = delta if config.factorization_weight_z1 is None else config.factorization_weight_z1
        w2 = delta if config.factorization_weight_z2 is None else config.factorization_weight_z2
        return terms | {"z1_l2": w1 * self.z1_l2(), "z2_l2": -w2 * self.z2_l2()}

    def detached(self) -> LayerElbo:
        """The same without graph, to read the terms from later."""
        q1, q2 = self.q1.detached(), self.q2.detached()
        return LayerElbo(self.config, self.weights, self.reconstruction.detach(), q1, q2)

    def terms(self) -> dict[str, Tensor]:
        """The unweighted terms by name, scalars, with the signs of `fvae_lora.elbo_terms`."""
        terms = {"reconstruction": self.reconstruction, "kl_z1": self.kl_z1(), "gamma": self.gamma()}
        if self.q1.mean.shape[-1] == self.q2.mean.shape[-1]:
            terms["w2"] = self.w2()
        if self.config.objective == "vae2lat":
            terms["kl_z2"] = self.kl_z2()
        if self.config.objective == "reference":
            terms |= {"z1_l2": self.z1_l2(), "z2_l2": self.z2_l2()}
        return terms
