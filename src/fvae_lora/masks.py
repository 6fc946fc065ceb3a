"""Which tokens count: the padding mask that belongs to the sequence a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .objective import TokenWeights

Sequence = Literal["input", "decoder", "image"]
SEQUENCES: tuple[Sequence, ...] = get_args(Sequence)
IGNORED_LABEL = -100
CROSS_ATTENTION = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}
KEYS_AND_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value", "k_lin", "v_lin"}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, as its configuration says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@dataclass
class TokenMasks:
    """The padding masks of one forward pass.

    Args:
        model: The adapted model.
        input: Mask of its input, (batch, length) of bool, or ``None``; that of an audio model has a place per sample.
        decoder: The same of its decoder's input.
    """

    model: nn.Module
    input: Tensor | None
    decoder: Tensor | None
    _found: dict[tuple[Any, ...], TokenWeights] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any]) -> TokenMasks:
        """Find the masks in the arguments of a model's forward, given by name."""
        mask, decoder, labels = (
            value if isinstance(value := inputs.get(name), Tensor) and value.dim() == 2 else None
            for name in ("attention_mask", "decoder_attention_mask", "labels")
        )
        if decoder is None and labels is not None:
            decoder = labels != IGNORED_LABEL  # the decoder reads the labels, shifted by one
        elif decoder is None and inputs.get("decoder_input_ids") is None:
            decoder = mask  # or, without labels to read, the input
        return cls(model, None if mask is None else mask.bool(), None if decoder is None else decoder.bool())

    def sequence(self, layer: str) -> Sequence:
        """The sequence that a layer reads.

        Args:
            layer: Name of the adapted module inside the model.

        Returns:
            ``"image"`` in the vision tower of a model; ``"decoder"`` in a decoder, but for the keys and values of its
            cross-attention; ``"input"`` elsewhere.
        """
        parts = layer.split(".")
        if any("vision" in part or "visual" in part for part in parts):
            return "image"
        if not is_encoder_decoder(self.model) or (CROSS_ATTENTION.intersection(parts) and parts[-1] in KEYS_AND_VALUES):
            return "input"
        # A decoder may be a model with an encoder of its own name: the outermost name tells.
        half = next((part for part in parts if "encoder" in part or "decoder" in part), "decoder")
        return "decoder" if "decoder" in half else "input"

    def weights(self, layer: str, x: Tensor) -> TokenWeights:
        """The weights of a layer's tokens; all count where no mask of their length exists.

        Args:
            layer: Name of the adapted module inside the model.
            x: Its input, (..., d).
        """
        key = (self.sequence(layer), x.shape[:-1], x.device, x.dtype)
        if key not in self._found:
            self._found[key] = self._weights(key[0], x)
        return self._found[key]

    def _weights(self, sequence: Sequence, x: Tensor) -> TokenWeights:
        tokens, mask = x.shape[:-1], self._mask(sequence)
        if mask is not None and len(tokens) == 2 and mask.shape != tokens:
            mask = _frames(self.model, mask, tokens[1])
        if mask is None or (mask.shape != tokens and (mask.numel(),) != tokens):  # flattened, as some models do
            return TokenWeights(None, tokens.numel())
        counted = mask.to(x.device).reshape(tokens).to(torch.float32 if x.dtype != torch.float64 else x.dtype)
        return TokenWeights(counted, counted.sum())

    def _mask(self, sequence: Sequence) -> Tensor | None:
        return {"input": self.input, "decoder": self.decoder, "image": None}[sequence]


def count_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[Sequence, int]:
    """How many tokens of a batch count, before the model has seen it.

    Args:
        model: The adapted model.
        inputs: A batch, the arguments of the model's forward by name, or those of several forwards: as mappings, or
            with names like ``anchor_input_ids`` and ``positive_input_ids``.

    Returns:
        The number for each sequence. Without a mask it is in the units of the input, pixels for example: right up to
        a factor that the batches of a run share.
    """
    counts = [_count_tokens(model, part) for part in _forwards(model, inputs)]
    return {sequence: sum(count[sequence] for count in counts) for sequence in SEQUENCES}


def _forwards(model: nn.Module, inputs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The arguments of each forward that a batch is for, by the names that the model has for them."""
    name = _main_input(model)
    if name in inputs or "attention_mask" in inputs:
        return [inputs]
    if parts := [value for value in inputs.values() if isinstance(value, Mapping)]:
        return [part for inner in parts for part in _forwards(model, inner)]
    prefixes = [key.removesuffix(name) for key in inputs if key.endswith(f"_{name}")]
    parts = [
        {key.removeprefix(prefix): value for key, value in inputs.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]
    return parts or [inputs]


def _main_input(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _count_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[Sequence, int]:
    masks = TokenMasks.of(model, inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    main = tensors.get(_main_input(model), next(iter(tensors.values()), torch.ones(1)))
    samples = torch.ones_like(main, dtype=torch.bool) if masks.input is None and main.dim() == 2 else masks.input
    frames = None if samples is None else _frames(model, samples)
    mask = masks.input if frames is None else frames
    return {
        "input": main.numel() if mask is None else int(mask.sum()),
        "decoder": main.numel() if masks.decoder is None else int(masks.decoder.sum()),
        "image": sum(value.numel() for name, value in tensors.items() if "pixel_values" in name),
    }


def _frames(model: nn.Module, mask: Tensor, length: int | None = None) -> Tensor | None:
    """The mask of an audio model's frames, after its convolutions, from that of its samples.

    Args:
        model: The adapted model.
        mask: (batch, samples) of bool.
        length: Number of frames; ``None`` means as many as the samples give.

    Returns:
        (batch, frames) of bool; ``None`` if the model has no such convolutions, or not that many frames.
    """
    convolved = getattr(model, "_get_feat_extract_output_lengths", None)
    if convolved is None:
        return None
    # The encoder's layers stand before the convolutions of an adapter that the model may have behind it.
    options = {"add_adapter": False} if getattr(model.config, "add_adapter", False) else {}
    frames = convolved(torch.tensor(mask.shape[1]), **options)
    if not isinstance(frames, Tensor) or length not in (None, int(frames)):
        return None
    lengths = convolved(mask.sum(-1), **options)
    return torch.arange(int(frames), device=mask.device) < lengths[:, None]
