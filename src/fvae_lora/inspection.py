"""Scores of each input of a batch by the adapted layers' autoencoders."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import FVAELoraConfig
from .evaluating import active_configs, adapted_layers, evaluating
from .kernels.likelihood import log_likelihood
from .layer import FVAELoraLayer
from .masks import TokenMasks, warn_of_padding
from .module_names import abbreviated
from .objective import gamma, kl_to_prior, w2
from .vae import FVAE, raised


@dataclass(frozen=True)
class LayerScores:
    """Scores of each example by one layer's autoencoder: means over the example's tokens, without padding.

    All are in at least fp32, and NaN for an example without a token that counts. An example is a row of the layer's
    input: in a model with two towers, images and texts may differ in number.

    Attributes:
        tokens: Number of tokens that counted, (batch,).
        log_likelihood: log p(x | z1, z2) at the posteriors' means, summed over features, in nats, (batch,).
        log_likelihood_z1: The same from z1 only, z2 at its prior's mean m, in nats, (batch,).
        log_likelihood_z2: The same from z2 only, z1 at its prior's mean 0, in nats, (batch,).
        expected_log_likelihood: E[log p(x | z1, z2)] over draws of both, in nats, (batch,); ``None`` without draws.
        kl_z1: KL(q1 || p1) in nats, (batch,).
        gamma: Gamma = E[log p2(z2) - log p1(z1)] in nats, (batch,).
        w2: W2^2(q1, q2), (batch,); ``None`` if z1 and z2 differ in dimensions.
        z1_mean: The posterior's mean of z1, (batch, r).
        z1_variance: The posterior's variance of z1, (batch, r).
        z2_mean: The same of z2, (batch, residual_dim).
        z2_variance: The same of z2, (batch, residual_dim).
    """

    tokens: Tensor
    log_likelihood: Tensor
    log_likelihood_z1: Tensor
    log_likelihood_z2: Tensor
    expected_log_likelihood: Tensor | None
    kl_z1: Tensor
    gamma: Tensor
    w2: Tensor | None
    z1_mean: Tensor
    z1_variance: Tensor
    z2_mean: Tensor
    z2_variance: Tensor


def score_inputs(
    model: nn.Module, /, *args: Any, draws: int = 0, seed: int = 0, **inputs: Any
) -> dict[str, LayerScores]:
    """Score each input of a batch by the autoencoder of every adapted layer.

    The model runs once, in eval mode with z1 at its mean and without gradients. It is left as it was, even after an
    error, and nothing reaches a loss. The scores of an example do not depend on the rest of the batch. For a layer that
    runs several times, as in ALBERT, they are means over the tokens of all its runs.

    Args:
        model: An adapted model, or one that contains it.
        *args: Its inputs, for models that take them by position.
        draws: Number of draws of (z1, z2) for ``expected_log_likelihood``; all tokens share the noise of a draw, so
            that examples can be compared.
        seed: Seed of these draws.
        **inputs: The model's inputs by name, as for a forward.

    Returns:
        Scores by the layer's name in the adapted model (followed by the adapter's name if several are active). Layers
        whose tokens cannot be assigned to examples are left out with a warning.

    Raises:
        ValueError: If no FVAE-LoRA adapter is active, if one has no decoder (``inference_only`` or ``elbo_weight=0``),
            if `adapter_names` are among the inputs, or if `draws` is negative.
    """
    if draws < 0:
        raise ValueError(f"draws must be an integer, at least 0, not {draws}")
    totals: dict[str, Totals] = defaultdict(Totals)

    def score(key: str, layer: FVAELoraLayer, adapter: str, x: Tensor, row: Tensor, rows: int) -> None:
        totals[key].add(token_scores(layer.active_vaes()[adapter], x, draws, seed), row, rows)

    read_inputs(model, args, inputs, score)
    return {
        key: LayerScores(tokens=total.tokens, **{"w2": None, "expected_log_likelihood": None} | total.means())
        for key, total in totals.items()
    }


Reader = Callable[[str, FVAELoraLayer, str, Tensor, Tensor, int], None]


def read_inputs(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any], reader: Reader) -> None:
    """Run a model once as `score_inputs` does, and give `reader` the input of each adapted layer's autoencoder.

    Args:
        model: An adapted model, or one that contains it.
        args: Its inputs by position.
        inputs: Its inputs by name.
        reader: Called at each run of each active adapter's layer with the name of its scores, the layer, the adapter,
            the tokens that count, (tokens, d), the row of the batch that each belongs to, (tokens,), and the number of
            rows.

    Raises:
        ValueError: As `score_inputs`.
    """
    configs = configs_with_decoder(model)
    if inputs.get("adapter_names") is not None:
        raise ValueError("adapter_names: score the rows of each adapter by themselves, with that adapter active")
    untold: set[str] = set()
    seen: dict[int, TokenMasks] = {}

    def read(layer: FVAELoraLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer.tokens(args[0] if args else kwargs["x"])
        masks = layer.recorder.masks() or TokenMasks(layer, None, None)
        if (told := masks.rows(layer.name, x)) is None:
            untold.add(layer.name)
            return
        row, rows = told
        seen[id(masks)] = masks
        mask = masks.weights(layer.name, x).mask
        x, counts = x.expand(*row.shape, x.shape[-1]), None if mask is None else mask.expand(row.shape).flatten() > 0
        x, row = x.reshape(-1, x.shape[-1]), row.flatten()
        if counts is not None:
            x, row = x[counts], row[counts]
        for name in layer.active_vaes():
            with torch.autocast(x.device.type, enabled=False):
                reader(layer.name if len(configs) == 1 else f"{layer.name}.{name}", layer, name, x, row, rows)

    handles = []
    with evaluating(model, sampling=False) as eager:
        try:
            handles += [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in adapted_layers(model)]
            eager(*args, **inputs)
        finally:
            for handle in handles:
                handle.remove()
    for masks in seen.values():
        warn_of_padding(masks)
    if untold:
        names = abbreviated(sorted(untold))
        warnings.warn(f"{names} left out: their tokens cannot be assigned to examples", stacklevel=3)


def token_scores(vae: FVAE, x: Tensor, draws: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """The terms of `LayerScores` for each token.

    Args:
        vae: An autoencoder with a decoder, in eval mode.
        x: Its input, (tokens, d).
        draws: As in `score_inputs`.
        seed: As in `score_inputs`.

    Returns:
        The terms by name, (tokens,), or (tokens, dims) of the posteriors, in at least fp32.
    """
    config, encoder_input = vae.config, x.to(vae.log_tau.dtype)
    (mean1, logvar1), (mean2, logvar2) = vae.encode("encoder1", encoder_input), vae.encode("encoder2", encoder_input)
    m, s = config.residual_prior_mean, config.residual_prior_std

    def likelihood(z1: Tensor, z2: Tensor) -> Tensor:
        return log_likelihood(raised(x), reconstruction(vae, z1, z2), raised(vae.log_tau))

    scores = {
        "log_likelihood": likelihood(mean1, mean2),
        "log_likelihood_z1": likelihood(mean1, torch.full_like(mean2, m)),
        "log_likelihood_z2": likelihood(torch.zeros_like(mean1), mean2),
        "kl_z1": kl_to_prior(mean1, logvar1),
        "gamma": gamma(mean1, logvar1, mean2, logvar2, m, s),
        "z1_mean": mean1,
        "z1_variance": logvar1.exp(),
        "z2_mean": mean2,
        "z2_variance": logvar2.exp(),
    }
    if mean1.shape == mean2.shape:
        scores["w2"] = w2(mean1, logvar1, mean2, logvar2)
    if draws:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(draws, vae.rank + vae.residual_dim, generator=generator).to(mean1)
        sigma1, sigma2 = torch.exp(0.5 * logvar1), torch.exp(0.5 * logvar2)
        drawn = [
            likelihood(mean1 + sigma1 * eps1, mean2 + sigma2 * eps2)
            for eps1, eps2 in (eps.split([vae.rank, vae.residual_dim]) for eps in noise)
        ]
        scores["expected_log_likelihood"] = torch.stack(drawn).mean(0)
    return scores


def reconstruction(vae: FVAE, z1: Tensor, z2: Tensor) -> Tensor:
    """The decoder's mean g([z1; z2]), (..., d), in at least fp32."""
    hidden = vae.decode_hidden(z1, z2)
    return raised(F.linear(hidden, vae.decoder_output_weight, vae.decoder_output_bias))


class Totals:
    """Sums over each example's tokens, run by run."""

    def __init__(self) -> None:
        self.tokens: Any = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, scores: Mapping[str, Tensor], row: Tensor, rows: int) -> None:
        """Add what each token has, (tokens, ...), to its row of the batch."""
        counts = torch.zeros(rows, dtype=torch.long, device=row.device).index_add(0, row, torch.ones_like(row))
        self.tokens = self.tokens + counts
        for name, value in scores.items():
            sums = value.new_zeros(rows, *value.shape[1:]).index_add(0, row, value)
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def means(self) -> dict[str, Any]:
        """Means over each example's tokens, (rows, ...); NaN where it has none."""
        return {
            name: sums / self.tokens.to(sums.dtype).reshape(-1, *[1] * (sums.dim() - 1))
            for name, sums in self.sums.items()
        }


def configs_with_decoder(model: nn.Module) -> dict[str, FVAELoraConfig]:
    """As `active_configs`, of adapters that have a decoder.

    Raises:
        ValueError: If no FVAE-LoRA adapter is active, or if one has no decoder.
    """
    configs = active_configs(model)
    for name, config in configs.items():
        if config.inference_only:
            raise ValueError(
                f"adapter {name!r} is inference_only: it has encoder 1's mean and B alone, so its layers' inputs have "
                "no likelihood; take the adapter that it was exported from"
            )
        if not config.has_residual:
            raise ValueError(
                f"adapter {name!r} was made with elbo_weight=0: it has neither encoder 2 nor a decoder, so its layers' "
                "inputs have no likelihood"
            )
    return configs
