"""Many short trainings in one process: data opened once, frozen blocks run once, a plain loop instead of a Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fvae_lora_experiments.data import Splits
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.record import DatasetRecord, Record, SourceRecord
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Task, load_task

STUDIES = Path(__file__).parents[1] / "studies"


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train, and each split's rows with the states of its frozen blocks."""

    recipe: Recipe
    task: Task
    splits: Splits
    model: nn.Module
    items: Mapping[str, Any]

    @property
    def trained(self) -> list[nn.Parameter]:
        """What training changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def labels(self, split: str) -> np.ndarray:
        """The classes of a split's rows, (rows,)."""
        return np.array(self.splits.by_name[split]["label"][:])

    def batch(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Rows as the model takes them."""
        from fvae_lora_experiments.run.state_cache import collate

        return collate(self.task, rows)


def prepare(study: str, options: Mapping[str, Any], seed: int) -> Prepared:
    """A model by the recipe of a study, changed by `options`, with the seed's new parameters."""
    from transformers import set_seed

    from fvae_lora_experiments.run.state_cache import use_cached_states

    recipe = load_recipe(str(STUDIES / study / "recipe.yaml"), (), options)
    task = load_task(recipe)
    splits = _opened(recipe.dataset, recipe.data.model_dump_json(), task)
    set_seed(seed)
    base, processor = task.load_model(splits.classes)
    rows = task.datasets(splits, base, processor)
    model = METHODS[recipe.method].apply(base, recipe)
    record = Record(schema=1, state="running", method=recipe.method, seed=seed)
    record.model, record.dataset = SourceRecord(fingerprint=recipe.model), DatasetRecord(fingerprint=recipe.dataset)
    items = use_cached_states(model, rows, task, record, torch.device("cpu"), quiet=True)
    return Prepared(recipe, task, splits, model, items)


_splits: dict[tuple[str, str], Splits] = {}


def _opened(dataset: str, settings: str, task: Task) -> Splits:
    if (dataset, settings) not in _splits:
        _splits[dataset, settings] = task.split(task.open_source())
    return _splits[dataset, settings]


def optimise(
    prepared: Prepared, rows: Sequence[Any], steps: int, rng: np.random.Generator, look: Callable[[int], None]
) -> None:
    """Trains by the recipe's optimisation for a number of steps; `look` is told each step when it is done."""
    from transformers import get_linear_schedule_with_warmup

    train, trained = prepared.recipe.train, prepared.trained
    optimizer = torch.optim.AdamW(trained, train.learning_rate, weight_decay=train.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, round(train.warmup_ratio * steps), steps)
    for step, batch in enumerate(itertools.islice(_shuffled(rows, train.batch_size, rng), steps), 1):
        prepared.model.train()
        prepared.model(**prepared.batch(batch)).loss.backward()  # with the ELBO, where there is one
        nn.utils.clip_grad_norm_(trained, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        look(step)


def _shuffled(rows: Sequence[Any], size: int, rng: np.random.Generator) -> Iterator[list[Any]]:
    """Batches, epoch after epoch without end."""
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), size):
            yield [rows[int(number)] for number in order[start : start + size]]
