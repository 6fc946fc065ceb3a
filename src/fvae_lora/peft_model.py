"""The tuner: finds the target modules and replaces them by `FVAELoraLayer`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from torch import nn

from . import adapter_folder
from .config import FVAELoraConfig
from .hooks import recorder_of, remove_hooks, run_hooks_on_forward
from .layer import FVAELoraLayer, features, layer_class
from .load_options import LoadOptions
from .module_names import abbreviated, current_name, current_parameter, is_all_linear, resolve_targets, warn_of_experts
from .vae import FVAE


class FVAELoraModel(BaseTuner):
    """Adapts a model with FVAE-LoRA; created by `peft.get_peft_model` and similar functions, not by hand.

    Args:
        model: The model to be adapted.
        peft_config: Configuration, or configurations by adapter name.
        adapter_name: Name of the adapter to add.
        **kwargs: As in `peft.tuners.tuners_utils.BaseTuner`.

    Raises:
        ValueError: If a target matches nothing or cannot be adapted, or stored weights do not fit the model, which
            then stays unchanged.
    """

    prefix = "fvae_lora_"
    tuner_layer_cls = FVAELoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        # `PeftModel` passes a dict; injecting into a model passes the configuration itself. An injected model keeps
        # its mode: in eval mode nothing may start to sample. A `PeftModel` starts in training mode, even over a base
        # in eval mode, and adapters added later follow it.
        object.__setattr__(self, "_keep_mode", isinstance(peft_config, PeftConfig))  # before nn.Module.__init__
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if self._keep_mode:
            run_hooks_on_forward(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the adapted model so that its hooks run: peft before 0.21 called its `forward` without them."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: FVAELoraConfig, model_config: dict[str, Any]) -> FVAELoraConfig:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        assert peft_config.target_modules is not None
        if not (is_all_linear(peft_config.target_modules) or peft_config.target_modules == DUMMY_TARGET_MODULES):
            peft_config.target_modules = resolve_targets(self.model, peft_config.target_modules)
        return peft_config

    def _prepare_model(self, peft_config: FVAELoraConfig, model: nn.Module) -> None:
        """Refuse what cannot work, before the first layer is replaced."""
        if peft_config.inference_only and not peft_config.inference_mode:
            raise ValueError("inference_only adapters cannot be trained; load this one with is_trainable=False")
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            return
        resolved = _maybe_include_all_linear_layers(copy.copy(peft_config), model)
        modules = dict(model.named_modules())
        inside_adapters = tuple(f"{name}." for name, module in modules.items() if isinstance(module, FVAELoraLayer))
        targets = {
            name: _base(module)
            for name, module in modules.items()
            if name and not name.startswith(inside_adapters) and self._check_target_module_exists(resolved, name)
        }
        for name, module in targets.items():
            self._check_target_module_compatiblity(resolved, model, name.rpartition(".")[2])
            _check_supported(name, module)
        self._check_names_of_adapters(targets)
        if peft_config.checkpoint_shapes == {} and peft_config.inference_mode:
            raise ValueError("the adapter's folder holds no adapter_model.safetensors: its weights are missing")
        if peft_config.checkpoint_shapes:
            self._check_checkpoint(peft_config, model, targets)
        if not peft_config.inference_mode:
            warn_of_experts(model, peft_config.target_modules)

    def _check_target_module_compatiblity(self, _: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Refuse what peft refuses for LoRA: layers that Mamba's kernels never call."""
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, target_name)
        except ValueError as error:
            raise ValueError(f"target_modules: {str(error).partition('] ')[2] or error}") from None

    def _check_names_of_adapters(self, targets: Iterable[str]) -> None:
        """Refuse what peft would lose in silence: weights with another adapter's name in theirs are not saved."""
        layers = [module for module in self.model.modules() if isinstance(module, FVAELoraLayer)]
        adapters = {*self.peft_config, *(adapter for layer in layers for adapter in layer.fvae_lora_B)}
        if len(adapters) == 1:
            return
        for target in [*targets, *(layer.name for layer in layers)]:
            if clash := sorted(adapters.intersection(target.split("."))):
                raise ValueError(
                    f"adapter name {clash[0]!r} is part of the name of {target}, whose weights would be missing in the "
                    "folders of the model's other adapters; choose another name"
                )

    def _check_checkpoint(self, config: FVAELoraConfig, model: nn.Module, targets: dict[str, nn.Module]) -> None:
        options = LoadOptions.from_running_call() or LoadOptions()
        found = {}
        for key, shape in (config.checkpoint_shapes or {}).items():
            layer, separator, rest = options.renamed(key).partition(f".{self.prefix}")
            found[current_parameter(current_name(model, layer) + separator + rest) if separator else layer] = shape
        expected: dict[str, tuple[int, ...]] = {}
        for name, module in targets.items():
            in_features, out_features = features(module)
            r, _ = rank_and_alpha(config, name)
            with torch.device("meta"):
                parameters = FVAE(config, in_features, r).named_parameters()
            expected |= {f"{name}.{self.prefix}vae.{key}": tuple(value.shape) for key, value in parameters}
            expected[f"{name}.{self.prefix}B.weight"] = (out_features, r)
        # With a key_mapping, peft reports the names that do not fit and loads the others.
        if not options.key_mapping:
            adapter_folder.check_names(found, expected, self.prefix, model)
        if not options.ignore_mismatched_sizes:
            adapter_folder.check_shapes(found, expected, model)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, *, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Rename what version 0.1 wrote, with peft 0.21 and later; with earlier versions the layers do it."""
        state_dict = {current_parameter(name): value for name, value in state_dict.items()}
        remapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(state_dict=state_dict, **kwargs)
        return remapped

    def _create_and_replace(
        self,
        peft_config: FVAELoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        r, lora_alpha = rank_and_alpha(peft_config, current_key)
        if isinstance(target, FVAELoraLayer):
            target.update_layer(adapter_name, peft_config, r, lora_alpha)
            return
        base = _base(target)
        _check_supported(current_key, base)
        quantization = get_quantization_kwargs(self.model)
        layer = layer_class(base)(
            target, adapter_name, current_key, recorder_of(self.model), peft_config, r, lora_alpha, quantization
        )
        layer.train(target.training if self._keep_mode else self.training)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, FVAELoraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading: the module already has its weights. The weights of trained tokens that peft passes here are
            # not a parameter.
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Pass ``adapter_names``, one adapter for each row of a batch, to the layers."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be used in training mode; call model.eval()")
        known = {"__base__"}.union(*(m.fvae_lora_B for m in self.modules() if isinstance(m, FVAELoraLayer)))
        if unknown := sorted(set(adapter_names) - known):
            raise ValueError(f"adapter_names: there is no adapter {', '.join(unknown)}")

        def pass_on(_: nn.Module, args: Any, layer_kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # Beam search repeats each row of the batch; some models fold the sequence into it.
            repeats, rest = divmod(len(args[0]), len(adapter_names))
            if rest:
                raise ValueError(f"adapter_names has {len(adapter_names)} entries for a batch of {len(args[0])}")
            names = [name for name in adapter_names for _ in range(repeats)]
            return args, layer_kwargs | {"adapter_names": names}

        by_row = (FVAELoraLayer, AuxiliaryTrainingWrapper)  # the latter for modules_to_save and trained tokens
        modules = [module for module in self.modules() if isinstance(module, by_row)]
        handles = [module.register_forward_pre_hook(pass_on, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [module for module in self.model.modules() if isinstance(module, FVAELoraLayer)]
        without_bias = [layer.name for layer in layers if _base(layer).bias is None]
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge and without_bias:
            # transformers ignores keys that are not in the model's class.
            warnings.warn(
                f"merging gives a bias to {abbreviated(without_bias)}; {type(model).__name__} has none there, so "
                "its from_pretrained would leave the saved bias out",
                stacklevel=3,
            )
        remove_hooks(model)
        return model


def _base(module: nn.Module) -> nn.Module:
    base: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base


def rank_and_alpha(config: FVAELoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of a module, after the configuration's patterns.

    Args:
        config: The adapter's configuration.
        name: Full name of the module.

    Returns:
        r and lora_alpha; the latter is r unless the configuration sets it.
    """
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    default = r if config.lora_alpha is None else config.lora_alpha
    return r, config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), default)


def _check_supported(name: str, module: nn.Module) -> None:
    try:
        features(module)
    except TypeError as error:
        raise ValueError(f"target_modules: {name} is a {error}") from None
