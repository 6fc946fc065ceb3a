"""Which tokens count: the padding mask that belongs to the sequence a layer reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .objective import TokenWeights

Sequence = Literal["input", "decoder"]
IGNORED_LABEL = -100
CROSS_ATTENTION = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}
KEYS_AND_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value", "k_lin", "v_lin"}


def sequence_of(layer: str, encoder_decoder: bool) -> Sequence:
    """The sequence that a layer of that name reads.

    Args:
        layer: Name of the adapted module inside the model.
        encoder_decoder: Whether the model has an encoder and a decoder.

    Returns:
        ``"decoder"`` for a decoder's own sequence; keys and values of its cross-attention read the ``"input"``.
    """
    parts = layer.split(".")
    reads_memory = bool(CROSS_ATTENTION.intersection(parts)) and parts[-1] in KEYS_AND_VALUES
    return "decoder" if encoder_decoder and "decoder" in parts and not reads_memory else "input"


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, as its configuration says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@dataclass
class TokenMasks:
    """The masks of one forward pass.

    Args:
        model: The adapted model.
        inputs: The arguments of its forward by name.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    _found: dict[tuple[Any, ...], TokenWeights] = field(default_factory=dict)

    def weights(self, layer: str, x: Tensor) -> TokenWeights:
        """The weights of a layer's tokens; all count where no mask of their length exists.

        Args:
            layer: Name of the adapted module inside the model.
            x: Its input, (..., d).
        """
        sequence = sequence_of(layer, is_encoder_decoder(self.model))
        if "vision" in layer or "visual" in layer:
            return TokenWeights(None, x.shape[:-1].numel())
        key = (sequence, x.shape[:-1], x.device)
        if key not in self._found:
            self._found[key] = self._weights(sequence, x)
        return self._found[key]

    def _weights(self, sequence: Sequence, x: Tensor) -> TokenWeights:
        mask, tokens = self._mask(sequence), x.shape[:-1]
        if mask is not None and len(tokens) == 2 and tokens[0] == mask.shape[0] and tokens != mask.shape:
            mask = _after_convolutions(self.model, mask, tokens[1])
        if mask is None or mask.numel() != tokens.numel() or (len(tokens) == 2 and mask.shape != tokens):
            return TokenWeights(None, tokens.numel())
        counted = mask.to(x.device).reshape(tokens).to(torch.float32 if x.dtype != torch.float64 else x.dtype)
        return TokenWeights(counted, counted.sum())

    def _mask(self, sequence: Sequence) -> Tensor | None:
        mask = self.inputs.get("attention_mask" if sequence == "input" else "decoder_attention_mask")
        labels = self.inputs.get("labels")
        if sequence == "decoder" and mask is None and isinstance(labels, Tensor):
            mask = labels != IGNORED_LABEL  # the decoder reads the labels, shifted by one
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def count_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[Sequence, Tensor]:
    """How many tokens of a batch count, before the model has seen it.

    Args:
        model: The adapted model.
        inputs: A batch, the arguments of the model's forward by name.

    Returns:
        The number for each sequence, as scalars. Where there is no mask it is in the units of the main input, pixels
        for example: right up to a factor that the batches of a run share.
    """
    masks = TokenMasks(model, inputs)
    main = inputs.get(getattr(model, "main_input_name", "input_ids"))
    if not isinstance(main, Tensor):
        main = next((value for value in inputs.values() if isinstance(value, Tensor)), torch.ones(1))
    counts: dict[Sequence, Tensor] = {}
    for sequence in ("input", "decoder") if is_encoder_decoder(model) else ("input",):
        mask = masks._mask(sequence)
        if (
            mask is not None
            and sequence == "input"
            and (lengths := _lengths_after_convolutions(model, mask)) is not None
        ):
            counts[sequence] = lengths.sum()
        else:
            counts[sequence] = torch.tensor(main.numel(), device=main.device) if mask is None else mask.sum()
    return counts


def _lengths_after_convolutions(model: nn.Module, mask: Tensor) -> Tensor | None:
    lengths = getattr(model, "_get_feat_extract_output_lengths", None)
    return None if lengths is None else lengths(mask.sum(-1))


def _after_convolutions(model: nn.Module, mask: Tensor, length: int) -> Tensor | None:
    """The mask of an audio model's frames, from that of its samples."""
    lengths = _lengths_after_convolutions(model, mask)
    return None if lengths is None else torch.arange(length, device=mask.device) < lengths[:, None].to(mask.device)
