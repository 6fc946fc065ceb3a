"""Training on what the frozen blocks below the first adapted one put out, computed once for each row and kept on disk.

A run whose adapters sit in the last blocks (`adapter.layers`) repeats the same forward through the blocks below them
every epoch, for the same result each time. Here those blocks run once, in eval mode; in training and scoring they pass
on what they are given, and the last of them gives the cached hidden states of the batch. What a cache cannot hold,
dropout inside the frozen blocks and augmented images, is off or refused.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.record import Record
from fvae_lora.experiments.tasks import Task

STATES = "frozen_states"
"""A batch's key for the cached hidden states, (rows, tokens, dims)."""


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
        UserError: nothing is frozen below, rows of different lengths, or augmented images.
    """
    recipe = task.recipe
    if recipe.image.augmentation:
        raise UserError("train.cache_frozen: every epoch sees other images; set image.augmentation=[]")
    blocks = frozen_blocks(model)
    identity = [record["model"]["fingerprint"], record["dataset"]["fingerprint"], blocks[-1], recipe.train.precision]
    identity += [recipe.image.model_dump(), recipe.text.model_dump(), recipe.data.model_dump(), recipe.task]
    identity += [recipe.seed] if recipe.data.protocol == "reference" else []
    files = {}
    for split in rows:
        file = cache_folder() / f"{hashlib.sha256(json.dumps([identity, split]).encode()).hexdigest()}.safetensors"
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                items = _through(model.to(device), blocks[-1], rows[split], task, f"frozen blocks, {split}", quiet)
                part = file.with_suffix(".part")
                save_file(items, part)
                part.replace(file)
        files[split] = file
    _begin_after(model, blocks)
    return {split: _CachedRows(rows[split], file) for split, file in files.items()}


def frozen_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks below the first one that has a trainable parameter: all of them if none has.

    The blocks are those of the model's largest `ModuleList`.

    Raises:
        UserError: no such list, or nothing frozen below its first trained block.
    """
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not stacks:
        raise UserError(f"train.cache_frozen: {type(model).__name__} has no list of blocks")
    stack = max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    inside = [found for name in trained if (found := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))]
    first = min((int(found[1]) for found in inside), default=len(stacks[stack]))
    if first == 0:
        raise UserError("train.cache_frozen: the first block is trained already; set adapter.layers to later ones")
    return [f"{stack}.{index}" for index in range(first)]


def cache_folder() -> Path:
    """Where hidden states are kept: `$FVAE_LORA_CACHE`, or `fvae-lora` in the user's cache folder; made if missing."""
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fvae-lora"
    folder = Path(os.environ.get("FVAE_LORA_CACHE", users))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@torch.no_grad()
def _through(model: nn.Module, last: str, rows: Any, task: Task, what: str, quiet: bool) -> dict[str, Tensor]:
    """What the block `last` puts out for every row, and all that the rows hold in integers, stacked."""
    train = task.recipe.train
    device = next(model.parameters()).device
    states: list[Tensor] = []
    others: list[dict[str, Tensor]] = []

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).cpu())
        raise _Enough

    was_training = model.training
    model.eval()
    handle = model.get_submodule(last).register_forward_hook(stop)
    try:
        for start in tqdm(range(0, len(rows), train.batch_size), desc=what, disable=quiet):
            batch = task.collate([rows[i] for i in range(start, min(start + train.batch_size, len(rows)))])
            others.append({key: value for key, value in batch.items() if not value.is_floating_point()})
            with suppress(_Enough), torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                model(**{key: value.to(device) for key, value in batch.items()})
    finally:
        handle.remove()
        model.train(was_training)
    columns = {STATES: states} | {key: [batch[key] for batch in others] for key in others[0]}
    try:
        return {key: torch.cat(column) for key, column in columns.items()}
    except RuntimeError as error:
        raise UserError("train.cache_frozen: rows of different lengths cannot be cached") from error


def _begin_after(model: nn.Module, blocks: list[str]) -> None:
    """Lets the blocks do nothing but hand the batch's cached states to the next one."""
    given = _Given()
    for name in blocks:
        stack, _, index = name.rpartition(".")
        model.get_submodule(stack)[int(index)] = given  # type: ignore[operator]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.register_forward_pre_hook(given.take, with_kwargs=True)


class _Enough(Exception):  # noqa: N818
    """The frozen blocks are through; nothing above them is needed."""


class _Given(nn.Module):
    """In the place of every frozen block: puts out the cached states of the batch at hand."""

    states: Tensor | None = None

    def take(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes the states out of what the model is called with."""
        self.states = options[STATES]
        return arguments, {key: value for key, value in options.items() if key != STATES}

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The states (rows, tokens, dims)."""
        assert self.states is not None
        return self.states


class _CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows with their states. What the frozen blocks made these of is not read again: zeros stand in for it."""

    def __init__(self, source: Any, file: Path):
        self.rows = source.rows
        floats = {k: v.shape for k, v in source[0].items() if isinstance(v, Tensor) and v.is_floating_point()}
        self.stand_ins = {key: torch.zeros(()).expand(shape) for key, shape in floats.items()}
        with safe_open(file, "pt") as stored:  # read from the disk as they are needed
            self.columns = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.stand_ins | {key: column[index] for key, column in self.columns.items()}
