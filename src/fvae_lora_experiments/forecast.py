"""What runs would do and cost, computed from their data and their models' configurations; nothing is written."""

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, TrainerCallback

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.models.pretrained import without_weights
from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.report.numbers import quantity
from fvae_lora_experiments.run.flops import training_flops
from fvae_lora_experiments.run.state_cache import collate
from fvae_lora_experiments.run.trainer import RunTrainer, trainer_arguments
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.sweep.plan import PlannedRun
from fvae_lora_experiments.tasks import load_task


@dataclass(frozen=True)
class Forecast:
    """A run's optimizer steps, trainable parameters and training FLOPs; these are None if they cannot be counted.

    The numbers are those that the run would record, except that attention always counts here. A record lacks its FLOPs
    if the device computes attention in a kernel that torch does not count, as on a CPU.
    """

    steps: int
    trainable: int
    flops: int | None


def forecast(recipe: Recipe) -> Forecast:
    """Forecasts training by `recipe`: opens its data, and builds its model without weights.

    Raises:
        UserError: data or a model that training would refuse, as far as can be seen without weights.
    """
    task = load_task(recipe)
    splits = task.split(task.open_source())
    with without_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, processor = task.load_model(splits.classes)
        rows = task.datasets(splits, model, processor)["train"]
        adapted = _adapted(model, recipe)
        size, accumulated = recipe.train.batch_size, recipe.train.gradient_accumulation
        epoch = math.ceil(math.ceil(len(rows) / size) / accumulated)
        steps = recipe.train.max_steps or recipe.train.epochs * epoch
        trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        batch = collate(task, [rows[i] for i in range(min(size, len(rows)))])
        batch.pop("attention_mask", None)  # padding costs as much
        try:
            of_step = training_flops(adapted, batch)
        except (RuntimeError, NotImplementedError):  # a forward that depends on values, which meta tensors lack
            return Forecast(steps, trainable, None)
    return Forecast(steps, trainable, of_step * steps * accumulated)


TIMED_STEPS = 3


class _Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


def seconds_per_step(recipe: Recipe) -> float:
    """Trains a few optimizer steps here, and returns the median time of one; the first warms up.

    Raises:
        UserError: data, a model or settings that training would refuse, a model that is not at hand among them.
    """
    task, clock = load_task(recipe), _Clock()
    splits = task.split(task.open_source())
    model, processor = task.load_model(splits.classes)
    rows = task.datasets(splits, model, processor)["train"]
    adapted = METHODS[recipe.method].apply(model, recipe)
    few = recipe.train.model_copy(update={"max_steps": TIMED_STEPS + 1, "report_to": []})
    with TemporaryDirectory() as scratch:
        settings = recipe.model_copy(update={"train": few})
        arguments = trainer_arguments(settings, Path(scratch), task.metric, quiet=True)
        arguments.set_evaluate(strategy="no").set_save(strategy="no").set_logging(strategy="no")
        RunTrainer(task, True, model=adapted, args=arguments, train_dataset=rows, callbacks=[clock]).train()
    return statistics.median(end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False))


def _adapted(model: PreTrainedModel, recipe: Recipe) -> torch.nn.Module:
    """The model adapted by the recipe's method, without an initialisation that would need its weights."""
    if (configure := METHODS[recipe.method].config) is None:
        return model
    try:
        config = configure(recipe, model)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True
        return get_peft_model(model, config).to("meta")
    except ValueError as error:
        raise UserError(f"recipe: {error}") from error


def print_forecast(runs: Sequence[PlannedRun], speed: float | Literal["timed"] | None, console: Console) -> None:
    """Prints a line for each setting whose runs are not all done, and their sum.

    Args:
        runs: the plan.
        speed: FLOPs that the device does in a second, or "timed" for a few steps of each setting here; None leaves out
            the hours.
        console: where to print.

    Raises:
        UserError: as `forecast`; a folder that holds another recipe's run.
    """
    to_do = [run for run in runs if not run.is_done()]
    alike: dict[str, list[PlannedRun]] = {}
    for run in to_do:
        # neither the seed nor the learning rate changes the cost
        key = run.recipe.model_dump_json(exclude={"seed": True, "purpose": True, "train": {"learning_rate"}})
        alike.setdefault(key, []).append(run)
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "data set", "runs", "steps", "trainable", "FLOPs", "hours"):
        table.add_column(heading, justify="left" if heading in ("method", "data set") else "right")
    steps, flops, hours = 0, 0.0, 0.0
    for same in alike.values():
        recipe, count = same[0].recipe, len(same)
        one = forecast(recipe)
        of_all = math.nan if one.flops is None else float(one.flops * count)
        if speed == "timed":
            taken = seconds_per_step(recipe) * one.steps * count / 3600
        else:
            taken = math.nan if speed is None else of_all / speed / 3600
        steps, flops, hours = steps + one.steps * count, flops + of_all, hours + taken
        cells = (str(count), f"{one.steps * count:,}", quantity(one.trainable), *_cost(of_all, taken))
        table.add_row(*map(Text, (recipe.method, short_name(recipe.dataset), *cells)))
    if len(alike) > 1:
        table.add_row("all", "", str(len(to_do)), f"{steps:,}", "", *_cost(flops, hours), style="bold")
    console.print(f"Runs to do: {len(to_do)}; done already: {len(runs) - len(to_do)}", highlight=False)
    if to_do:
        console.print(table)
        note = "FLOPs and hours are those of training on one device, all epochs, without validation and test"
        cached = "; train.cache_frozen saves some" if any(r.recipe.train.cache_frozen for r in to_do) else ""
        given = "" if speed else "; --timed or --flops-per-second gives the hours"
        console.print(f"{note}{cached}{given}. Nothing was written.", highlight=False, soft_wrap=True)


def _cost(flops: float, hours: float) -> tuple[str, str]:
    return "unknown" if math.isnan(flops) else quantity(flops), "" if math.isnan(hours) else f"{hours:.3g}"
