"""Derivatives beyond a plain backward, held to finite differences and to gradients row by row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

from by_hand import adapted, assert_same, gradients
from fvae_lora import add_elbo, elbo_terms
from tiny import adapted_linear, batch_for

pytestmark = pytest.mark.usefixtures("without_noise")
DOUBLE = torch.float64


def linear(**fields: object) -> tuple[PeftModel, Tensor]:
    return adapted_linear(**{"layers": 2, **fields}).train(), torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    """A loss with a penalty on its gradient by the inputs, as of a critic or for robustness."""
    loss = add_elbo(model(x).square().mean(), model)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + slope.square().sum()


def penalised_square(model: nn.Module, x: Tensor) -> Tensor:
    """A gradient that depends on the loss itself reaches the ELBO."""
    loss = add_elbo(model(x).square().mean(), model).square()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + 1e-3 * slope.square().sum()


def steepness(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient by the parameters, as in meta-learning."""
    loss = add_elbo(model(x).square().mean(), model)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return sum(slope.square().sum() for slope in torch.autograd.grad(loss, wanted, create_graph=True))


def at(parameter: nn.Parameter, value: float, function: Callable[[], Tensor]) -> float:
    kept = parameter.data.view(-1)[0].item()
    parameter.data.view(-1)[0] = value
    result = function().item()
    parameter.data.view(-1)[0] = kept
    return result


@pytest.mark.parametrize(
    "fields", [{}, {"elbo_stop_gradient": True, "layers": 1}, {"objective": "reference", "elbo_weight": 0.1}]
)
@pytest.mark.parametrize("loss", [penalised, penalised_square, steepness])
def test_derivatives_of_second_order(loss: Callable[[nn.Module, Tensor], Tensor], fields: dict) -> None:
    model, x = linear(**fields)
    found = gradients(model, lambda: loss(model, x))
    for name, parameter in model.named_parameters():
        if "fvae_lora_" not in name:
            continue
        value, step = parameter.data.view(-1)[0].item(), 1e-6
        up, down = (at(parameter, value + sign * step, lambda: loss(model, x)) for sign in (1, -1))
        assert found[name].view(-1)[0].item() == pytest.approx((up - down) / (2 * step), rel=2e-5, abs=2e-6), name


def test_derivatives_of_second_order_through_checkpointing() -> None:
    model = adapted("bert")
    model.get_base_model().set_attn_implementation("eager")  # torch's fused attention has one derivative alone
    batch = batch_for(model.get_base_model())

    def squared_slopes() -> Tensor:
        wanted = [p for name, p in model.named_parameters() if p.requires_grad and "fvae_lora_" in name]
        slopes = torch.autograd.grad(model(**batch).loss, wanted, create_graph=True)
        return sum(slope.square().sum() for slope in slopes)

    expected = gradients(model, squared_slopes)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.get_base_model().enable_input_require_grads()
    assert_same(gradients(model, squared_slopes), expected)


@pytest.mark.parametrize("own_loss", [False, True])
def test_gradients_by_torch_func(own_loss: bool) -> None:
    model = adapted("bert")
    batch = batch_for(model.get_base_model())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        inputs = batch if own_loss else {name: value for name, value in batch.items() if name != "labels"}
        output = functional_call(model, parameters, (), inputs)
        return output.loss if own_loss else add_elbo(output.logits.square().mean(), model)

    expected = gradients(model, lambda: loss(trained))
    assert_same(grad(loss)({name: p.detach() for name, p in trained.items()}), expected)
    assert elbo_terms(model) == {}
    assert_same(gradients(model, lambda: loss(trained)), expected)


def test_gradients_of_each_row() -> None:
    """As differential privacy wants them."""
    model, x = linear()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return add_elbo(functional_call(model, parameters, (row[None],)).square().mean(), model)

    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(trained, x.detach())
    for i, row in enumerate(x.detach()):
        expected = gradients(model, lambda row=row: add_elbo(model(row[None]).square().mean(), model))
        assert_same({name: value[i] for name, value in found.items()}, expected)


def test_a_directional_derivative_forwards() -> None:
    model, x = linear()

    def loss(x: Tensor) -> Tensor:
        return add_elbo(model(x).square().mean(), model)

    direction = torch.randn_like(x) + 1
    _, found = jvp(loss, (x.detach(),), (direction,))
    (slope,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(found, (slope * direction).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x.detach(), direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, found)


def test_a_hessian() -> None:
    model, x = linear()

    def loss(x: Tensor) -> Tensor:
        return add_elbo(model(x).square().mean(), model)

    found = hessian(loss)(x.detach())
    expected = torch.autograd.functional.hessian(loss, x.detach())
    torch.testing.assert_close(found, expected)
    assert found.any()
