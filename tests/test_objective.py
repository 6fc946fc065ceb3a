"""The objective: closed forms, weights, which tokens count, precision, and where its gradient goes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from fvae_lora import FVAELoraConfig, elbo_loss, elbo_terms
from fvae_lora.objective import TokenWeights, gamma, kl_to_prior, w2
from tiny import adapted_linear, batch_for, randomised, tiny_bert

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@st.composite
def gaussians(draw: st.DrawFn, dims: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, (2, dims): two tokens."""
    shape = (2, dims or draw(st.integers(1, 6)))
    mean = draw(arrays(np.float64, shape, elements=st.floats(-5, 5)))
    logvar = draw(arrays(np.float64, shape, elements=st.floats(-8, 4)))
    return torch.from_numpy(mean), torch.from_numpy(logvar)


def normal(mean: Tensor | float, logvar: Tensor) -> Independent:
    return Independent(Normal(mean, torch.exp(0.5 * logvar)), 1)


def prior(like: Tensor, m: float = 0.0, s: float = 1.0) -> Independent:
    return Independent(Normal(torch.full_like(like, m), torch.full_like(like, s)), 1)


# Closed forms


@given(gaussians(), st.floats(-3, 3), st.floats(0.1, 5))
def test_kl_is_that_of_torch_distributions_and_never_negative(
    q: tuple[Tensor, Tensor], prior_mean: float, prior_std: float
) -> None:
    kl = kl_to_prior(*q, prior_mean, prior_std)
    torch.testing.assert_close(kl, kl_divergence(normal(*q), prior(q[0], prior_mean, prior_std)), **EXACT)
    assert (kl >= -1e-12).all()


@given(st.floats(-3, 3), st.floats(0.1, 5), st.integers(1, 6), st.floats(0.01, 1))
def test_kl_is_zero_for_the_prior_alone(prior_mean: float, prior_std: float, dims: int, distance: float) -> None:
    mean, logvar = torch.full((1, dims), prior_mean).double(), torch.full((1, dims), 2 * math.log(prior_std)).double()
    torch.testing.assert_close(kl_to_prior(mean, logvar, prior_mean, prior_std), torch.zeros(1).double(), **EXACT)
    assert kl_to_prior(mean + distance, logvar, prior_mean, prior_std) > 1e-8
    assert kl_to_prior(mean, logvar - distance, prior_mean, prior_std) > 1e-8


@given(gaussians(), gaussians(), st.floats(-3, 3), st.floats(0.1, 5))
def test_gamma_is_what_entropies_and_kl_terms_say(
    q1: tuple[Tensor, Tensor], q2: tuple[Tensor, Tensor], prior_mean: float, prior_std: float
) -> None:
    """E_q[log p] = - H(q) - KL(q || p), whatever the two latents' dimensions."""
    expected_log_p2 = -normal(*q2).entropy() - kl_divergence(normal(*q2), prior(q2[0], prior_mean, prior_std))
    expected_log_p1 = -normal(*q1).entropy() - kl_divergence(normal(*q1), prior(q1[0]))
    torch.testing.assert_close(gamma(*q1, *q2, prior_mean, prior_std), expected_log_p2 - expected_log_p1, **EXACT)


@pytest.mark.parametrize(("r1", "r2"), [(3, 3), (2, 4)])
def test_gamma_is_the_mean_of_samples(r1: int, r2: int) -> None:
    (mean1, mean2), (logvar1, logvar2) = [torch.randn(r1), torch.randn(r2)], [torch.randn(r1), torch.randn(r2)]
    n, m, s = 200_000, 1.5, 0.7
    z1, z2 = normal(mean1, logvar1).sample((n,)), normal(mean2, logvar2).sample((n,))
    samples = prior(z2, m, s).log_prob(z2) - prior(z1).log_prob(z1)
    error = samples.mean() - gamma(mean1, logvar1, mean2, logvar2, m, s)
    assert abs(error) < 5 * samples.std() / math.sqrt(n)


@given(gaussians(3), gaussians(3))
def test_w2_is_that_of_full_covariances_symmetric_and_zero_for_equals_alone(
    q1: tuple[Tensor, Tensor], q2: tuple[Tensor, Tensor]
) -> None:
    distance = w2(*q1, *q2)
    torch.testing.assert_close(distance, w2(*q2, *q1), **EXACT)
    torch.testing.assert_close(w2(*q1, *q1), torch.zeros(2).double(), **EXACT)
    differ = ((q1[0] - q2[0]).abs() + (q1[1] - q2[1]).abs()).amax(-1) > 1e-3
    assert (distance[differ] > 0).all()
    for (m1, v1), (m2, v2), ours in zip(zip(*q1, strict=True), zip(*q2, strict=True), distance, strict=True):
        c1, c2 = np.diag(v1.exp().numpy()), np.diag(v2.exp().numpy())
        root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(c2) @ c1 @ scipy.linalg.sqrtm(c2))
        expected = float((m1 - m2).square().sum()) + float(np.trace(c1 + c2 - 2 * root).real)
        assert float(ours) == pytest.approx(expected, rel=1e-6, abs=1e-6)


# The weighted sum, recomputed from a layer's parameters by way of torch.distributions


class ByHand:
    """One layer's posteriors and likelihood, (tokens,) each, from its parameters and the two noises."""

    def __init__(self, model: PeftModel, layer: str, x: Tensor, eps1: Tensor, eps2: Tensor) -> None:
        module = model.base_model.model.get_submodule(layer)
        self.p = dict(module.fvae_lora_vae["default"].named_parameters())
        self.config = model.peft_config["default"]
        self.x = x
        self.q1, self.q2 = self.posterior("encoder1"), self.posterior("encoder2")
        self.z1 = self.q1.mean + self.q1.stddev * eps1
        self.z2 = self.q2.mean + self.q2.stddev * eps2
        fused = torch.cat([self.z1, self.z2], -1)
        if self.config.latent_fusion == "average":
            fused = (self.z1 + self.z2) / 2
        hidden = F.relu(self.linear("decoder_hidden0", fused))
        g = self.linear("decoder_output", hidden)
        self.log_p_x = Independent(Normal(g, self.p["log_tau"].exp().expand_as(g)), 1).log_prob(x)
        self.p1 = prior(self.z1)
        self.p2 = prior(self.z2, self.config.residual_prior_mean, self.config.residual_prior_std)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.p[f"{name}_weight"].T + self.p[f"{name}_bias"]

    def posterior(self, encoder: str) -> Independent:
        hidden = F.relu(self.linear(f"{encoder}_hidden0", self.x))
        return normal(self.linear(f"{encoder}_mean", hidden), self.linear(f"{encoder}_logvar", hidden))

    def gamma(self) -> Tensor:
        log_p2 = -self.q2.entropy() - kl_divergence(self.q2, self.p2)
        return log_p2 + self.q1.entropy() + kl_divergence(self.q1, self.p1)

    def kl_z1(self) -> Tensor:
        return kl_divergence(self.q1, self.p1)

    def kl_z2(self) -> Tensor:
        return kl_divergence(self.q2, self.p2)


OBJECTIVES: dict[str, tuple[dict[str, object], Callable[[ByHand], Tensor]]] = {
    "the paper's": (
        {"reconstruction_weight": 0.5, "kl_weight": 10.0, "factorization_weight": 2.0, "elbo_weight": 1e-3},
        lambda h: 0.5 * h.log_p_x - 10 * h.kl_z1() + 2 * h.gamma(),
    ),
    "the paper's with another prior and z2": (
        {"residual_dim": 2, "residual_prior_mean": -1.0, "residual_prior_std": 0.5},
        lambda h: h.log_p_x - h.kl_z1() + h.gamma(),
    ),
    "averaged latents": ({"latent_fusion": "average"}, lambda h: h.log_p_x - h.kl_z1() + h.gamma()),
    "VAE2LAT": ({"objective": "vae2lat"}, lambda h: h.log_p_x - h.kl_z1() - h.kl_z2()),
    "beta-VAE2LAT": (
        {"objective": "vae2lat", "kl_weight": 4.0, "reconstruction_weight": 0.1},
        lambda h: 0.1 * h.log_p_x - 4 * (h.kl_z1() + h.kl_z2()),
    ),
    "the reference's": (
        {"objective": "reference", "factorization_weight_z1": 0.9, "factorization_weight_z2": 1.3, "kl_weight": 1.1},
        lambda h: h.log_p_x - 1.1 * h.kl_z1() + 0.9 * h.z1.square().mean(-1) - 1.3 * (h.z2 - 1.5).square().mean(-1),
    ),
    "the reference's with one weight": (
        {"objective": "reference", "factorization_weight": 0.7},
        lambda h: h.log_p_x - h.kl_z1() + 0.7 * h.z1.square().mean(-1) - 0.7 * (h.z2 - 1.5).square().mean(-1),
    ),
}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_is_its_formula(name: str, reduction: str, with_noises: Callable[[list[Tensor]], object]) -> None:
    fields, formula = OBJECTIVES[name]
    model = adapted_linear(layers=2, layer_reduction=reduction, **fields)
    r2 = fields.get("residual_dim", 3)
    noises = [torch.randn(4, dims, dtype=torch.float64) for dims in (3, r2, 3, r2)]
    inputs: list[Tensor] = []
    for layer in model.base_model.model:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with_noises(noises)
    model(torch.randn(4, 6, dtype=torch.float64))

    layers = [ByHand(model, str(i), x.detach(), *noises[2 * i : 2 * i + 2]) for i, x in enumerate(inputs)]
    totals = torch.stack([formula(layer).mean() for layer in layers])
    expected = -model.peft_config["default"].elbo_weight * getattr(totals, reduction)()
    torch.testing.assert_close(elbo_loss(model), expected, **EXACT)

    for terms, layer in zip(elbo_terms(model).values(), layers, strict=True):
        named = {"reconstruction": layer.log_p_x, "kl_z1": layer.kl_z1(), "gamma": layer.gamma()}
        if r2 == 3:
            named["w2"] = ((layer.q1.mean - layer.q2.mean) ** 2 + (layer.q1.stddev - layer.q2.stddev) ** 2).sum(-1)
        if fields.get("objective") == "vae2lat":
            named["kl_z2"] = layer.kl_z2()
        if fields.get("objective") == "reference":
            named |= {"z1_l2": layer.z1.square().mean(-1), "z2_l2": (layer.z2 - 1.5).square().mean(-1)}
        assert terms == pytest.approx({term: value.mean().item() for term, value in named.items()}, rel=1e-9)


def test_the_reconstruction_is_an_unbiased_estimate() -> None:
    """Over many draws its mean is the expectation of the log-likelihood, here that of a linear decoder."""
    model = adapted_linear(decoder_hidden_dims=[])
    x = torch.randn(1, 6, dtype=torch.float64)
    parameters = model.base_model.model[0].fvae_lora_vae["default"]
    with torch.no_grad():
        (mu1, v1), (mu2, v2) = parameters.encode("encoder1", x), parameters.encode("encoder2", x)
        mean = parameters.linear("decoder_output", torch.cat([mu1, mu2], -1))
        spread = parameters.decoder_output_weight.square() @ torch.cat([v1, v2], -1).exp().squeeze()
        tau = parameters.log_tau.exp()
        expected = Independent(Normal(mean, tau), 1).log_prob(x) - 0.5 * (spread / tau**2).sum()
    model(x.expand(100_000, 6))
    (terms,) = elbo_terms(model).values()
    assert terms["reconstruction"] == pytest.approx(float(expected), rel=0.02)


# Dropout, and what z1 is


def test_dropout_is_on_the_encoders_input_and_not_on_the_target(without_noise: None) -> None:
    """With everything dropped the encoders see zeros, and the decoder still has to explain the raw x."""
    model = adapted_linear(lora_dropout=0.999999)
    x = torch.randn(4, 6, dtype=torch.float64)
    model(x)
    zeros = ByHand(model, "0", torch.zeros_like(x), torch.zeros(4, 3), torch.zeros(4, 3))
    g = zeros.linear("decoder_output", F.relu(zeros.linear("decoder_hidden0", torch.cat([zeros.z1, zeros.z2], -1))))
    expected = Independent(Normal(g, zeros.p["log_tau"].exp().expand_as(g)), 1).log_prob(x).mean()
    (terms,) = elbo_terms(model).values()
    assert terms["reconstruction"] == pytest.approx(float(expected))


def test_the_output_is_the_base_layers_plus_c_b_z1(with_noises: Callable[[list[Tensor]], object]) -> None:
    model = adapted_linear(lora_alpha=6.0)  # c = 2
    x = torch.randn(4, 6, dtype=torch.float64)
    eps = torch.randn(4, 3, dtype=torch.float64)
    with_noises([eps, torch.zeros(4, 3)])
    layer = model.base_model.model[0]
    hand = ByHand(model, "0", x, eps, torch.zeros(4, 3))
    expected = layer.base_layer(x) + 2 * hand.z1 @ layer.fvae_lora_B["default"].weight.T
    torch.testing.assert_close(model(x), expected, **EXACT)
    mean = layer.base_layer(x) + 2 * hand.q1.mean @ layer.fvae_lora_B["default"].weight.T
    torch.testing.assert_close(model.eval()(x), mean, **EXACT)


def test_z1_starts_as_pure_noise_and_the_layer_as_the_reference_does() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(64, 4000)), FVAELoraConfig(target_modules=["0"], r=8))
    vae, b = model.base_model.model[0].fvae_lora_vae["default"], model.base_model.model[0].fvae_lora_B["default"].weight
    mean, logvar = vae.encode("encoder1", torch.randn(5, 64))
    assert not mean.any()
    assert not logvar.any()
    assert not vae.log_tau.any()
    assert float(b.std()) == pytest.approx(0.02, rel=0.02)
    bound = 1 / math.sqrt(64)
    assert vae.encoder1_hidden0_weight.abs().max() <= bound
    assert float(vae.encoder1_hidden0_weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


# Which tokens count


def test_the_order_of_tokens_does_not_matter(without_noise: None) -> None:
    model = adapted_linear()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    model(x)
    loss = elbo_loss(model)
    model(x[:, torch.randperm(5)])
    torch.testing.assert_close(elbo_loss(model), loss, **EXACT)


def adapted_bert(**fields: object) -> PeftModel:
    config = {"r": 4, "target_modules": ["query", "value"], "elbo_weight": 1.0, "decoder_hidden_dims": [8]}
    return randomised(get_peft_model(tiny_bert(torch.float64), FVAELoraConfig(**config | fields)))


def text(**changes: Tensor) -> dict[str, Tensor]:
    batch = batch_for(tiny_bert())
    return {key: value for key, value in batch.items() if key != "labels"} | changes


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_stands_in_the_padding_changes_nothing(without_noise: None, fraction: float) -> None:
    results = []
    for padding in (0, 7):
        torch.manual_seed(1)
        model = adapted_bert(elbo_token_fraction=fraction)
        batch = text()
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, padding)
        model(**batch)
        loss = elbo_loss(model)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, **EXACT, msg=name)


def test_a_padded_batch_counts_each_real_token_once(without_noise: None) -> None:
    """Rows on their own, without padding, weighted by their lengths, give the padded batch's terms."""
    model, batch = adapted_bert(), text()
    model(**batch)
    padded = elbo_terms(model)
    lengths = batch["attention_mask"].sum(-1)
    rows = []
    for ids, length in zip(batch["input_ids"], lengths, strict=True):
        model(input_ids=ids[None, :length])
        rows.append(elbo_terms(model))
    for layer, terms in padded.items():
        for term, value in terms.items():
            by_rows = sum(int(n) * row[layer][term] for n, row in zip(lengths, rows, strict=True)) / int(lengths.sum())
            assert value == pytest.approx(by_rows, rel=1e-9), (layer, term)


def test_a_batch_of_padding_alone_counts_nothing() -> None:
    model, batch = adapted_bert(), text()
    model(**batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])})
    loss = elbo_loss(model)
    loss.backward()
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_an_empty_batch_gives_zero() -> None:
    model = adapted_linear()
    model(torch.zeros(0, 6, dtype=torch.float64))
    assert float(elbo_loss(model)) == 0


@given(arrays(np.float64, 6, elements=st.sampled_from([0.0, 1.0])), arrays(np.float64, 6, elements=st.floats(-9, 9)))
def test_a_masked_mean_is_the_mean_of_what_counts(mask: np.ndarray, values: np.ndarray) -> None:
    weights = TokenWeights(torch.from_numpy(mask), torch.from_numpy(mask).sum())
    expected = values[mask == 1].mean() if mask.any() else 0.0
    assert float(weights.mean(torch.from_numpy(values))) == pytest.approx(expected)


@pytest.mark.parametrize("mask", [None, [1, 1, 0, 1, 1, 0, 1]])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.99])
def test_a_share_of_tokens_gives_an_unbiased_mean(fraction: float, mask: list[int] | None) -> None:
    values = torch.arange(7.0, dtype=torch.float64) ** 2
    counted = None if mask is None else torch.tensor(mask).double()
    weights = TokenWeights(counted, 7 if counted is None else counted.sum())
    draws = []
    for _ in range(2000):
        chosen, sampled = weights.sample(torch.Size((7,)), fraction, values.device)
        assert len(chosen) == math.ceil(fraction * 7)
        assert len(set(chosen.tolist())) == len(chosen)
        draws.append(sampled.mean(values[chosen]))
    draws = torch.stack(draws)
    error = draws.mean() - weights.mean(values)
    assert abs(error) <= 4 * draws.std() / math.sqrt(len(draws)) + 1e-12


@pytest.mark.parametrize("objective", ["fvae", "vae2lat", "reference"])
def test_an_elbo_on_a_share_of_tokens_is_unbiased(without_noise: None, objective: str) -> None:
    model = adapted_linear(objective=objective)
    x = torch.randn(7, 6, dtype=torch.float64)
    model(x)
    full = elbo_loss(model).detach()
    model.peft_config["default"].elbo_token_fraction = 0.4
    draws = []
    for _ in range(400):
        model(x)
        draws.append(elbo_loss(model).detach())
    draws = torch.stack(draws)
    assert draws.std() > 1e-3
    assert abs(draws.mean() - full) < 4 * draws.std() / math.sqrt(len(draws))


# Gradients


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("objective", ["fvae", "vae2lat", "reference"])
def test_the_gradient_is_right_and_reaches_x(objective: str, fraction: float) -> None:
    """Finite differences, with the same noise and the same share of tokens in every evaluation."""
    model = adapted_linear(objective=objective, elbo_token_fraction=fraction)
    parameters = dict(model.base_model.model[0].fvae_lora_vae.named_parameters())

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(5)
        model(x)
        return elbo_loss(model)

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (x, *parameters.values()))
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.any()


def test_the_elbo_trains_the_layers_below() -> None:
    """The gradient of a deeper layer's ELBO arrives at the first layer's B, which its own ELBO never meets."""
    model = adapted_linear(layers=2)
    model(torch.randn(4, 6, dtype=torch.float64))
    elbo_loss(model).backward()
    first, last = model.base_model.model
    assert first.fvae_lora_B["default"].weight.grad.any()
    assert last.fvae_lora_B["default"].weight.grad is None


# Precision


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_has_a_single_precision_elbo(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    """Inputs of 10,000: their squares are beyond fp16. The reference is the same layer in float64."""
    base = nn.Sequential(nn.Linear(32, 4)).to(dtype)
    config = FVAELoraConfig(target_modules=["0"], r=3, elbo_weight=1e-3, decoder_hidden_dims=[7])
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    for name, parameter in model.named_parameters():
        if "hidden0_weight" in name:
            parameter.data.normal_(0, 1e-5)  # posteriors of a sensible size
        if "log_tau" in name:
            parameter.data.fill_(3.0)
    x = (torch.randn(50, 32) * 1e4).clamp(-6e4, 6e4).to(dtype)
    torch.manual_seed(3)
    output = model(x)
    loss = elbo_loss(model)
    (terms,) = elbo_terms(model).values()
    assert output.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    exact = model.double()
    torch.manual_seed(3)
    exact(x.double())
    (expected,) = elbo_terms(exact).values()
    assert terms == pytest.approx(expected, rel=0.02 if not autocast_adapter_dtype else 1e-4, abs=1e-2)


def test_a_float64_model_has_a_float64_elbo() -> None:
    model = adapted_linear()
    model(torch.randn(4, 6, dtype=torch.float64))
    assert elbo_loss(model).dtype == torch.float64


def test_a_large_logvar_is_clamped() -> None:
    """As in the reference, to [-20, 20]: exp stays finite in fp32."""
    model = adapted_linear(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "logvar_bias" in name:
            parameter.data.fill_(1e4)
    model(torch.randn(4, 6))
    (terms,) = elbo_terms(model).values()
    assert all(map(math.isfinite, terms.values()))
    assert terms["kl_z1"] == pytest.approx(0.5 * 3 * (math.exp(20) - 21), rel=1e-3)
