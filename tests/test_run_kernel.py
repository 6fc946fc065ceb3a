"""The fused run of a layer is the plain one, in z1, each term and each gradient, and keeps little for the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fvae_lora import FVAELoraConfig, objective
from fvae_lora.kernels import run as kernel
from fvae_lora.objective import Draws, LayerElbo, TokenWeights
from fvae_lora.vae import FVAE

DOUBLE = torch.float64
D, R, SHAPE = 7, 3, (2, 5)
FIELDS: dict[str, dict[str, Any]] = {
    "the paper's": {"kl_weight": 2.0, "reconstruction_weight": 0.7, "factorization_weight": 0.3},
    "VAE2LAT": {"objective": "vae2lat"},
    "the reference's": {"objective": "reference", "factorization_weight_z1": 0.4, "decoder_hidden_dims": [6, 5, 4]},
    "a linear encoder": {"encoder_hidden_dims": []},
    "a linear autoencoder": {"encoder_hidden_dims": [], "decoder_hidden_dims": []},
    "deep encoders": {"encoder_hidden_dims": [5, 4]},
    "another dimension of z2": {"residual_dim": 2},
    "averaged latents": {"latent_fusion": "average"},
    "a share of the tokens": {"elbo_token_fraction": 0.4},
    "a gradient that stops": {"elbo_stop_gradient": True},
    "a gradient that stops, a share": {"elbo_stop_gradient": True, "elbo_token_fraction": 0.4},
    "dropout": {"lora_dropout": 0.5},
    "dropout, a share": {"lora_dropout": 0.5, "elbo_token_fraction": 0.4},
    "dropout and a gradient that stops": {"lora_dropout": 0.5, "elbo_stop_gradient": True},
}
MASKS: dict[str, Callable[[], TokenWeights]] = {
    "every token": lambda: TokenWeights(None, 10),
    "some padding": lambda: weights((torch.arange(10) % 3 != 1).to(DOUBLE)),
    "nothing but padding": lambda: weights(torch.zeros(10, dtype=DOUBLE)),
}
Path = Callable[[FVAE, Tensor, Tensor, Draws], tuple[Tensor, LayerElbo]]
Parts = tuple[float, float]  # of a loss: the weight of what z1 leads to, and that of the ELBO
BOTH: Parts = (1.0, -0.3)
ELSEWHERE = [{"decoder_dropout": 0.1}, {"encoder_dropout": 0.1}, {"shared_encoder_trunk": False}]


def weights(mask: Tensor) -> TokenWeights:
    return TokenWeights(mask.reshape(SHAPE), mask.sum())


def autoencoder(dtype: torch.dtype = DOUBLE, **fields: Any) -> FVAE:
    config = FVAELoraConfig(**{"r": R, "decoder_hidden_dims": [6], "init_weights": False, **fields})
    vae = FVAE(config, D, R).to(dtype)
    nn.init.normal_(vae.log_tau, std=0.3)  # type: ignore[arg-type]
    return vae


def gradients(
    path: Path, vae: FVAE, x: Tensor, dropped: Tensor | None, draws: Draws, parts: Parts = BOTH
) -> tuple[dict[str, Tensor], LayerElbo, Tensor]:
    """By name: of the parameters, of x and of what dropout left of it; of a loss of both of z1 and the ELBO."""
    inputs = {"x": x.detach().clone().requires_grad_()}
    if dropped is not None:
        inputs["dropped"] = dropped.detach().clone().requires_grad_()
    encoder_input = inputs.get("dropped", inputs["x"].to(vae.log_tau.dtype))
    z1, elbo = path(vae, inputs["x"], encoder_input, draws)
    weight = torch.linspace(-1, 1, z1.numel(), dtype=z1.dtype).reshape(z1.shape)
    loss = parts[0] * (weight * z1).sum() + parts[1] * elbo.negative
    inputs |= dict(vae.named_parameters())
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {name: g for name, g in zip(inputs, found, strict=True) if g is not None}, elbo, z1


def assert_equal(
    vae: FVAE,
    x: Tensor,
    dropped: Tensor | None,
    draws: Draws,
    parts: Parts = BOTH,
    **tolerance: Any,
) -> None:
    expected, elbo, z1 = gradients(objective.run, vae, x, dropped, draws, parts)
    found, fused_elbo, fused_z1 = gradients(kernel.run, vae, x, dropped, draws, parts)
    assert "_Run" in type(fused_elbo.negative.grad_fn).__name__, "the plain path ran twice"
    torch.testing.assert_close(fused_z1, z1, **tolerance)
    assert fused_elbo.names == elbo.names
    for name in ("negative", "weighted", "terms"):
        torch.testing.assert_close(getattr(fused_elbo, name), getattr(elbo, name), **tolerance)
    for name in expected.keys() | found.keys():
        zero = torch.zeros_like({"x": x, "dropped": dropped}.get(name, dict(vae.named_parameters()).get(name)))
        torch.testing.assert_close(found.get(name, zero), expected.get(name, zero), msg=name, **tolerance)


def case(fields: str, mask: str = "every token") -> tuple[FVAE, Tensor, Tensor | None, Draws]:
    vae, x = autoencoder(**FIELDS[fields]), torch.randn(*SHAPE, D, dtype=DOUBLE)
    dropped = vae.input_dropout(x) if vae.config.lora_dropout else None
    return vae, x, dropped, Draws.of(vae, x, MASKS[mask]())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fields", FIELDS)
def test_value_and_gradients_equal_the_plain_path(fields: str, mask: str) -> None:
    assert_equal(*case(fields, mask), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("parts", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("fields", FIELDS)
def test_the_task_or_the_elbo_alone(fields: str, parts: Parts) -> None:
    assert_equal(*case(fields, "some padding"), parts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fields", ["the paper's", "a share of the tokens", "a gradient that stops"])
def test_a_backward_of_one_part_and_then_of_the_other(fields: str) -> None:
    """Whose gradients add up to those of both."""
    vae, x, _, draws = case(fields)
    expected, *_ = gradients(objective.run, vae, x, None, draws, (1.0, 1.0))
    z1, elbo = kernel.run(vae, x, x, draws)
    (torch.linspace(-1, 1, z1.numel(), dtype=DOUBLE).reshape(z1.shape) * z1).sum().backward(retain_graph=True)
    elbo.negative.backward()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_gradients_equal_finite_differences() -> None:
    vae, x, _, draws = case("the paper's", "some padding")

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        z1, elbo = kernel.run(vae, x, x, draws)
        return z1.square().sum() + elbo.negative

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), *vae.parameters()))


def test_a_part_of_the_parameters_may_be_frozen() -> None:
    vae, x, _, draws = case("the paper's")
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_("decoder" in name)
    _, elbo = kernel.run(vae, x, x, draws)
    elbo.negative.backward()
    assert {name for name, p in vae.named_parameters() if p.grad is not None} == {
        name for name, _ in vae.named_parameters() if "decoder" in name
    }


@pytest.mark.parametrize("fields", ["the paper's", "a share of the tokens", "dropout", "a gradient that stops"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half", ["input", "parameters", "autocast"])
def test_half_precision_is_within_its_rounding_of_double(half: str, dtype: torch.dtype, fields: str) -> None:
    """Of the model's activations, of everything, or by autocast: the fused path errs as little as the plain one."""
    vae = autoencoder(dtype if half == "parameters" else torch.float32, **FIELDS[fields])
    x = torch.randn(4, 50, D)
    x = x if half == "autocast" else x.to(dtype)
    dropped = vae.input_dropout(x.to(vae.log_tau.dtype)) if vae.config.lora_dropout else None
    draws = Draws.of(vae, x, TokenWeights(None, 200))
    with torch.autocast("cpu", dtype, enabled=half == "autocast"):
        plain, *_ = gradients(objective.run, vae, x, dropped, draws)
        fused, fused_elbo, _ = gradients(kernel.run, vae, x, dropped, draws)
    assert fused_elbo.negative.dtype == torch.float32
    exact_dropped = None if dropped is None else dropped.double()
    exact_draws = Draws(draws.noise1.double(), draws.noise2.double(), draws.chosen, draws.weights)
    exact, exact_elbo, _ = gradients(objective.run, vae.double(), x.double(), exact_dropped, exact_draws)
    torch.testing.assert_close(fused_elbo.terms.double(), exact_elbo.terms, rtol=0.02, atol=0.02)
    for name, expected in exact.items():
        assert fused[name].dtype == plain[name].dtype
        error, of_plain = ((found[name].double() - expected).norm() for found in (fused, plain))
        assert error <= 2 * of_plain + 4 * torch.finfo(dtype).eps * expected.norm(), name


@pytest.mark.parametrize("fields", ["the paper's", "a share of the tokens", "a gradient that stops"])
def test_beside_the_input_a_few_numbers_of_each_token_are_kept(fields: str) -> None:
    tokens, width = 500, 400
    vae = FVAE(FVAELoraConfig(r=R, decoder_hidden_dims=[50], **FIELDS[fields]), width, R)
    x, kept = torch.randn(tokens, width, requires_grad=True), {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in {p.data_ptr() for p in (x, *vae.parameters())}:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes() / tensor.element_size()
        return tensor

    draws = Draws.of(vae, x, TokenWeights(None, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kernel.run(vae, x, x, draws)
    assert sum(kept.values()) <= (4 * R + 1) * tokens + width


@pytest.mark.parametrize("fields", ELSEWHERE)
def test_what_it_cannot_do_runs_by_the_plain_path(fields: dict[str, Any]) -> None:
    vae, x = autoencoder(**fields), torch.randn(4, D, dtype=DOUBLE)
    _, elbo = kernel.run(vae, x, x, Draws.of(vae, x, TokenWeights(None, 4)))
    assert "_Run" not in type(elbo.negative.grad_fn).__name__
    elbo.negative.backward()
