"""The fused likelihood is the plain one, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, Normal

from fvae_lora.kernels.likelihood import log_likelihood, summed_log_likelihood

D, H = 7, 4
SHAPES = [(5,), (2, 3), (1,), (2, 3, 2)]
MASKS: dict[str, Callable[[tuple[int, ...]], Tensor | None]] = {
    "every token": lambda _: None,
    "some padding": lambda shape: (torch.arange(torch.Size(shape).numel()) % 3 != 1).double().reshape(shape),
    "a sample's weights": lambda shape: torch.rand(shape, dtype=torch.float64) * 3,
    "nothing but padding": lambda shape: torch.zeros(shape, dtype=torch.float64),
}


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(*shape, D), (*shape, H), (D, H), (D,), (D,)]
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def plain(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, log_tau: Tensor, mask: Tensor | None) -> Tensor:
    per_token = log_likelihood(x, F.linear(hidden, weight, bias), log_tau)
    return per_token.sum() if mask is None else (per_token * mask).sum()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_equal_the_plain_path(shape: tuple[int, ...], mask: str) -> None:
    inputs, weights = arguments(shape), MASKS[mask](shape)
    values = [path(*inputs, weights) for path in (plain, summed_log_likelihood)]
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-10)
    expected, fused = (torch.autograd.grad(value * -0.3, inputs) for value in values)
    for ours, theirs, name in zip(fused, expected, ("x", "hidden", "weight", "bias", "log_tau"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)


def test_gradients_equal_finite_differences() -> None:
    mask = MASKS["some padding"]((2, 3))
    assert torch.autograd.gradcheck(lambda *inputs: summed_log_likelihood(*inputs, mask), arguments((2, 3)))


def test_the_plain_path_is_a_diagonal_gaussians() -> None:
    x, hidden, weight, bias, log_tau = arguments((4,))
    mean = F.linear(hidden, weight, bias)
    expected = Independent(Normal(mean, log_tau.exp()), 1).log_prob(x)
    torch.testing.assert_close(log_likelihood(x, mean, log_tau), expected, rtol=1e-12, atol=1e-12)


def test_a_part_of_the_inputs_may_be_frozen() -> None:
    x, hidden, weight, bias, log_tau = arguments((4,))
    summed_log_likelihood(x.detach(), hidden, weight, bias.detach(), log_tau, None).backward()
    assert x.grad is None
    assert bias.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    """The sum of squares is far beyond the largest half-precision number; so is that of the gradients' terms."""
    x, hidden, weight, bias, log_tau = arguments((200,), dtype)
    x = (x.detach().float() * 1e4).requires_grad_()
    value = summed_log_likelihood(x, hidden, weight, bias, log_tau, None)
    assert value.dtype == torch.float32
    exact = plain(*(t.double() for t in (x, hidden, weight, bias, log_tau)), None)
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=0)
    gradients = torch.autograd.grad(value * 1e-6, (x, hidden, weight, bias, log_tau))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_sum_over_features(dtype: torch.dtype) -> None:
    """With a decoder that returns 0 no matrix product rounds anything: the likelihood must be exact to fp32."""
    x, hidden, _, _, log_tau = arguments((20,), torch.float32)
    x = x.detach() * 1e3
    weight, bias = torch.zeros(D, H), torch.zeros(D)
    with torch.autocast("cpu", dtype=dtype):
        value = summed_log_likelihood(x, hidden, weight, bias, log_tau, None)
    exact = plain(*(t.double() for t in (x, hidden, weight, bias, log_tau)), None)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
