"""Training on cached hidden states: the output of the frozen blocks, computed once per row and kept on disk.

A run whose adapters are in the last blocks (`adapter.layers`), or only in a decoder, repeats the same forward through
the blocks below them in every epoch, with the same result. Here those blocks run once, in eval mode; in training and
scoring they return the cached hidden states of the batch instead. What cannot be cached is off (dropout inside the
frozen blocks) or refused (augmented images).

The states of a row are stored without padding and padded with its batch. Without dropout, a run on cached states equals
the run without the cache: to the bit if all rows have the same length, and otherwise up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from filelock import FileLock
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.record import Record

if TYPE_CHECKING:
    from fvae_lora_experiments.tasks import Task

STATES = "frozen_states"
"""An item's and a batch's key for the cached hidden states, (tokens, dims) and (rows, tokens, dims)."""

LENGTHS = ".lengths"
"""The suffix, in a file, of the column with the lengths of another column's rows."""


def use_cached_states(
    model: nn.Module, rows: dict[str, Any], task: Task, record: Record, device: torch.device, quiet: bool
) -> dict[str, Any]:
    """Lets `model` start at its first trained block.

    Args:
        model: the adapted model, changed in place; trained parameters have `requires_grad`.
        rows: splits that the task has prepared.
        task: the run's task.
        record: the run's record, with the fingerprints of model and data.
        device: the device on which the frozen blocks run.
        quiet: no progress bars.

    Returns:
        The splits with their hidden states, computed now unless an earlier run has stored them.

    Raises:
        UserError: no block is frozen, or images are augmented.
    """
    recipe = task.recipe
    if recipe.image.augmentation:
        raise UserError("train.cache_frozen: augmentation changes the images in every epoch; set image.augmentation=[]")
    blocks = frozen_blocks(model)
    sections = recipe.model_dump(include={"task", "data", "image", "text", "commonsense", "speech"})
    data = record.dataset.test_fingerprint  # of all splits
    identity: list[Any] = [record.model.fingerprint, data, blocks[-1], recipe.train.precision]
    identity += [sections, recipe.seed if recipe.data.protocol == "reference" else None]
    files = {}
    for split in rows:
        file = cache_folder() / f"{hashlib.sha256(json.dumps([identity, split]).encode()).hexdigest()}.safetensors"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                items = _hidden_states(
                    model.to(device), blocks[-1], rows[split], task, f"frozen blocks, {split}", quiet
                )
                part = file.with_suffix(".part")
                save_file(items, part)
                part.replace(file)
        files[split] = file
    _skip_blocks(model, blocks)
    return {split: _CachedRows(rows[split], file) for split, file in files.items()}


def collate(task: Task, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The task's batch, with the hidden states of its rows if the items have them."""
    batch = task.collate([{key: value for key, value in item.items() if key != STATES} for item in items])
    if STATES in items[0]:
        batch[STATES] = _padded([item[STATES] for item in items], batch.get("attention_mask"))
    return batch


def frozen_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks before the first one with a trainable parameter; all blocks if none has one.

    The blocks are those of the largest `ModuleList` in the model or, in an encoder-decoder model, in its encoder.

    Raises:
        UserError: there is no such list, or no frozen block before the first trained one.
    """
    _, encoder = _base_and_encoder(model)
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    stacks = {
        f"{prefix}.{name}".lstrip("."): module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not stacks:
        raise UserError(f"train.cache_frozen: {type(model).__name__} has no list of blocks")
    stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    names = [name for name, _ in model.named_parameters()]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = [found for name in trained if (found := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))]
    first = min((int(found[1]) for found in inside), default=len(stacks[stack]))
    below = names[: next(i for i, name in enumerate(names) if name.startswith(f"{stack}."))]
    if first == 0 or trained & set(below):
        raise UserError("train.cache_frozen: the first block is trained; set adapter.layers to later ones")
    return [f"{stack}.{index}" for index in range(first)]


def _base_and_encoder(model: nn.Module) -> tuple[Any, Any]:
    """The model inside peft's, and the part with the blocks: its encoder if it also has a decoder."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base, base.get_encoder() if base.config.is_encoder_decoder else base


def cache_folder() -> Path:
    """The folder for hidden states: `$FVAE_LORA_CACHE`, or `fvae-lora` in the user's cache; created if missing."""
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fvae-lora"
    folder = Path(os.environ.get("FVAE_LORA_CACHE", users))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@torch.no_grad()
def _hidden_states(model: nn.Module, last: str, rows: Any, task: Task, what: str, quiet: bool) -> dict[str, Tensor]:
    """The output of the block `last` for every row, and the rows' tokens, masks and labels, `_packed`."""
    train = task.recipe.train
    device = next(model.parameters()).device
    captured: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {STATES: []}

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        captured.append((output[0] if isinstance(output, tuple) else output).cpu())
        raise _StopForward

    was_training = model.training
    model.eval()
    handle = model.get_submodule(last).register_forward_hook(stop)
    try:
        for start in tqdm(range(0, len(rows), train.batch_size), desc=what, disable=quiet or None):
            items = [rows[i] for i in range(start, min(start + train.batch_size, len(rows)))]
            batch = task.collate(items)
            with suppress(_StopForward), task.autocast(device):
                model(**{key: value.to(device) for key, value in batch.items()})
            columns[STATES] += _unpadded(captured.pop(), batch.get("attention_mask"))
            for item in items:
                for key, value in item.items():
                    if not _is_float_array(value := torch.as_tensor(value)):
                        columns.setdefault(key, []).append(value)
    finally:
        handle.remove()
        model.train(was_training)
    return {key: tensor for name, column in columns.items() for key, tensor in _packed(name, column).items()}


def _is_float_array(value: Tensor) -> bool:
    """Whether it is an input of the blocks, such as pixels, rather than tokens, a mask or a label."""
    return value.is_floating_point() and value.dim() > 0


def _is_mask_of(mask: Tensor | None, tokens: int) -> TypeGuard[Tensor]:
    """Whether the mask is one of the blocks' tokens: images have no mask, and Whisper's is one of its frames."""
    return mask is not None and mask.shape[1] == tokens


def _unpadded(states: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The states (tokens, dims) of each row of (rows, tokens, dims)."""
    rows = list(states)
    return [row[keep] for row, keep in zip(rows, mask.bool(), strict=True)] if _is_mask_of(mask, len(rows[0])) else rows


def _padded(states: list[Tensor], mask: Tensor | None) -> Tensor:
    """The inverse of `_unpadded`, with zeros as padding."""
    if not _is_mask_of(mask, max(map(len, states))):
        return torch.stack(states)
    padded = states[0].new_zeros(*mask.shape, states[0].shape[-1])
    padded[mask.bool()] = torch.cat(states)
    return padded


def _packed(name: str, column: list[Tensor]) -> dict[str, Tensor]:
    """Tensors of any lengths as one tensor and their lengths; scalars as one tensor."""
    if column[0].dim() == 0:
        return {name: torch.stack(column)}
    return {name: torch.cat(column), f"{name}{LENGTHS}": torch.tensor([len(tensor) for tensor in column])}


def _unpacked(columns: Mapping[str, Tensor]) -> dict[str, Sequence[Tensor]]:
    """The inverse of `_packed`, for all columns and without copies."""
    return {
        name: tensor.split(columns[f"{name}{LENGTHS}"].tolist()) if f"{name}{LENGTHS}" in columns else list(tensor)
        for name, tensor in columns.items()
        if not name.endswith(LENGTHS)
    }


def _skip_blocks(model: nn.Module, blocks: list[str]) -> None:
    """Lets the blocks return the states in a batch, and run as usual if there are none, as in generation."""
    cached = _CachedStates()
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = partial(cached.replay, block.forward)
    for module in set(_base_and_encoder(model)):
        module.register_forward_pre_hook(cached.take, with_kwargs=True)
        module.register_forward_hook(cached.forget, always_call=True)


class _StopForward(Exception):  # noqa: N818
    """Raised after the frozen blocks, because nothing above them is needed."""


class _CachedStates:
    """The cached states of the current batch (rows, tokens, dims), if it has any."""

    states: Tensor | None = None

    def take(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes the states from the arguments of the model or its encoder."""
        self.states = options.pop(STATES, self.states)
        return arguments, options

    def forget(self, *_: Any) -> None:
        """Drops the states: generation goes on to call parts of the model."""
        self.states = None

    def replay(self, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The cached states, or the result of the block's own `forward` if there are none."""
        return forward(*arguments, **options) if self.states is None else self.states


class _CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of `source` with their states; zeros stand in for the inputs of the frozen blocks."""

    def __init__(self, source: Any, file: Path):
        self.source = source
        floats = {k: v.shape for k, v in source[0].items() if _is_float_array(torch.as_tensor(v))}
        self.stand_ins = {key: torch.zeros(()).expand(shape) for key, shape in floats.items()}
        with safe_open(file, "pt") as stored:  # memory-mapped: read from disk as needed
            self.columns = _unpacked({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.stand_ins | {key: column[index] for key, column in self.columns.items()}
