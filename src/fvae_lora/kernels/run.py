"""A layer's run in training, from its input to z1 and the ELBO, in one step that keeps little for the backward.

Beside the layer's input, which others keep as well, it keeps 4 r numbers a token: both encoders' first hidden layers
and the noise. The backward works out the rest again, the reconstruction included. Both encoders read the input
in one matrix product, and one tensor collects the gradient by it. What has r numbers a token is left to autograd.

`fvae_lora.objective.run` is the plain path, which this one equals, and which runs where it cannot: with dropout inside
the autoencoder, with a trunk for each head, in compiled code, and for derivatives beyond a plain backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import objective
from ..objective import Draws, LayerElbo, Posterior, TokenWeights, closed_forms, coefficients
from ..transforms import is_transforming
from ..vae import FVAE, LOGVAR_RANGE, raised
from .likelihood import LOG_2PI, full_precision

Linear = tuple[Tensor, Tensor]  # weight, (out, in), and bias, (out,)


def run(vae: FVAE, x: Tensor, encoder_input: Tensor, draws: Draws) -> tuple[Tensor, LayerElbo]:
    """What a layer's autoencoder makes of its input, as `fvae_lora.objective.run`.

    Args:
        vae: The layer's autoencoder, with the second encoder and the decoder.
        x: The layer's input and the reconstruction's target, (..., d).
        encoder_input: x after dropout, in the encoders' dtype, (..., d).
        draws: The noise, and which tokens count.

    Returns:
        z1, (..., r), and the ELBO.
    """
    inner_dropout = any(module.training and module.p for module in (vae.encoder_dropout, vae.decoder_dropout))
    if inner_dropout or not vae.config.shared_encoder_trunk or torch.compiler.is_compiling() or is_transforming():
        return objective.run(vae, x, encoder_input, draws)
    call = _Call(vae, draws.weights, x.device.type)
    dropped = encoder_input if vae.input_dropout.training and vae.input_dropout.p else None
    chance = (draws.noise1, draws.noise2, draws.chosen)
    parameters = [getattr(vae, name) for name in call.names]
    z1, negative, weighted, terms = _Run.apply(call, x, dropped, *chance, *parameters)
    return z1, LayerElbo(vae.config, draws.weights, negative, weighted, call.shown, terms)


class _Call:
    """What belongs to a run beside the tensors that its gradient reaches."""

    def __init__(self, vae: FVAE, weights: TokenWeights, device: str) -> None:
        self.vae, self.weights, self.device = vae, weights, device
        self.names = [name for name, _ in vae.named_parameters()]
        has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        self.autocasts = has_autocast and vae.log_tau.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if self.autocasts else vae.log_tau.dtype  # of matrix products
        self.shown: tuple[str, ...] = ()  # names of the terms
        self.mask = None if weights.mask is None else weights.mask.flatten()

    def rows(self, read: Tensor) -> Tensor:
        """What the encoders read, (tokens, d)."""
        return read.reshape(-1, read.shape[-1]).to(self.vae.log_tau.dtype).to(self.dtype)

    def latents(
        self, heads1: Tensor, heads2: Tensor, noise1: Tensor, noise2: Tensor, chosen: Tensor | None
    ) -> tuple[Tensor, Posterior, Posterior, Tensor]:
        """From each encoder's heads side by side: z1, the posteriors of the chosen tokens, what the decoder reads."""
        q1, q2 = (
            Posterior.drawn((raised(mean), raised(logvar).clamp(*LOGVAR_RANGE)), noise.reshape(mean.shape))
            for (mean, logvar), noise in ((heads1.chunk(2, -1), noise1), (heads2.chunk(2, -1), noise2))
        )
        z1, q1 = q1.sample, q1.chosen(chosen)
        return z1, q1, q2, self.vae.fuse(q1.sample, q2.sample)

    def elbo(self, summed: Tensor, q1: Posterior, q2: Posterior) -> LayerElbo:
        """The ELBO, from the likelihood summed over tokens and the posteriors, (tokens, r)."""
        return LayerElbo.of(self.vae.config, self.flat_weights, self.weights.scaled(summed), q1, q2)

    def negative_closed_forms(self, q1: Posterior, q2: Posterior) -> Tensor:
        """The part of the negative ELBO that is not the likelihood."""
        weight = coefficients(self.vae.config)
        terms = closed_forms(weight, self.vae.config, self.flat_weights, q1, q2)
        return -torch.stack([weight[name] * term for name, term in terms.items()]).sum()

    @property
    def flat_weights(self) -> TokenWeights:
        """The weights of the flattened tokens."""
        return TokenWeights(self.mask, self.weights.count)


class _Network:
    """The autoencoder's layers, in the dtype of the matrix products; an encoder's last one is both of its heads."""

    def __init__(self, call: _Call, parameters: Sequence[Tensor]) -> None:
        tensors = dict(zip(call.names, parameters, strict=True))
        self.log_tau = raised(tensors["log_tau"])
        self.names = _names(call.vae.encoder_depth, call.vae.decoder_depth)

        def linear(names: tuple[str, ...]) -> Linear:
            weight, bias = ([tensors[f"{name}_{kind}"].to(call.dtype) for name in names] for kind in ("weight", "bias"))
            return (weight[0], bias[0]) if len(names) == 1 else (torch.cat(weight), torch.cat(bias))

        self.encoder1, self.encoder2, self.decoder = (list(map(linear, names)) for names in self.names.values())

    def first_layers(self, rows: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both encoders' first layers, after the ReLU if another layer follows."""
        (weight1, bias1), (weight2, bias2) = self.encoder1[0], self.encoder2[0]
        if chosen is None:
            both = F.linear(rows, torch.cat([weight1, weight2]), torch.cat([bias1, bias2]))
            first1, first2 = both.split([len(weight1), len(weight2)], 1)
        else:
            first1, first2 = F.linear(rows, weight1, bias1), F.linear(rows[chosen], weight2, bias2)
        return (first1, first2) if len(self.encoder1) == 1 else (first1.relu(), first2.relu())

    def by_parameter(self, part: str, layers: list[Linear]) -> dict[str, Tensor]:
        """The gradients of a part's layers, by the names of the parameters."""
        return {
            f"{name}_{kind}": half
            for names, layer in zip(self.names[part], layers, strict=True)
            for kind, tensor in zip(("weight", "bias"), layer, strict=True)
            for name, half in zip(names, tensor.chunk(len(names)), strict=True)
        }


@cache
def _names(encoder_depth: int, decoder_depth: int) -> dict[str, list[tuple[str, ...]]]:
    """The names of each part's layers in the order in which they run; those of both heads in one."""
    hidden = {
        name: [(f"{name}_hidden{i}",) for i in range(depth)]
        for name, depth in (("encoder1", encoder_depth), ("encoder2", encoder_depth), ("decoder", decoder_depth))
    }
    last = {name: (f"{name}_mean", f"{name}_logvar") for name in ("encoder1", "encoder2")}
    return {name: [*layers, last.get(name, (f"{name}_output",))] for name, layers in hidden.items()}


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, x, dropped, noise1, noise2, chosen, *parameters):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        with full_precision(call.device):
            network = _Network(call, parameters)
            first1, first2 = network.first_layers(call.rows(x if dropped is None else dropped), chosen)
            heads1, heads2 = _heads(first1, network.encoder1)[1], _heads(first2, network.encoder2)[1]
            z1, q1, q2, fused = call.latents(heads1, heads2, noise1, noise2, chosen)
            hidden = _hidden(fused.to(call.dtype), network.decoder[:-1])[-1]
            residual = _residual(x, chosen, hidden, network.decoder[-1])
            counted = residual.new_ones(len(residual)) if call.mask is None else call.mask.to(residual.dtype)
            squares, count = counted @ residual.square_(), len(counted) if call.mask is None else counted.sum()
            constant = network.log_tau.sum() + 0.5 * len(network.log_tau) * LOG_2PI
            summed = -0.5 * (squares * torch.exp(-2 * network.log_tau)).sum() - count * constant
            elbo = call.elbo(summed, q1, q2)
        call.shown = elbo.names
        ctx.call, ctx.count = call, count
        ctx.save_for_backward(x, dropped, noise1, noise2, chosen, first1, first2, squares, *parameters)
        ctx.mark_non_differentiable(elbo.weighted, elbo.terms)
        return z1.reshape(noise1.shape), elbo.negative, elbo.weighted, elbo.terms

    @staticmethod
    def backward(ctx: Any, grad_z1: Tensor | None, grad_elbo: Tensor | None, *_: None):  # type: ignore[no-untyped-def]
        x, dropped, noise1, noise2, chosen, first1, first2, squares, *parameters = ctx.saved_tensors
        call: _Call = ctx.call
        if torch.is_grad_enabled():
            draws = Draws(noise1, noise2, chosen, call.weights)
            by_x, by_dropped, *by_parameters = _differentiable(
                call, draws, (grad_z1, grad_elbo), (x, dropped, *parameters)
            )
            return None, by_x, by_dropped, None, None, None, *by_parameters
        found: dict[str, Tensor] = {}
        stops = call.vae.config.elbo_stop_gradient
        with full_precision(call.device):
            network = _Network(call, parameters)
            (inputs1, heads1), (inputs2, heads2) = _heads(first1, network.encoder1), _heads(first2, network.encoder2)
            heads1, heads2 = heads1.detach().requires_grad_(), heads2.detach().requires_grad_()
            heads = (heads1, heads2)
            with torch.enable_grad():
                z1, q1, q2, fused = call.latents(heads1, heads2, noise1, noise2, chosen)
                closed = call.negative_closed_forms(q1, q2)
            of_task: list[tuple[Tensor, Tensor]] = [] if grad_z1 is None else [(z1, grad_z1.reshape(z1.shape))]
            of_elbo: list[tuple[Tensor, Tensor]] = []
            by_target: Tensor | None = None
            if grad_elbo is not None:
                scale = call.weights.scaled(grad_elbo * call.vae.config.reconstruction_weight)
                precision = torch.exp(-2 * network.log_tau)
                found["log_tau"] = (ctx.count - squares * precision) * scale
                inputs = _hidden(fused.detach().to(call.dtype), network.decoder[:-1])
                by_target = _residual(x, chosen, inputs[-1], network.decoder[-1]).mul_(precision * scale)
                if call.mask is not None:
                    by_target *= call.mask.to(by_target.dtype)[:, None]
                # The gradient by the reconstruction is the negative; what comes of it is smaller to negate.
                by_fused, layers = _backward(by_target.to(call.dtype), inputs, network.decoder)
                found |= network.by_parameter("decoder", [(-weight, -bias) for weight, bias in layers])
                of_elbo = [(closed, grad_elbo), (fused, -by_fused.to(fused.dtype))]
            by_heads = _slopes([*of_task, *of_elbo], heads)
            by_first1, layers1 = _of_encoder(by_heads[0], first1, inputs1, network.encoder1)
            by_first2, layers2 = _of_encoder(by_heads[1], first2, inputs2, network.encoder2)
            rows = call.rows(x if dropped is None else dropped)
            if chosen is None:
                both = torch.cat([by_first1, by_first2], 1).t() @ rows
                weight1, weight2 = both.split([by_first1.shape[1], by_first2.shape[1]])
            else:
                weight1, weight2 = by_first1.t() @ rows, by_first2.t() @ rows[chosen]
            found |= network.by_parameter("encoder1", [(weight1, by_first1.sum(0)), *layers1])
            found |= network.by_parameter("encoder2", [(weight2, by_first2.sum(0)), *layers2])
            if stops:  # then the task's gradient alone goes on to x
                by_task = _of_encoder(_slopes(of_task, heads)[0], first1, inputs1, network.encoder1)[0]
                by_read = _by_read(network, by_task, None, None, chosen) if of_task else None
                by_target = None
            else:
                by_read = _by_read(network, by_first1, by_first2, by_target if dropped is None else None, chosen)
            by_x = by_read if dropped is None else _spread(by_target, chosen, len(rows))
        by_dropped = None if dropped is None else by_read
        return (
            None,
            None if by_x is None else by_x.reshape(x.shape).to(x.dtype),
            None if by_dropped is None else by_dropped.reshape(x.shape).to(dropped.dtype),
            None,
            None,
            None,
            *(
                found[name].to(p.dtype) if name in found else None
                for name, p in zip(call.names, parameters, strict=True)
            ),
        )


def _residual(x: Tensor, chosen: Tensor | None, hidden: Tensor, output: Linear) -> Tensor:
    """The target minus its reconstruction, (chosen tokens, d), in at least fp32; a new tensor."""
    target, (weight, bias) = x.reshape(-1, x.shape[-1]), output
    target = target if chosen is None else target[chosen]
    if target.dtype == hidden.dtype and raised(hidden) is hidden:
        return (target - bias).addmm_(hidden, weight.t(), alpha=-1)  # half the passes over (tokens, d)
    reconstruction = raised(F.linear(hidden, weight, bias))
    return torch.sub(target, reconstruction, out=reconstruction)


def _hidden(x: Tensor, layers: Sequence[Linear]) -> list[Tensor]:
    """The input of each layer, and the output of the last; a ReLU follows each of them."""
    inputs = [x]
    for weight, bias in layers:
        inputs.append(F.linear(inputs[-1], weight, bias).relu_())
    return inputs


def _heads(first: Tensor, encoder: Sequence[Linear]) -> tuple[list[Tensor], Tensor]:
    """What an encoder's layers read after the first one, and its heads side by side."""
    if len(encoder) == 1:
        return [], first
    inputs = _hidden(first, encoder[1:-1])
    return inputs, F.linear(inputs[-1], *encoder[-1])


def _backward(grad: Tensor, inputs: Sequence[Tensor], layers: Sequence[Linear]) -> tuple[Tensor, list[Linear]]:
    """The gradients by the first layer's input and by the layers, from that by the last one's output."""
    found: list[Linear] = []
    for i in reversed(range(len(layers))):
        found.insert(0, (grad.t() @ inputs[i], grad.sum(0)))
        grad = grad @ layers[i][0]
        grad = _through_relu(grad, inputs[i]) if i else grad
    return grad, found


def _through_relu(grad: Tensor, output: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, output, 0)


def _of_encoder(
    by_heads: Tensor, first: Tensor, inputs: Sequence[Tensor], encoder: Sequence[Linear]
) -> tuple[Tensor, list[Linear]]:
    """The gradients by an encoder's first layer's output, before the ReLU, and by the layers after it."""
    if len(encoder) == 1:
        return by_heads, []
    grad, layers = _backward(by_heads, inputs, encoder[1:])
    return _through_relu(grad, first), layers


def _slopes(outputs: Sequence[tuple[Tensor, Tensor]], heads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients by both encoders' heads, from some outputs and the gradients by these."""
    if not outputs:
        return [torch.zeros_like(h) for h in heads]
    values, grads = zip(*outputs, strict=True)
    return torch.autograd.grad(values, heads, grads, retain_graph=True, materialize_grads=True)


def _by_read(
    network: _Network,
    by_first1: Tensor,
    by_first2: Tensor | None,
    by_target: Tensor | None,
    chosen: Tensor | None,
) -> Tensor:
    """The gradient by what the encoders read, (tokens, d), with that by the target, whose memory it may take."""
    weight1, weight2 = network.encoder1[0][0], network.encoder2[0][0]
    if by_first2 is None:
        return by_first1 @ weight1
    if chosen is None:
        return _plus_product(by_target, torch.cat([by_first1, by_first2], 1), torch.cat([weight1, weight2]))
    every = by_first1 @ weight1
    return every.index_add_(0, chosen, _plus_product(by_target, by_first2, weight2).to(every.dtype))


def _plus_product(tensor: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    if tensor is None:
        return left @ right
    return tensor.addmm_(left, right) if tensor.dtype == left.dtype else tensor.add_(left @ right)


def _spread(by_target: Tensor | None, chosen: Tensor | None, tokens: int) -> Tensor | None:
    """The gradient by the target in its place among those of all tokens, (tokens, d)."""
    if by_target is None or chosen is None:
        return by_target
    return by_target.new_zeros(tokens, by_target.shape[1]).index_copy_(0, chosen, by_target)


class _Plain(nn.Module):
    """The plain path as a function of the parameters."""

    def __init__(self, vae: FVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, encoder_input: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        z1, elbo = objective.run(self.vae, x, encoder_input, draws)
        return z1, elbo.negative


def _differentiable(
    call: _Call, draws: Draws, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients by x, what dropout left of it, and the parameters, with a graph of their own."""
    # Views, so that the gradients are those of this run alone, where one input depends on another.
    views: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, dropped, *parameters = views
    encoder_input = x.to(call.vae.log_tau.dtype) if dropped is None else dropped
    by_name = {f"vae.{name}": tensor for name, tensor in zip(call.names, parameters, strict=True)}
    with torch.autocast(call.device, call.dtype) if call.autocasts else full_precision(call.device):
        outputs = functional_call(_Plain(call.vae), by_name, (x, encoder_input, draws))
    values, reached = zip(*((v, grad) for v, grad in zip(outputs, grads, strict=True) if grad is not None), strict=True)
    needed = [v for v, tensor in zip(views, inputs, strict=True) if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(values, needed, reached, create_graph=True, allow_unused=True))
    return [next(found) if tensor is not None and tensor.requires_grad else None for tensor in inputs]
