"""Which tokens count: the padding mask that belongs to the sequence a layer reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .module_names import abbreviated
from .objective import TokenWeights

SequenceKind = Literal["input", "decoder", "image"]
SEQUENCE_KINDS: tuple[SequenceKind, ...] = get_args(SequenceKind)
IGNORED_LABEL = -100
CROSS_ATTENTION = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn", "cross_attention"}
MASKED_SCORE = -5000.0  # at most this is added to a score to mask it out; position biases are greater
PADDING_METHODS = ("_pad_to_window_size", "_pad_to_block_size")
TORCH_TRANSFORMERS = (nn.Transformer, nn.MultiheadAttention)
PADDING_MASKS = {"input": ("key_padding_mask", "src_key_padding_mask"), "decoder": ("tgt_key_padding_mask",)}
KEYS_AND_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value", "k_lin", "v_lin"}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder and a decoder, as its configuration says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


@dataclass
class TokenMasks:
    """The padding masks of one forward pass.

    Args:
        model: The adapted model.
        input: Mask of its input, (batch, length) of bool, or ``None``; an audio model's has an entry per sample.
        decoder: The same for its decoder's input.
        has_decoder: Whether the model has an encoder and a decoder.
        shapes: Of what each sequence is read from, (rows, ...).
    """

    model: nn.Module
    input: Tensor | None
    decoder: Tensor | None
    has_decoder: bool = False
    shapes: Mapping[SequenceKind, torch.Size] = field(default_factory=dict)
    _found: dict[tuple[Any, ...], TokenWeights | None] = field(default_factory=dict)
    _unmatched: dict[str, tuple[SequenceKind, int]] = field(
        default_factory=dict
    )  # by layer: what it reads, how many tokens

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any]) -> TokenMasks:
        """Find the masks in the arguments of a model's forward, given by name."""
        mask = _kept_tokens(inputs.get("attention_mask"), inputs)
        decoder = _kept_tokens(inputs.get("decoder_attention_mask"), {})
        mask = _from_padding_mask("input", inputs) if mask is None else mask
        decoder = _from_padding_mask("decoder", inputs) if decoder is None else decoder
        has_decoder = is_encoder_decoder(model) or any(name in inputs for name in PADDING_MASKS["decoder"])
        labels = inputs.get("labels")
        if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
            decoder = labels != IGNORED_LABEL  # the decoder reads the labels, shifted by one
        elif decoder is None and inputs.get("decoder_input_ids") is None:
            decoder = mask  # or the input, if there are no labels to read
        return cls(model, mask, decoder, has_decoder, _shapes(model, inputs))

    def sequence(self, layer: str) -> SequenceKind:
        """The sequence that a layer reads.

        Args:
            layer: Name of the adapted module inside the model.

        Returns:
            ``"image"`` in a model's vision tower; ``"decoder"`` in a decoder, except for the keys and values of its
            cross-attention; ``"input"`` elsewhere.
        """
        parts = layer.split(".")
        if any("vision" in part or "visual" in part for part in parts):
            return "image"
        if not self.has_decoder or (CROSS_ATTENTION.intersection(parts) and parts[-1] in KEYS_AND_VALUES):
            return "input"
        # A decoder may contain a module named "encoder": the outermost name decides.
        half = next((part for part in parts if "encoder" in part or "decoder" in part), "decoder")
        return "decoder" if "decoder" in half else "input"

    def weights(self, layer: str, x: Tensor) -> TokenWeights:
        """The weights of a layer's tokens; all tokens count where no mask fits.

        Args:
            layer: Name of the adapted module inside the model.
            x: Its input, (..., d).
        """
        sequence, tokens = self.sequence(layer), x.shape[:-1]
        mask = self._mask(sequence)
        told_by_shape = mask is None or mask.shape == tokens != mask.T.shape
        sequence_first = not told_by_shape and _is_sequence_first(self.model, layer)
        key = (sequence, sequence_first, tokens, x.device, x.dtype)
        if key not in self._found:
            self._found[key] = self._weights(mask, sequence_first, x)
        if (found := self._found[key]) is not None:
            return found
        self._unmatched[layer] = (sequence, tokens.numel())
        return TokenWeights(None, tokens.numel())

    def _weights(self, mask: Tensor | None, sequence_first: bool, x: Tensor) -> TokenWeights | None:
        tokens = x.shape[:-1]
        if mask is None or tokens.numel() == len(mask) != mask.numel():
            return TokenWeights(None, tokens.numel())  # the latter is one vector per sample, as in a pooler
        if (
            len(tokens) == 2
            and mask.shape != tokens
            and (frames := _frame_mask(self.model, mask, tokens[1])) is not None
        ):
            mask = frames
        fitted = _fit_to_tokens(_pad_to_windows(self.model, mask, tokens), tokens, sequence_first)
        if fitted is None:
            return None
        counted = fitted.to(x.device, torch.float32 if x.dtype != torch.float64 else x.dtype)
        return TokenWeights(counted, counted.sum())

    def rows(self, layer: str, x: Tensor) -> tuple[Tensor, int] | None:
        """Which row of the batch each token of a layer's input belongs to.

        Args:
            layer: Name of the adapted module inside the model.
            x: Its input, (..., d).

        Returns:
            Indices of rows in the shape of the tokens, (...,), and the number of rows. Where one input serves all
            rows, as relative positions do, the indices are (rows, ...). ``None`` where there is no telling, as of the
            tokens that reach one of several experts.
        """
        tokens, sequence = x.shape[:-1], self.sequence(layer)
        if not tokens:
            return torch.zeros((), dtype=torch.long, device=x.device), 1
        mask, shape = self._mask(sequence), self.shapes.get(sequence, tokens)
        sequence_first = _is_sequence_first(self.model, layer)
        if mask is None:
            if sequence_first and len(shape) > 2 and shape[:2] == tokens[:2]:
                shape = torch.Size((shape[1], shape[0], *shape[2:]))
            count = texts = shape[0]
            length = shape[1:2].numel()
        else:
            texts, length = mask.shape
            several_texts = len(shape) > 2 and shape.numel() == mask.numel()
            count = shape[0] if several_texts or texts == 1 else texts
            texts = max(texts, count)
        index = torch.arange(count, device=x.device).repeat_interleave(texts // count)[:, None]
        if tokens.numel() == texts:
            return index.reshape(tokens), count
        places = index.expand(texts, length)
        found = _fit_to_tokens(index.expand(_pad_to_windows(self.model, places, tokens).shape), tokens, sequence_first)
        if found is not None:
            return found, count
        if mask is not None and mask.shape == places.shape and int(mask.sum()) == tokens.numel():
            return places[mask.to(x.device)].reshape(tokens), count  # padding was taken out
        if len(tokens) == 1:
            return None
        if sequence_first and tokens[1] == count:
            return index.reshape(1, count, *[1] * (len(tokens) - 2)).expand(tokens), count
        if tokens[0] == 1:
            tokens = torch.Size((count, *tokens[1:]))
        leading = texts if tokens[0] == texts else count
        if tokens[0] % leading or (tokens[0] != leading and mask is not None):
            return None
        index = index.flatten() if leading == texts else torch.arange(count, device=x.device)
        index = index.repeat_interleave(tokens[0] // leading)  # windows of one sample lie behind each other
        return index.reshape(-1, *[1] * (len(tokens) - 1)).expand(tokens), count

    def layers_that_count_padding(self) -> list[str]:
        """The layers seen so far that count padding, as far as their masks tell.

        A layer that reads exactly as many tokens as are not padding is taken to read just those.
        """
        layers = []
        for layer, (sequence, tokens) in self._unmatched.items():
            mask = self._mask(sequence)
            if mask is not None and int(mask.sum()) not in (mask.numel(), tokens):
                layers.append(layer)
        return layers

    def _mask(self, sequence: SequenceKind) -> Tensor | None:
        return {"input": self.input, "decoder": self.decoder, "image": None}[sequence]


def warn_of_padding(masks: TokenMasks) -> bool:
    """Warn of the layers of a forward in which padding counts; return whether there are any."""
    layers = masks.layers_that_count_padding()
    if layers:
        warnings.warn(
            f"every token counts in the ELBO of {abbreviated(layers)}, padding included: "
            "the mask does not fit their input",
            stacklevel=2,
        )
    return bool(layers)


def _kept_tokens(mask: Any, inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens an attention mask of any layout keeps, (batch, length) of bool.

    Args:
        mask: (batch, length); or (batch, ..., queries, keys), where a key that no query attends to is padding; or a
            mapping of several of these. Bool, 0 and 1, or values to be added to the scores.
        inputs: All arguments of the forward, by name.

    Returns:
        ``None`` if there is no mask, or it is not a tensor.
    """
    if isinstance(mask, Mapping):
        kinds = [_kept_tokens(value, inputs) for value in mask.values()]
        known = [kind for kind in kinds if kind is not None]
        return torch.stack(known).any(0) if known and len(known) == len(kinds) else None
    if not isinstance(mask, Tensor) or mask.dim() == 0:
        return None
    kept, shape = _attended(mask), _shape_of_text(inputs)
    if shape == mask.shape:
        kept = kept.flatten(0, -2)  # also where a sample is several texts, as in multiple choice
    elif mask.dim() > 2:
        kept = kept.flatten(1, -2).any(1)
    kept = kept.reshape(-1, mask.shape[-1])
    if len(shape) == 2 and inputs.get("past_key_values") is not None:
        kept = kept[:, -shape[1] :]  # the mask begins with the cached tokens
    return kept


def _shapes(model: nn.Module, inputs: Mapping[str, Any]) -> dict[SequenceKind, torch.Size]:
    """The shapes of what the sequences of a forward are read from, (rows, ...)."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    main = tensors.get(getattr(model, "main_input_name", ""), next(iter(tensors.values()), torch.ones(1)))
    shape = _shape_of_text(inputs) or main.shape
    read = {"input_ids": inputs.get("decoder_input_ids"), "inputs_embeds": inputs.get("decoder_inputs_embeds")}
    decoder = _shape_of_text(read) or shape
    image = next((value.shape for name, value in tensors.items() if "pixel_values" in name), shape)
    return {"input": shape, "decoder": decoder, "image": image}


def _shape_of_text(inputs: Mapping[str, Any]) -> torch.Size:
    ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.shape
    return embeddings.shape[:-1] if isinstance(embeddings, Tensor) else torch.Size()


def _attended(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    added = (mask < 0).any()
    if mask.dim() > 2 and mask.is_floating_point():
        added = added | ~(mask > 0).any()  # only zeros: added to the scores, nothing is masked
    return torch.where(added, mask > MASKED_SCORE, mask != 0)


def _from_padding_mask(sequence: str, inputs: Mapping[str, Any]) -> Tensor | None:
    """The same from the masks of torch's own transformer, which are true, or very negative, at padding."""
    for name in PADDING_MASKS[sequence]:
        if isinstance(mask := inputs.get(name), Tensor):
            return (mask > MASKED_SCORE if mask.is_floating_point() else mask == 0).reshape(-1, mask.shape[-1])
    return None


def _fit_to_tokens(mask: Tensor, tokens: torch.Size, sequence_first: bool) -> Tensor | None:
    """A mask, (batch, length), in the shape of a layer's tokens; ``None`` if they cannot be matched."""
    batch, length = mask.shape
    masks = (mask.T, mask) if sequence_first else (mask, mask.T)
    if (same := next((mask for mask in masks if mask.shape == tokens), None)) is not None:
        return same
    if batch == 1 and tokens[-1] == length:
        return mask.expand(tokens)  # one for all samples
    if tokens.numel() == mask.numel():
        return masks[0].reshape(tokens)  # flattened, or cut into windows
    if len(tokens) > 2 and tokens[:2] == mask.shape:
        return mask.reshape(batch, length, *[1] * (len(tokens) - 2)).expand(tokens)  # several heads of a token
    if len(tokens) > 2 and (tokens[0], tokens[-1]) == mask.shape:
        return mask.reshape(batch, *[1] * (len(tokens) - 2), length).expand(tokens)
    return None


def _is_sequence_first(model: nn.Module, layer: str) -> bool:
    """Whether a layer is inside one of torch's transformers with inputs (length, batch, width).

    Other models with that layout are recognised by shapes alone, which cannot tell if batch and length are equal.
    """
    parts = layer.split(".")[:-1]
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    around = [module for parent in above for module in (parent, *parent.children())]
    return any(isinstance(m, TORCH_TRANSFORMERS) and getattr(m, "batch_first", None) is False for m in around)


def _pad_to_windows(model: nn.Module, mask: Tensor, tokens: torch.Size) -> Tensor:
    """The mask of the input after the model has padded it to a whole number of windows or blocks, if it does."""
    missing = tokens.numel() // len(mask) - mask.shape[1] if len(tokens) == 2 and len(mask) in tokens else 0
    if missing <= 0 or not any(hasattr(module, name) for module in model.modules() for name in PADDING_METHODS):
        return mask
    return F.pad(mask, (0, missing))


def count_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[SequenceKind, Tensor | int]:
    """How many tokens of a batch count, before the model has seen it, without waiting for the device.

    Args:
        model: The adapted model.
        inputs: A batch, the arguments of the model's forward by name, or those of several forwards: as mappings, or
            with names like ``anchor_input_ids`` and ``positive_input_ids``.

    Returns:
        The number for each sequence. Without a mask it is in the units of the input, pixels for example: right up to
        a factor that the batches of a run share.
    """
    counts = [_count_tokens(model, part) for part in _forwards(model, inputs)]
    return {sequence: sum(count[sequence] for count in counts) for sequence in SEQUENCE_KINDS}


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


def share(part: Tensor | int, whole: Tensor | int) -> Tensor | float:
    """The share of some tokens in all; on the device, and in double if it has that, where either was counted there."""
    part, whole = (
        n.to(torch.float32 if n.device.type == "mps" else torch.float64) if isinstance(n, Tensor) else n
        for n in (part, whole)
    )
    return part / (whole.clamp(min=1) if isinstance(whole, Tensor) else max(whole, 1))


def _count_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[SequenceKind, Tensor | int]:
    masks = TokenMasks.of(model, inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    main = tensors.get(_main_input(model), next(iter(tensors.values()), torch.ones(1)))
    samples = torch.ones_like(main, dtype=torch.bool) if masks.input is None and main.dim() == 2 else masks.input
    frames = None if samples is None else _frame_mask(model, samples)
    mask = masks.input if frames is None else frames
    return {
        "input": main.numel() if mask is None else mask.sum(),
        "decoder": main.numel() if masks.decoder is None else masks.decoder.sum(),
        "image": sum(value.numel() for name, value in tensors.items() if "pixel_values" in name),
    }


def _frame_mask(model: nn.Module, mask: Tensor, length: int | None = None) -> Tensor | None:
    """The mask of an audio model's frames, after its convolutions, from the mask of its samples.

    Args:
        model: The adapted model.
        mask: (batch, samples) of bool.
        length: Number of frames; ``None`` means as many as follow from the samples.

    Returns:
        (batch, frames) of bool; ``None`` if the model has no such convolutions, or not that many frames.
    """
    convolved = getattr(model, "_get_feat_extract_output_lengths", None)
    if convolved is None:
        return None
    # The encoder's layers come before the convolutions of the adapter that some models have after it.
    options = {"add_adapter": False} if getattr(model.config, "add_adapter", False) else {}
    frames = convolved(torch.tensor(mask.shape[1]), **options)
    if not isinstance(frames, Tensor) or length not in (None, int(frames)):
        return None
    lengths = convolved(mask.sum(-1), **options)
    return torch.arange(int(frames), device=mask.device) < lengths[:, None]
