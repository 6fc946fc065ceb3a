"""The hooks on an adapted model: they open and close a forward, and add the ELBO to the loss that the model returns."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .idle import warn_of_idle_layers
from .masks import IGNORED_LABEL, SEQUENCES, TokenMasks, is_encoder_decoder, warn_of_padding
from .recorder import Forward, Recorder, add, check_reached, task_weight

ATTRIBUTE = "_fvae_lora_recorder"


def recorder_of(model: nn.Module) -> Recorder:
    """The recorder of an adapted model; made, with the hooks that it needs, on the first call."""
    recorder: Recorder | None = vars(model).get(ATTRIBUTE)
    if recorder is None:
        recorder = Recorder()
        setattr(model, ATTRIBUTE, recorder)
        model.register_forward_pre_hook(_begin_forward, with_kwargs=True)
        model.register_forward_hook(_end_forward, with_kwargs=True, always_call=True)
    return recorder


def forget(model: nn.Module) -> None:
    """Take recorder and hooks off a model that has no adapted layers any more."""
    if ATTRIBUTE in vars(model):
        delattr(model, ATTRIBUTE)
    for hooks, hook in ((model._forward_pre_hooks, _begin_forward), (model._forward_hooks, _end_forward)):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            del hooks[key]


def _begin_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if torch.compiler.is_compiling() and not model.training:
        getattr(model, ATTRIBUTE).forward = Forward(is_open=False)  # one graph, and what training recorded is gone
        return None
    return _open_forward(model, args, kwargs)


def _end_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    forward: Forward = getattr(model, ATTRIBUTE).forward
    if torch.compiler.is_compiling() and not model.training and not forward.runs:
        return None
    return _close_forward(model, args, kwargs, output)


@torch.compiler.disable(reason="the ELBO joins the loss outside the graph; train without fullgraph=True")
def _open_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if getattr(model, "_is_replica", False):
        raise RuntimeError("FVAE-LoRA does not support torch.nn.DataParallel; use torchrun or accelerate launch")
    recorder: Recorder = getattr(model, ATTRIBUTE)
    inputs = _by_name(model, args, kwargs)
    announced = {} if recorder.micro_batch is None else {"labels": recorder.micro_batch.labels}
    recorder.begin(Forward(TokenMasks.of(model, announced | inputs)))
    num_items = inputs.get("num_items_in_batch")
    if num_items is not None and recorder.loss_uses_num_items is None and torch.is_grad_enabled():
        # Whether the model's own loss divides by this number is not written anywhere: follow its gradient, once.
        probe = torch.tensor(float(num_items), requires_grad=True)
        return args, kwargs | {"num_items_in_batch": probe}
    return None


@torch.compiler.disable(reason="the ELBO joins the loss outside the graph; train without fullgraph=True")
def _close_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    recorder: Recorder = getattr(model, ATTRIBUTE)
    forward = recorder.forward
    forward.is_open = False
    warn_of_idle_layers(model, recorder)
    if not forward.runs:
        return None
    if forward.masks is not None and not recorder.warned_of_padding:
        recorder.warned_of_padding = warn_of_padding(forward.masks)
    inputs = _by_name(model, args, kwargs)
    if (key := _loss_key(output, inputs)) is not None:
        loss = output if key is Ellipsis else output[key]
        share = _share_of_items(model, inputs)
        if share is not None and not _normalised(model, recorder, loss, inputs["num_items_in_batch"]):
            loss = loss * share  # the model returned the mean over this micro-batch alone
        if recorder.micro_batch is None:
            forward.in_loss = True
            loss = add(
                task_weight([forward]) * loss, [forward], {} if share is None else dict.fromkeys(SEQUENCES, share)
            )
        output = _replaced(output, key, loss)
    if recorder.micro_batch is not None:
        recorder.micro_batch.forwards.append(forward)
    _watch(recorder, forward, output)
    return output


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs if args else kwargs


def _watch(recorder: Recorder, forward: Forward, output: Any) -> None:
    """Have a backward say whose it is, as soon as it reaches one of the outputs."""
    # Weak references: an output's graph is part of what the forward holds, and must not hold itself.
    owner, reference = weakref.ref(recorder), weakref.ref(forward)

    def enter(_: Tensor) -> None:
        if (recorder := owner()) is not None:
            recorder.backward = reference()

    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(enter)
    # A compiled region is one node of the graph, layers and ELBO together.
    compiled = [run.negative_elbo.grad_fn for run in forward.all_runs() if not run.attached]
    for node in {id(node): node for node in compiled if node is not None}.values():
        node.register_prehook(lambda _: check_reached(reference))


def _share_of_items(model: nn.Module, inputs: Mapping[str, Any]) -> float | None:
    """This micro-batch's share of the labels of the optimizer's step, counted as transformers' Trainer counts."""
    labels, num_items = inputs.get("labels"), inputs.get("num_items_in_batch")
    if num_items is None or not isinstance(labels, Tensor):
        return None
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not is_encoder_decoder(model)
    if isinstance(inputs.get("shift_labels"), Tensor):
        labels = inputs["shift_labels"]
    elif shifts:
        labels = labels[..., 1:]
    return int((labels != IGNORED_LABEL).sum()) / float(torch.as_tensor(num_items).detach())


def _normalised(model: nn.Module, recorder: Recorder, loss: Tensor, num_items: Any) -> bool:
    """Whether the losses of an optimizer's micro-batches add up as the model returns them."""
    if recorder.loss_uses_num_items is None and isinstance(num_items, Tensor) and num_items.requires_grad:
        if not loss.requires_grad:
            return True
        (gradient,) = torch.autograd.grad(loss, num_items, retain_graph=True, allow_unused=True)
        recorder.loss_uses_num_items = gradient is not None
    # Configurations of sound have this field for other heads as well; not every version has loss_type "ForCTC".
    config: Any = model.config if type(model).__name__.endswith("ForCTC") else None
    summed = config is not None and config.ctc_loss_reduction == "sum"
    return summed or recorder.loss_uses_num_items is not False


def _loss_key(output: Any, inputs: Mapping[str, Any]) -> Any:
    """Where the loss lies in a model's output: a key, an index, `...` for the output itself, ``None`` for nowhere."""
    if isinstance(output, Mapping):
        return "loss" if _is_scalar(output.get("loss")) else None
    names = {name for name, value in inputs.items() if value is not None and value is not False}
    if not any("label" in name or name in ("start_positions", "return_loss") for name in names):
        return None
    if isinstance(output, tuple) and output and _is_scalar(output[0]):
        return 0
    return ... if _is_scalar(output) else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point()


def _replaced(output: Any, key: Any, loss: Tensor) -> Any:
    if key is Ellipsis:
        return loss
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
        return output
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: loss})
    return (loss, *output[1:])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
