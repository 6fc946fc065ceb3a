"""The configuration of FVAE-LoRA: peft's usual fields, the VAE's architecture, and the weights of its objective."""

from __future__ import annotations

import os
import re
import reprlib
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from . import adapter_folder, module_names

CHOICES = {
    "objective": ("fvae", "vae2lat", "reference"),
    "latent_fusion": ("concat", "average"),
    "layer_reduction": ("sum", "mean"),
    "bias": ("none", "all", "fvae_lora_only"),
}
FLAGS = (
    "shared_encoder_trunk",
    "elbo_stop_gradient",
    "sample_at_inference",
    "inference_only",
    "inference_mode",
    "fan_in_fan_out",
    "ensure_weight_tying",
    "init_weights",
)
MAX_DIMENSION = 2**20  # anything larger is a mistake, or meant to exhaust the memory of whoever loads it
AUTO_LIBRARIES = ("transformers", "sentence_transformers", "diffusers")
PEFT_SAVES_BIASES = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21)


@dataclass
class FVAELoraConfig(PeftConfig):
    r"""Configuration of FVAE-LoRA ("Latent Space Factorization in LoRA", arXiv 2510.19640).

    An adapted layer computes ``y = W x + b + c B z1`` with ``z1 ~ q1(z1 | x)`` in training and ``z1 = mean1(x)``
    at inference. Training adds to the task loss ``- elbo_weight * sum over layers of L_FVAE``, where, per token,
    ``L_FVAE = alpha E[log p(x | z1, z2)] - beta KL(q1 || p1) + delta E[log p2(z2) - log p1(z1)]``.
    The defaults are the paper's profile; `fvae_lora.FVAEPEFTConfig` gives that of the reference implementation.

    Args:
        r: Dimension of z1, LoRA's rank.
        residual_dim: Dimension of z2; ``None`` means `r`.
        lora_alpha: The scale is ``c = lora_alpha / r``; ``None`` means `r`, so c = 1.
        lora_dropout: Dropout on the encoders' input, in [0, 1). The reconstruction's target stays the raw x.
        encoder_hidden_dims: Widths of the encoders' hidden layers, each followed by a ReLU; ``None`` means ``[r]``.
            ``[]`` gives a linear encoder, the only kind that can be merged into W.
        encoder_dropout: Dropout after each ReLU of the encoders, in [0, 1).
        shared_encoder_trunk: Whether the heads for mean and log-variance share the hidden layers.
        decoder_hidden_dims: Widths of the decoder's hidden layers, each followed by a ReLU.
        decoder_dropout: Dropout after each ReLU of the decoder, in [0, 1).
        latent_fusion: What the decoder reads: ``"concat"`` is [z1; z2], ``"average"`` is (z1 + z2) / 2, which needs
            ``residual_dim == r``. The reference implementation has both.
        residual_prior_mean: m of the prior p2 = N(m, s^2 I).
        residual_prior_std: s of the prior p2, positive.
        objective: ``"fvae"``; ``"vae2lat"``, the ablation with KL(q2 || p2) in place of the factorisation term (with
            ``kl_weight=1`` the paper's VAE2LAT, otherwise its beta-VAE2LAT); or ``"reference"``, the objective of the
            reference implementation.
        elbo_weight: lambda. At 0 the second encoder and the decoder are neither built nor run.
        reconstruction_weight: alpha.
        kl_weight: beta, the weight of every KL term. At 1 nothing holds z1's mean near 0 and the regulariser is
            unbounded in sigma1, hence the default of 10 (the paper uses 1 or 10).
        factorization_weight: delta.
        factorization_weight_z1: Weight of mean(z1^2), for ``objective="reference"`` alone; ``None`` means delta.
        factorization_weight_z2: Weight of mean((z2 - m)^2), for ``objective="reference"`` alone; ``None`` means
            delta.
        task_weight: Multiplies the task loss in training, positive.
        layer_reduction: ``"sum"`` or ``"mean"`` over the adapted layers.
        elbo_stop_gradient: Whether the gradient of a layer's ELBO stops at the layer's input x, so that it trains
            only that layer's autoencoder. ``False``, as in the paper, lets it change the layers below as well, which
            are then rewarded for producing inputs that are easy to reconstruct.
        elbo_token_fraction: Share of tokens, in (0, 1], on which the ELBO is estimated, without bias: less time and
            memory for a noisier ELBO.
        sample_at_inference: Draw z1 from q1 in eval mode too, instead of taking its mean: predictions then vary, as a
            measure of uncertainty.
        inference_only: Only encoder 1's mean and B, as `fvae_lora.export_for_inference` writes them; cannot be trained.
        target_modules: Names, or a regular expression, of the modules to adapt, or ``"all-linear"``; ``None`` means
            peft's default for the architecture. A name that the model has under another name is translated.
        exclude_modules: Names, or a regular expression, of modules to leave alone.
        layers_to_transform: Index or indices of the layers to adapt.
        layers_pattern: Name of the list of layers that `layers_to_transform` indexes.
        rank_pattern: Ranks that differ from `r`, by module name or regular expression.
        alpha_pattern: Values that differ from `lora_alpha`, by module name or regular expression.
        bias: ``"none"``, ``"all"`` or ``"fvae_lora_only"``: which biases of the base model are trained; anything but
            ``"none"`` needs peft 0.21, because earlier versions would not save them.
        fan_in_fan_out: Accepted and ignored, so that a ``LoraConfig`` can be replaced unchanged: a ``Conv1D``, whose
            weight is stored as (in, out), is recognised by its type. `fvae_lora.convert_to_lora` passes it on.
        modules_to_save: Further modules to train and save, a classifier for example.
        trainable_token_indices: Indices of token embeddings to train, as in peft's ``LoraConfig``.
        ensure_weight_tying: Keep layers tied that are tied in the base model, where `modules_to_save` or
            `trainable_token_indices` names one of them.
        init_weights: Start from the method's initialisation (both heads zero, B ~ N(0, 0.02^2), tau = 1); ``False``
            draws the heads at random too.

    Raises:
        ValueError: If a field's value is invalid, by itself or in combination with another; the message begins with
            the field's name.
    """

    r: int = 16
    residual_dim: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    encoder_hidden_dims: list[int] | None = None
    encoder_dropout: float = 0.0
    shared_encoder_trunk: bool = True
    decoder_hidden_dims: list[int] = field(default_factory=lambda: [128])
    decoder_dropout: float = 0.0
    latent_fusion: str = "concat"
    residual_prior_mean: float = 1.5
    residual_prior_std: float = 1.0
    objective: str = "fvae"
    elbo_weight: float = 1e-3
    reconstruction_weight: float = 1.0
    kl_weight: float = 10.0
    factorization_weight: float = 1.0
    factorization_weight_z1: float | None = None
    factorization_weight_z2: float | None = None
    task_weight: float = 1.0
    layer_reduction: str = "sum"
    elbo_stop_gradient: bool = False
    elbo_token_fraction: float = 1.0
    sample_at_inference: bool = False
    inference_only: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: str = "none"
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("FVAE_LORA")
        self._check_types()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        self._check_values()
        self._check_combinations()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> FVAELoraConfig:
        """Read an adapter's configuration and, from a local folder, the names and shapes of its weights.

        With these a model can refuse an adapter that does not fit before any layer has been replaced.

        Args:
            pretrained_model_name_or_path: Folder of the adapter, or its name on the hub.
            subfolder: Folder inside it.
            **kwargs: As in `peft.PeftConfig.from_pretrained`.

        Raises:
            ValueError: If the folder's configuration is unreadable, or its weights are truncated.
        """
        module_names.register_old_names()
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        local = (folder / CONFIG_NAME).is_file()
        if local:
            adapter_folder.check_json(folder / CONFIG_NAME)
        config: FVAELoraConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)
        if local and isinstance(config, FVAELoraConfig):
            has_weights = (folder / SAFETENSORS_WEIGHTS_NAME).is_file()  # a configuration may be saved alone
            config.checkpoint_shapes = adapter_folder.shapes(folder) if has_weights else {}
        return config

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and add to the folder's README how to load the adapter.

        Args:
            save_directory: Folder to write to; created if it does not exist.
            **kwargs: As in `peft.PeftConfig.save_pretrained`.
        """
        super().save_pretrained(str(save_directory), **kwargs)
        adapter_folder.write_loading_instructions(Path(save_directory), self.r, self.base_model_name_or_path)

    @property
    def checkpoint_shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """Names and shapes of the weights beside this configuration, if it was read from a local folder.

        Empty if there are none.
        """
        return self.__dict__.get("_checkpoint_shapes")

    @checkpoint_shapes.setter
    def checkpoint_shapes(self, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        self.__dict__["_checkpoint_shapes"] = shapes

    @property
    def has_residual(self) -> bool:
        """Whether the second encoder and the decoder exist."""
        return self.elbo_weight > 0 and not self.inference_only

    def _check_types(self) -> None:
        """Check the types of the fields that peft uses, which it accepts unchecked, even from a file."""
        for name in FLAGS:
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str | os.PathLike), name, value, "a name or None")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            one = isinstance(value, str) and name != "modules_to_save"
            _require(value is None or one or _is_list_of(value, str), name, value, "a list of names, or None")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                _require(_is_regex(value), name, value, "a regular expression")
        value = self.layers_to_transform
        _require(value is None or _is_index(value) or _is_indices(value), "layers_to_transform", value, "layer indices")
        for name in ("rank_pattern", "alpha_pattern"):
            value = {} if getattr(self, name) is None else getattr(self, name)
            fits = isinstance(value, Mapping) and all(isinstance(key, str) and _is_regex(key) for key in value)
            _require(fits, name, value, "a mapping from names or regular expressions to numbers")
            setattr(self, name, value)
        value = self.trainable_token_indices
        fits = all(map(_is_indices, value.values())) if isinstance(value, Mapping) else _is_indices(value)
        _require(value is None or fits, "trainable_token_indices", value, "token indices, or by layer lists of them")
        self._check_auto_mapping()

    def _check_auto_mapping(self) -> None:
        value = vars(self)["auto_mapping"]
        _require(value is None or isinstance(value, Mapping), "auto_mapping", value, "a mapping or None")
        library = str((value or {}).get("parent_library", AUTO_LIBRARIES[0]))
        if library.partition(".")[0] not in AUTO_LIBRARIES and library not in sys.modules:
            # peft's auto classes would import any module that is named here.
            warnings.warn(f"auto_mapping names {library!r}, which is not imported, and is left out", stacklevel=4)
            self.auto_mapping = None

    def _check_values(self) -> None:
        for name, allowed in CHOICES.items():
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {', '.join(allowed)}")
        for name in ("r", "residual_dim"):
            value = getattr(self, name)
            optional = value is None and name == "residual_dim"
            _require(optional or _is_count(value), name, value, f"a positive integer, at most {MAX_DIMENSION}")
        for name in ("encoder_hidden_dims", "decoder_hidden_dims"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                value = list(value)
                setattr(self, name, value)
            optional = value is None and name == "encoder_hidden_dims"
            is_list = isinstance(value, list) and all(map(_is_count, value))
            _require(optional or is_list, name, value, "a list of positive integers")
        for name in ("lora_dropout", "encoder_dropout", "decoder_dropout"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")
        for name in (
            "elbo_weight",
            "reconstruction_weight",
            "kl_weight",
            "factorization_weight",
            "factorization_weight_z1",
            "factorization_weight_z2",
        ):
            value = getattr(self, name)
            optional = value is None and name.startswith("factorization_weight_")
            _require(optional or (_is_number(value) and value >= 0), name, value, "a finite number, at least 0")
        for name in ("residual_prior_std", "task_weight", "lora_alpha"):
            value = getattr(self, name)
            optional = value is None and name == "lora_alpha"
            _require(optional or (_is_number(value) and value > 0), name, value, "a finite number above 0")
        _require(
            _is_number(self.residual_prior_mean),
            "residual_prior_mean",
            self.residual_prior_mean,
            "a finite number",
        )
        fraction = self.elbo_token_fraction
        _require(_is_number(fraction) and 0 < fraction <= 1, "elbo_token_fraction", fraction, "a number in (0, 1]")
        for key, rank in (self.rank_pattern or {}).items():
            _require(_is_count(rank), f"rank_pattern[{key!r}]", rank, "a positive integer")
        for key, alpha in (self.alpha_pattern or {}).items():
            _require(_is_number(alpha) and alpha > 0, f"alpha_pattern[{key!r}]", alpha, "a finite number above 0")

    def _check_combinations(self) -> None:
        if self.latent_fusion == "average":
            ranks = {self.r, *(self.rank_pattern or {}).values()}
            fits = self.residual_dim is None or ranks == {self.residual_dim}
            _require(fits, "residual_dim", self.residual_dim, "r (or None) when latent_fusion is 'average'")
        if self.encoder_hidden_dims == []:
            _require(self.encoder_dropout == 0, "encoder_dropout", self.encoder_dropout, "0 with a linear encoder")
        if not self.decoder_hidden_dims:
            _require(self.decoder_dropout == 0, "decoder_dropout", self.decoder_dropout, "0 with a linear decoder")
        if self.objective != "reference":
            for name in ("factorization_weight_z1", "factorization_weight_z2"):
                value = getattr(self, name)
                _require(value is None, name, value, "None unless objective is 'reference'")
        saved = self.bias == "none" or PEFT_SAVES_BIASES
        _require(saved, "bias", self.bias, "'none' with peft before 0.21, which would not save trained biases")
        if self.inference_only:
            sampling = self.sample_at_inference
            _require(not sampling, "sample_at_inference", sampling, "False with inference_only")
        if self.layers_pattern:
            given = self.layers_to_transform is not None
            _require(given, "layers_to_transform", self.layers_to_transform, "given when layers_pattern is")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                value = getattr(self, name)
                _require(value is None, name, value, "None when target_modules is a string")


def _is_number(value: object) -> bool:
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_DIMENSION


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _is_indices(value: object) -> bool:
    return isinstance(value, list | tuple | set | range) and all(map(_is_index, value))


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple | set) and all(isinstance(item, kind) for item in value)


def _is_regex(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, not {reprlib.repr(value)}")
