"""The adapted layer: ``y = W x + b + c B z1``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import objective
from .config import FVAELoraConfig
from .kernels.run import run
from .objective import Draws, Posterior, TokenWeights
from .recorder import Recorder
from .vae import FVAE, raised

B_STD = 0.02  # of B's initial values, as in the reference


class FVAELoraLayer(nn.Module, BaseTunerLayer):
    r"""A frozen layer with B and the autoencoder whose first encoder takes the place of LoRA's A.

    In training ``y = W x + b + c B z1`` with ``z1 = mean1(x) + sigma1(x) * eps``, and the layer records its ELBO with
    `recorder`. At inference, and in a forward of the model that began without gradients, ``z1 = mean1(x)``: only
    encoder 1's mean and B run.

    Args:
        base_layer: A layer that `features` accepts, or a peft layer around one.
        adapter_name: Name of the first adapter.
        name: Name of the layer inside the adapted model.
        recorder: The adapted model's recorder.
        config: The first adapter's configuration.
        r: Its rank here.
        lora_alpha: Its alpha here.
        quantization: What peft needs to quantise a merged weight again, `peft.utils.get_quantization_kwargs`.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # attributes from peft's base class

    adapter_layer_names = ("fvae_lora_vae", "fvae_lora_B")
    other_param_names = ("r", "scaling")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        name: str,
        recorder: Recorder,
        config: FVAELoraConfig,
        r: int,
        lora_alpha: float,
        quantization: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), **({"get_apply_tensor_subclass": _cannot_requantize} | dict(quantization))
        )
        self.name = name
        self.recorder = recorder
        self.fvae_lora_vae = nn.ModuleDict()
        self.fvae_lora_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.in_features, self.out_features = features(self.get_base_layer())
        self.merged_adapters: list[str] = []
        self.register_load_state_dict_pre_hook(_rename_old_parameters)
        self._added_bias = False  # merging gave the base layer a bias
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def update_layer(self, adapter_name: str, config: FVAELoraConfig, r: int, lora_alpha: float) -> None:
        """Add an adapter, initialised as `FVAELoraConfig.init_weights` says.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            r: Its rank in this layer.
            lora_alpha: Its alpha in this layer.
        """
        self.recorder.training_forwards = 0
        self.r[adapter_name] = r
        # The reference adds 1e-5 to the rank.
        self.scaling[adapter_name] = lora_alpha / (r + 1e-5 if config.objective == "reference" else r)
        self.fvae_lora_vae[adapter_name] = FVAE(config, self.in_features, r).train(self.training)
        self.fvae_lora_B[adapter_name] = _UpProjection(self.out_features, r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def B(self, adapter: str) -> Tensor:  # noqa: N802
        """An adapter's up-projection, (out, r)."""
        weight: Tensor = self.fvae_lora_B[adapter].weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of each active adapter.

        Args:
            x: (..., in).
            *args: For the base layer.
            adapter_names: One adapter for each row of x, ``"__base__"`` for none; inference only.
            **kwargs: For the base layer.

        Returns:
            (..., out), in the base layer's dtype.

        Raises:
            RuntimeError: If an inference-only adapter runs in training mode.
            ValueError: If `adapter_names` are given and the layer is merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, result, adapter_names)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if adapter in self.fvae_lora_B:
                result = result + self.update(adapter, x).to(result.dtype)
        return result

    def _mixed_batch(self, x: Tensor, result: Tensor, adapter_names: list[str]) -> Tensor:
        if self.merged:
            raise ValueError("adapter_names cannot be used with merged adapters; call unmerge_adapter() first")
        for adapter in sorted(set(adapter_names) & set(self.fvae_lora_B)):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
            result = result.index_add(0, rows, self.update(adapter, x[rows]).to(result.dtype))
        return result

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """What an adapter adds to the base layer's output, ``c B z1``; in training its ELBO is recorded.

        Args:
            adapter: The adapter's name.
            x: (..., in).

        Returns:
            (..., out).
        """
        vae: Any = self.fvae_lora_vae[adapter]
        B, config = self.B(adapter), vae.config
        if self.training and config.inference_only:
            raise RuntimeError(f"adapter {adapter!r} is inference_only and cannot be trained; call model.eval()")
        encoder_input = vae.input_dropout(self._cast_input_dtype(x, B.dtype))
        trains = self.training and self.recorder.trains()
        if not (trains or config.sample_at_inference):
            return F.linear(vae.encode_mean("encoder1", encoder_input) * self.scaling[adapter], B)
        if trains and not torch.compiler.is_compiling():
            self.recorder.ran.add(self.name)
        if trains and config.has_residual:
            z1, elbo = run(vae, x, encoder_input, Draws.of(vae, x, self._token_weights(x)))
        else:
            noise = objective.standard_normal(x, vae.rank, B)
            z1, elbo = Posterior.drawn(vae.encode("encoder1", encoder_input), noise).sample, None
        output = F.linear((z1 * self.scaling[adapter]).to(B.dtype), B)
        return output if elbo is None else self.recorder.record(self.name, adapter, output, elbo)

    @property
    def trains(self) -> bool:
        """Whether an active adapter is being trained, so that a training forward should run it."""
        parameters = (parameter for vae in self.active_vaes().values() for parameter in vae.parameters())
        running = self.training and not self.disable_adapters and not self.merged
        return running and any(parameter.requires_grad for parameter in parameters)

    @property
    def records(self) -> bool:
        """Whether an active adapter has an ELBO."""
        return any(vae.config.has_residual for vae in self.active_vaes().values())

    def active_vaes(self) -> dict[str, Any]:
        """The autoencoders that run in the layer's forward, by the adapters' names; none where they are disabled."""
        active = [] if self.disable_adapters else self.active_adapters
        return {name: self.fvae_lora_vae[name] for name in active if name in self.fvae_lora_vae}

    def tokens(self, x: Tensor) -> Tensor:
        """What the autoencoders read of the layer's input: a vector for each token, (..., in)."""
        return x

    def frozen_output(self, x: Tensor) -> Tensor:
        """What the base layer makes of tokens as `tokens` gives them.

        Args:
            x: (tokens, in).

        Returns:
            (tokens, out).
        """
        weight = getattr(self.get_base_layer(), "weight", None)  # some quantised layers have none, or of integers
        if isinstance(weight, Tensor) and weight.is_floating_point():
            x = x.to(weight.dtype)
        output: Tensor = self.base_layer(x)
        return output

    def _token_weights(self, x: Tensor) -> TokenWeights:
        masks = self.recorder.masks()
        return TokenWeights(None, x.shape[:-1].numel()) if masks is None else masks.weights(self.name, x)

    def linear_update(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Weight and bias that a linear encoder adds to the base layer: ``c B M`` and ``c B k``.

        Args:
            adapter: The adapter's name.

        Returns:
            Weight, (out, in), and bias, (out,), in at least fp32.

        Raises:
            ValueError: If the encoder is not linear.
        """
        vae: Any = self.fvae_lora_vae[adapter]
        B = raised(self.B(adapter))
        if vae.encoder_depth:
            raise ValueError(
                f"adapter {adapter!r} cannot be merged: its encoder has a ReLU, so the update is not linear in x; "
                "use fvae_lora.export_for_inference for a small adapter folder, or train with "
                "encoder_hidden_dims=[] (the linear encoder), which merges exactly"
            )
        scaled = B * self.scaling[adapter]
        return scaled @ raised(vae.encoder1_mean_weight), scaled @ raised(vae.encoder1_mean_bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of linear encoders to the base layer; exact: ``W + c B M`` and ``b + c B k``.

        Args:
            safe_merge: Whether to refuse a result that is not finite.
            adapter_names: Adapters to merge; ``None`` means the active ones.

        Raises:
            ValueError: If an encoder is not linear, or, with `safe_merge`, if a result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fvae_lora_B]
        updates = [self.linear_update(name) for name in names]
        for name, (weight, bias) in zip(names, updates, strict=True):
            self._add_to_base(name, weight, bias, safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove merged updates from the base layer."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            weight, bias = self.linear_update(adapter)
            self._add_to_base(adapter, -weight, -bias, safe=False)
        if self._added_bias:
            self.get_base_layer().bias = None
            self._added_bias = False

    def _add_to_base(self, adapter: str, weight: Tensor, bias: Tensor, safe: bool) -> None:
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            base.state_dict()  # bitsandbytes unpacks here what it packed for inference on a CPU and cannot dequantise
        own_weight = self.get_base_weight()
        new_weight = own_weight + transpose(weight, isinstance(base, Conv1D)).reshape(own_weight.shape)
        new_weight = new_weight.to(own_weight.dtype)
        new_bias = (bias if base.bias is None else base.bias.data + bias).to(own_weight.dtype)
        if safe and not (new_weight.isfinite().all() and new_bias.isfinite().all()):
            # The message begins like peft's.
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken: "
                f"the weights of {self.name} are not finite"
            )
        self.set_base_weight(new_weight)
        base = self.get_base_layer()
        if base.bias is None:
            base.bias = nn.Parameter(new_bias, requires_grad=False)
            self._added_bias = True
        else:
            base.bias.data = new_bias

    def __repr__(self) -> str:
        return "fvae_lora." + super().__repr__()


class _UpProjection(nn.Module):
    """An adapter's B, as a module so that the adapter's name stands between two dots in the parameter's name."""

    def __init__(self, out_features: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, r).normal_(0, B_STD))


def _rename_old_parameters(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what version 0.1 wrote; see `fvae_lora.module_names.current_parameter`."""
    for adapter in layer.fvae_lora_B:
        if (weight := state_dict.pop(f"{prefix}fvae_lora_B.{adapter}", None)) is not None:
            state_dict[f"{prefix}fvae_lora_B.{adapter}.weight"] = weight


def _cannot_requantize(*_: Any) -> NoReturn:
    raise ValueError("this quantised layer cannot be merged: the model does not know how it was quantised")


class FVAELoraLinear(FVAELoraLayer):
    """For linear layers; peft finds those that are already adapted by the word "Linear" in the class name."""


class FVAELoraConv2d(FVAELoraLayer):
    """For `torch.nn.Conv2d`: a token is a patch under the kernel, x in R^(channels * height * width)."""

    def tokens(self, x: Tensor) -> Tensor:
        """The patches that the kernel sees, (batch, patches, in)."""
        return self._patches(x)[0]

    def frozen_output(self, x: Tensor) -> Tensor:
        """What the convolution makes of patches, (tokens, in) -> (tokens, out channels)."""
        base = self.get_base_layer()
        return F.linear(x.to(base.weight.dtype), base.weight.flatten(1), base.bias)

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """What an adapter adds to the convolution's output.

        Args:
            adapter: The adapter's name.
            x: (batch, in channels, height, width), or without batch.

        Returns:
            (batch, out channels, height', width'), or without batch.
        """
        patches, (height, width) = self._patches(x)
        output = super().update(adapter, patches).transpose(1, 2).unflatten(-1, (height, width))
        return output if x.dim() == 4 else output.squeeze(0)

    def _patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The patches, (batch, height' * width', in), and how many lie below and beside each other."""
        base = self.get_base_layer()
        batched = x if x.dim() == 4 else x.unsqueeze(0)
        # The convolution itself works out padding "same" and non-zero padding modes, on its input.
        padding = base._reversed_padding_repeated_twice
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        padded = F.pad(batched, padding, mode=mode) if any(padding) else batched
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, dilation, kernel, stride in zip(
                padded.shape[-2:], base.dilation, base.kernel_size, base.stride, strict=True
            )
        )
        return F.unfold(padded, base.kernel_size, base.dilation, 0, base.stride).transpose(1, 2), (height, width)


def features(base_layer: nn.Module) -> tuple[int, int]:
    """Input and output features of a layer that can be adapted; for a convolution those of its patches.

    Args:
        base_layer: `torch.nn.Linear`, transformers' ``Conv1D``, `torch.nn.Conv2d` without groups, or a
            quantised linear layer that peft supports.

    Returns:
        Input and output features.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(base_layer, nn.Linear):
        return base_layer.in_features, base_layer.out_features
    if isinstance(base_layer, Conv1D):
        in_features, out_features = base_layer.weight.shape
        return in_features, out_features
    if isinstance(base_layer, nn.Conv2d) and base_layer.groups == 1:
        return base_layer.in_channels * math.prod(base_layer.kernel_size), base_layer.out_channels
    if isinstance(base_layer, nn.Module) and resolve_quantization_backend(base_layer) is not None:
        return _get_in_out_features(base_layer)
    grouped = " with groups" if isinstance(base_layer, nn.Conv2d) else ""
    raise TypeError(
        f"{type(base_layer).__name__}{grouped}; only Linear, Conv1D and Conv2d without groups can be adapted"
    )


def layer_class(base_layer: nn.Module) -> type[FVAELoraLayer]:
    """The class of the layer that adapts such a base layer."""
    return FVAELoraConv2d if isinstance(base_layer, nn.Conv2d) else FVAELoraLinear
