"""Training on what the frozen blocks below the first adapted one put out, computed once for each row and kept on disk.

A run whose adapters sit in the last blocks (`adapter.layers`), or in a decoder alone, repeats the same forward through
the blocks below them every epoch, for the same result each time. Here those blocks run once, in eval mode; in training
and scoring they pass on what they are given, and the last of them gives the cached hidden states of the batch. What a
cache cannot hold, dropout inside the frozen blocks and augmented images, is off or refused.

The states of a row are kept without padding, and are padded with its batch. For rows of one length a run on cached
states is the run without to the bit, where nothing drops out; for others to rounding.
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
"""What the name of a column is followed by, in a file, for the lengths of its rows."""


def use_cached_states(
    model: nn.Module, rows: dict[str, Any], task: Task, record: Record, device: torch.device, quiet: bool
) -> dict[str, Any]:
    """Lets `model` begin at its first trained block.

    Args:
        model: the adapted model, changed in place; what is trained has `requires_grad`.
        rows: some of the splits that the task made.
        task: the run's task.
        record: the run's record, with the fingerprints of model and data.
        device: where the frozen blocks run.
        quiet: no progress bars.

    Returns:
        The splits with their hidden states, computed now unless an earlier run left them.

    Raises:
        UserError: nothing is frozen below, or augmented images.
    """
    recipe = task.recipe
    if recipe.image.augmentation:
        raise UserError("train.cache_frozen: every epoch sees other images; set image.augmentation=[]")
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
    """The task's batch, with the hidden states of its rows where the items have them."""
    batch = task.collate([{key: value for key, value in item.items() if key != STATES} for item in items])
    if STATES in items[0]:
        batch[STATES] = _padded([item[STATES] for item in items], batch.get("attention_mask"))
    return batch


def frozen_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks below the first one that has a trainable parameter: all of them if none has.

    The blocks are those of the model's largest `ModuleList`, or of its encoder's if it has a decoder beside it.

    Raises:
        UserError: no such list, or nothing frozen below its first trained block.
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
        raise UserError("train.cache_frozen: the first block is trained already; set adapter.layers to later ones")
    return [f"{stack}.{index}" for index in range(first)]


def _base_and_encoder(model: nn.Module) -> tuple[Any, Any]:
    """The model inside peft's, and what of it the blocks are in: its encoder if it has a decoder beside."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base, base.get_encoder() if base.config.is_encoder_decoder else base


def cache_folder() -> Path:
    """Where hidden states are kept: `$FVAE_LORA_CACHE`, or `fvae-lora` in the user's cache folder; made if missing."""
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fvae-lora"
    folder = Path(os.environ.get("FVAE_LORA_CACHE", users))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@torch.no_grad()
def _hidden_states(model: nn.Module, last: str, rows: Any, task: Task, what: str, quiet: bool) -> dict[str, Tensor]:
    """What the block `last` puts out for every row, and the rows' tokens, masks and labels, `_packed`."""
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
    """Whether it is what blocks are given, such as pixels, rather than a token, a mask or a label."""
    return value.is_floating_point() and value.dim() > 0


def _is_mask_of(mask: Tensor | None, tokens: int) -> TypeGuard[Tensor]:
    """Whether the blocks' input is masked token by token: images have no mask, Whisper's is that of its frames."""
    return mask is not None and mask.shape[1] == tokens


def _unpadded(states: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The states (tokens, dims) of each row of (rows, tokens, dims)."""
    rows = list(states)
    return [row[keep] for row, keep in zip(rows, mask.bool(), strict=True)] if _is_mask_of(mask, len(rows[0])) else rows


def _padded(states: list[Tensor], mask: Tensor | None) -> Tensor:
    """The reverse of `_unpadded`, with zeros where there was padding."""
    if not _is_mask_of(mask, max(map(len, states))):
        return torch.stack(states)
    padded = states[0].new_zeros(*mask.shape, states[0].shape[-1])
    padded[mask.bool()] = torch.cat(states)
    return padded


def _packed(name: str, column: list[Tensor]) -> dict[str, Tensor]:
    """Tensors of any lengths as one, with their lengths; numbers as a tensor of numbers."""
    if column[0].dim() == 0:
        return {name: torch.stack(column)}
    return {name: torch.cat(column), f"{name}{LENGTHS}": torch.tensor([len(tensor) for tensor in column])}


def _unpacked(columns: Mapping[str, Tensor]) -> dict[str, Sequence[Tensor]]:
    """The reverse of `_packed`, for every column; nothing is copied."""
    return {
        name: tensor.split(columns[f"{name}{LENGTHS}"].tolist()) if f"{name}{LENGTHS}" in columns else list(tensor)
        for name, tensor in columns.items()
        if not name.endswith(LENGTHS)
    }


def _skip_blocks(model: nn.Module, blocks: list[str]) -> None:
    """Lets the blocks hand on the states that a batch has, and work as ever where it has none, in generation."""
    cached = _CachedStates()
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = partial(cached.replay, block.forward)
    for module in set(_base_and_encoder(model)):
        module.register_forward_pre_hook(cached.take, with_kwargs=True)
        module.register_forward_hook(cached.forget, always_call=True)


class _StopForward(Exception):  # noqa: N818
    """The frozen blocks are through; nothing above them is needed."""


class _CachedStates:
    """The cached states of the batch at hand (rows, tokens, dims), if it has any."""

    states: Tensor | None = None

    def take(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes the states out of what the model, or its encoder, is called with."""
        self.states = options.pop(STATES, self.states)
        return arguments, options

    def forget(self, *_: Any) -> None:
        """Lets go of the states: generation goes on with the parts of a model."""
        self.states = None

    def replay(self, forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The states, or what a block's own `forward` makes."""
        return forward(*arguments, **options) if self.states is None else self.states


class _CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of `source` with their states; zeros stand in for what the frozen blocks made these of."""

    def __init__(self, source: Any, file: Path):
        self.source = source
        floats = {k: v.shape for k, v in source[0].items() if _is_float_array(torch.as_tensor(v))}
        self.stand_ins = {key: torch.zeros(()).expand(shape) for key, shape in floats.items()}
        with safe_open(file, "pt") as stored:  # read from the disk as they are needed
            self.columns = _unpacked({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.stand_ins | {key: column[index] for key, column in self.columns.items()}
