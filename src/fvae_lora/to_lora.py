r"""Conversion of an adapter to a plain LoRA, which peft and LoRA servers load without this package.

A LoRA computes ``y = W x + b + B' A x``. An adapter with a linear encoder computes ``W x + b + c B (M x + k)``: a LoRA
with ``A = M`` and ``B' = c B``, except for the constant ``c B k``. It can go to one of two places:

- ``bias="keep"``: a bias of LoRA's B (peft's ``lora_bias``). Exact; peft reads it, most servers refuse it.
- ``bias="fold"``: A itself, as ``A = M + k a^T`` with ``a^T x`` close to 1, where a is the least-squares fit of the
  constant on calibration data. After a LayerNorm it exists exactly: the normalised features sum to zero, so some
  linear function of x is constant. Elsewhere, such as after an RMSNorm, an error remains, which is measured.

An encoder with a ReLU is replaced by the least-squares fit of its mean, with an intercept (``"keep"``) or without one
(``"fold"``). The fit only needs the sums ``X^T X`` and ``X^T Z`` over tokens, so one pass over the calibration data is
enough; the remaining error follows from the same sums. Linearly dependent features are allowed: of all best fits the
smallest is taken (the pseudo-inverse), no ridge is added.

Source: the normal equations are standard; the constant behind a LayerNorm is this project's own derivation.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from .adapter_folder import PEFT_PREFIX, new_folder
from .config import FVAELoraConfig
from .layer import FVAELoraConv2d, FVAELoraLayer
from .to_inference import deterministic_config, write_adapter
from .vae import FVAE, raised

BIAS_CHOICES = ("keep", "fold")
TOKENS_PER_FEATURE = 10  # with fewer, the fit's error on its own data says little about other data

Scores = Mapping[str, float]


@dataclass(frozen=True)
class AffineEncoder:
    """The replacement of a layer's first encoder: ``z1 = weight x + bias``.

    Args:
        weight: (r, d).
        bias: (r,).
        error: Root mean square of the update's error over the calibration tokens, relative to that of the update
            ``c B z1`` itself; 0 where nothing was fitted.
        tokens: Number of tokens it was fitted on.
    """

    weight: Tensor
    bias: Tensor
    error: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; converted to a string, it is the text of the folder's README.

    Args:
        folder: The LoRA's folder.
        bias: ``"keep"`` or ``"fold"``.
        rank: The LoRA's rank, the same in all layers.
        errors: The relative error of each layer's update, see `AffineEncoder`.
        tokens: The number of calibration tokens of each layer; 0 where nothing had to be fitted.
        before: The task's scores with the adapter; empty if they were not measured.
        after: The task's scores with the LoRA.
    """

    folder: Path
    bias: str
    rank: int
    errors: dict[str, float]
    tokens: dict[str, int]
    before: dict[str, float]
    after: dict[str, float]

    def __str__(self) -> str:
        fitted = any(self.tokens.values())
        paragraphs = [
            "# A plain LoRA, converted from an FVAE-LoRA adapter",
            f'`PeftModel.from_pretrained(base_model, "this folder")` loads it; `fvae-lora` is not needed. Its rank is '
            f"{self.rank}, its scale 1: the adapter's own is part of `lora_B`.",
            BIAS_NOTES[self.bias],
            FITTED if fitted else EXACT,
        ]
        if fitted:
            rows = [f"| `{name}` | {self.tokens[name]} | {error:.2e} |" for name, error in self.errors.items()]
            paragraphs.append("\n".join(["| layer | tokens | relative error |", "|---|---|---|", *rows]))
        if self.before:
            rows = [
                f"| {name} | {value:.6g} | {self.after[name]:.6g} | {self.after[name] - value:+.3g} |"
                for name, value in self.before.items()
            ]
            paragraphs.append("\n".join(["| score | FVAE-LoRA | this LoRA | change |", "|---|---|---|---|", *rows]))
        else:
            paragraphs.append("What the conversion does to the task's scores was not measured.")
        return "\n\n".join(paragraphs) + "\n"


BIAS_NOTES = {
    "keep": "The encoders' biases are kept as biases of `lora_B` (`lora_bias` in `adapter_config.json`). peft reads "
    "them; vLLM, and other servers that take `lora_A.weight` and `lora_B.weight` alone, refuse to load them. For "
    'these, convert with `bias="fold"`.',
    "fold": "It holds `lora_A.weight` and `lora_B.weight` alone, as vLLM and other servers want it. The constant that "
    "the encoders' biases add is written as a linear function of each layer's input, as closely as the calibration "
    "data allow; what is missing is part of the errors below. vLLM also wants `--max-lora-rank` to be at least the "
    "rank, and refuses adapters with `modules_to_save`.",
}
EXACT = "The adapter's encoders are linear, so its outputs are the adapter's own, up to rounding."
FITTED = (
    "Where the adapter's encoders are not a linear function of their input, they were fitted by least squares on "
    "calibration data. The relative error is the root mean square of what the update lacks, over that of the update "
    "itself, on the calibration tokens (padding left out) and each layer for itself."
)


def convert_to_lora(
    model: PeftModel,
    folder: str | os.PathLike[str],
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    max_error: float = 0.1,
    bias: str = "keep",
    evaluate: Callable[[PeftModel], Scores] | None = None,
    adapter_name: str = "default",
) -> ConversionReport:
    """Write an adapter as a plain LoRA folder, which loads without this package.

    With linear encoders and ``bias="keep"`` the outputs are the adapter's own; otherwise encoders are fitted on
    calibration data, see `fvae_lora.to_lora`. The folder is written completely or not at all; its README says what was
    done.

    Args:
        model: A peft model with an FVAE-LoRA adapter; unchanged afterwards.
        folder: Folder to write to; must not exist, or be empty.
        calibration: Batches, each the arguments of the model's forward by name, on its device; padding is taken
            from their ``attention_mask``. They are iterated over once. A layer with d input features needs at least
            10 d tokens, and 8 d^2 bytes on its device.
        max_error: The largest relative error of a layer's update that is accepted, see `AffineEncoder`.
        bias: ``"keep"`` or ``"fold"``: where the constant of the encoders goes.
        evaluate: Scores the model on the task; called in eval mode, with the adapter and with its replacement.
        adapter_name: Which adapter; the only active one if something is to be fitted or scored.

    Returns:
        What was done, with the errors and scores that the README lists.

    Raises:
        ValueError: If there is no such FVAE-LoRA adapter, or it cannot be a LoRA (it samples at inference, is merged,
            adapts a convolution, or trained biases that ``"fold"`` has no place for); if calibration data are needed
            and missing or too few; if an error is above `max_error`; or if the folder is not empty.
    """
    config = deterministic_config(model, adapter_name)
    layers = {
        layer.name: layer
        for layer in model.modules()
        if isinstance(layer, FVAELoraLayer) and adapter_name in layer.fvae_lora_B
    }
    exact = bias == "keep" and config.encoder_hidden_dims == []
    _check(config, layers, bias, max_error)
    if not exact and calibration is None:
        why = "a bias is folded into lora_A" if config.encoder_hidden_dims == [] else "an encoder has a ReLU"
        raise ValueError(f"calibration: must be given where {why}")
    if not (exact and evaluate is None) and model.active_adapters != [adapter_name]:
        raise ValueError(f"adapter_name: make {adapter_name!r} the only active adapter first, with model.set_adapter")

    with new_folder(folder) as inside, _in_eval_mode(model), torch.no_grad():
        if exact or calibration is None:
            encoders = {name: _own_encoder(layer.fvae_lora_vae[adapter_name]) for name, layer in layers.items()}
        else:
            moments = _collect_moments(model, layers, adapter_name, calibration)
            encoders = {name: _fit(layers[name], adapter_name, moments.get(name), bias) for name in layers}
        worst = max(encoders, key=lambda name: encoders[name].error)
        if not encoders[worst].error <= max_error:
            raise ValueError(
                f"max_error: the linear fit of {worst} has a relative error of {encoders[worst].error:.3g}, "
                f"{max_error:g} is allowed; allow more, or train with encoder_hidden_dims=[] (a linear encoder)"
            )
        before = dict(evaluate(model)) if evaluate is not None else {}
        with _as_converted(layers, adapter_name, encoders):
            after = dict(evaluate(model)) if evaluate is not None else {}
        rank = max(layer.r[adapter_name] for layer in layers.values())
        state = _lora_state(model, layers, adapter_name, encoders, rank, bias)
        write_adapter(model, _lora_config(config, rank, bias), state, inside)
        errors = {name: encoder.error for name, encoder in encoders.items()}
        tokens = {name: encoder.tokens for name, encoder in encoders.items()}
        report = ConversionReport(Path(folder), bias, rank, errors, tokens, before, after)
        (inside / "README.md").write_text(str(report), encoding="utf-8")
    return report


def _check(config: FVAELoraConfig, layers: Mapping[str, FVAELoraLayer], bias: str, max_error: float) -> None:
    if bias not in BIAS_CHOICES:
        raise ValueError(f"bias: must be one of {', '.join(BIAS_CHOICES)}, not {bias!r}")
    if not max_error >= 0:
        raise ValueError(f"max_error: must be a number, at least 0, not {max_error!r}")
    if bias == "fold" and config.bias != "none":
        raise ValueError(f"bias: an adapter that trained biases (bias={config.bias!r}) can only be converted with keep")
    for name, layer in layers.items():
        if isinstance(layer, FVAELoraConv2d):
            raise ValueError(f"{name} is a convolution, which is not converted; use fvae_lora.export_for_inference")
        if layer.merged:
            raise ValueError(f"{name} is merged; call model.unmerge_adapter() first")


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class Moments:
    """Sums over tokens, in float64, of the products of ``[x; 1]`` and z.

    Args:
        features: Dimension d of x.
        rank: Dimension r of z.
        device: Where they are kept.
    """

    def __init__(self, features: int, rank: int, device: torch.device) -> None:
        self.tokens = 0
        self.xx = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.xz = torch.zeros(features + 1, rank, dtype=torch.float64, device=device)
        self.zz = torch.zeros(rank, rank, dtype=torch.float64, device=device)

    def add(self, x: Tensor, z: Tensor) -> None:
        """Add tokens.

        Args:
            x: (tokens, d).
            z: (tokens, r).
        """
        x, z = F.pad(x.double(), (0, 1), value=1.0), z.double()
        self.tokens += len(x)
        self.xx += x.mT @ x
        self.xz += x.mT @ z
        self.zz += z.mT @ z

    def fit(self, start: Tensor, intercept: bool) -> Tensor:
        """The least-squares fit of z by x; where several are best, the one closest to `start`.

        Args:
            start: (d + 1, r), the last row for the intercept.
            intercept: Whether there is one; otherwise the fit's last row is zero.

        Returns:
            (d + 1, r).
        """
        n = len(self.xx) if intercept else len(self.xx) - 1
        xx, start = self.xx[:n, :n], start[:n]
        fit = start + torch.linalg.pinv(xx, hermitian=True) @ (self.xz[:n] - xx @ start)
        return F.pad(fit, (0, 0, 0, len(self.xx) - n))

    def relative_error(self, fit: Tensor, B: Tensor) -> float:
        """Root of the mean squared error of ``B z``, over the root of the mean square of ``B z``.

        Args:
            fit: (d + 1, r), in the place of z.
            B: (out, r).
        """
        fit, B = fit.double(), B.double()
        cross = fit.mT @ self.xz
        residual = self.zz - cross - cross.mT + fit.mT @ self.xx @ fit
        missing, whole = (((B @ sums) * B).sum().clamp(min=0) for sums in (residual, self.zz))
        return 0.0 if whole == 0 and missing == 0 else float((missing / whole).sqrt())


def _collect_moments(
    model: PeftModel,
    layers: Mapping[str, FVAELoraLayer],
    adapter_name: str,
    calibration: Iterable[Mapping[str, Any]],
) -> dict[str, Moments]:
    """The moments of each layer's input and z1's mean, over the tokens that are not padding."""
    moments: dict[str, Moments] = {}

    def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, FVAELoraLayer)
        masks, x = layer.recorder.masks(), args[0]
        mask = None if masks is None else masks.weights(layer.name, x).mask
        tokens = x.flatten(0, -2) if mask is None else x.flatten(0, -2)[mask.flatten() > 0]
        vae: Any = layer.fvae_lora_vae[adapter_name]
        z = vae.encode_mean("encoder1", tokens.to(vae.encoder1_mean_weight.dtype))
        if layer.name not in moments:
            moments[layer.name] = Moments(layer.in_features, layer.r[adapter_name], x.device)
        moments[layer.name].add(tokens, z)

    handles = [layer.register_forward_pre_hook(add) for layer in layers.values()]
    try:
        for batch in calibration:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _own_encoder(vae: Any) -> AffineEncoder:
    return AffineEncoder(vae.encoder1_mean_weight, vae.encoder1_mean_bias)


def _fit(layer: FVAELoraLayer, adapter_name: str, moments: Moments | None, bias: str) -> AffineEncoder:
    tokens = 0 if moments is None else moments.tokens
    if moments is None or tokens < TOKENS_PER_FEATURE * layer.in_features:
        raise ValueError(
            f"calibration: {tokens} tokens are too few for {layer.name}, which has {layer.in_features} features; "
            f"at least {TOKENS_PER_FEATURE * layer.in_features} are needed"
        )
    vae: Any = layer.fvae_lora_vae[adapter_name]
    start = torch.zeros_like(moments.xz)
    if vae.encoder_depth == 0:
        # In directions without data, a linear encoder keeps its weights.
        start[:-1] = vae.encoder1_mean_weight.mT
    B = layer.B(adapter_name)
    fit = moments.fit(start, intercept=bias == "keep").to(B.dtype)  # the error is that of the weights as written
    return AffineEncoder(fit[:-1].mT, fit[-1], moments.relative_error(fit, B), moments.tokens)


@contextmanager
def _as_converted(
    layers: Mapping[str, FVAELoraLayer], adapter_name: str, encoders: Mapping[str, AffineEncoder]
) -> Iterator[None]:
    """Let the layers compute what the LoRA will."""
    originals: dict[str, Any] = {name: layer.fvae_lora_vae[adapter_name] for name, layer in layers.items()}
    try:
        for name, original in originals.items():
            linear = {"encoder_hidden_dims": [], "encoder_dropout": 0.0, "inference_only": True}
            config = dataclasses.replace(original.config, **linear)
            replacement: Any = (
                FVAE(config, original.in_features, original.rank).to(original.encoder1_mean_weight).eval()
            )
            replacement.encoder1_mean_weight.copy_(encoders[name].weight)
            replacement.encoder1_mean_bias.copy_(encoders[name].bias)
            layers[name].fvae_lora_vae[adapter_name] = replacement
        yield
    finally:
        for name, original in originals.items():
            layers[name].fvae_lora_vae[adapter_name] = original


def _lora_state(
    model: PeftModel,
    layers: Mapping[str, FVAELoraLayer],
    adapter_name: str,
    encoders: Mapping[str, AffineEncoder],
    rank: int,
    bias: str,
) -> dict[str, Tensor]:
    """The LoRA's weights and whatever else the adapter saves, such as a classifier."""
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {key: value for key, value in saved.items() if ".fvae_lora_" not in key}
    for name, layer in layers.items():
        B, encoder, key = layer.B(adapter_name), encoders[name], PEFT_PREFIX + name
        scaled = layer.scaling[adapter_name] * raised(B)
        # Servers expect one rank and one scale for all layers: lower ranks are padded with zeros.
        empty = rank - layer.r[adapter_name]
        state[f"{key}.lora_A.weight"] = F.pad(encoder.weight, (0, 0, 0, empty)).to(B.dtype)
        state[f"{key}.lora_B.weight"] = F.pad(scaled, (0, empty)).to(B.dtype)
        if bias == "keep":
            state[f"{key}.lora_B.bias"] = (scaled.double() @ encoder.bias.double()).to(B.dtype)
    return state


def _lora_config(config: FVAELoraConfig, rank: int, bias: str) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_bias=bias == "keep",
        bias=config.bias.replace("fvae_lora_only", "lora_only"),
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
