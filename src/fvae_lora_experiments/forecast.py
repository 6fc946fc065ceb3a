"""What runs would do and cost, computed from their data and their models' configurations; nothing is written."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.models.pretrained import without_weights
from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.report.numbers import quantity
from fvae_lora_experiments.run.flops import training_flops
from fvae_lora_experiments.run.state_cache import collate
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


def print_forecast(runs: Sequence[PlannedRun], flops_per_second: float | None, console: Console) -> None:
    """Prints a line for each setting whose runs are not all done, and their sum.

    Args:
        runs: the plan.
        flops_per_second: the device's speed; None leaves out the hours.
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
    steps, flops = 0, 0.0
    for same in alike.values():
        one, count = forecast(same[0].recipe), len(same)
        of_all = math.nan if one.flops is None else float(one.flops * count)
        steps, flops = steps + one.steps * count, flops + of_all
        recipe = same[0].recipe
        cells = (str(count), f"{one.steps * count:,}", quantity(one.trainable), *_cost(of_all, flops_per_second))
        table.add_row(*map(Text, (recipe.method, short_name(recipe.dataset), *cells)))
    if len(alike) > 1:
        table.add_row("all", "", str(len(to_do)), f"{steps:,}", "", *_cost(flops, flops_per_second), style="bold")
    console.print(f"Runs to do: {len(to_do)}; done already: {len(runs) - len(to_do)}", highlight=False)
    if to_do:
        console.print(table)
        note = "FLOPs and hours are those of training on one device, all epochs, without validation and test"
        cached = "; train.cache_frozen saves some" if any(r.recipe.train.cache_frozen for r in to_do) else ""
        given = "" if flops_per_second else "; --flops-per-second gives the hours"
        console.print(f"{note}{cached}{given}. Nothing was written.", highlight=False, soft_wrap=True)


def _cost(flops: float, flops_per_second: float | None) -> tuple[str, str]:
    if math.isnan(flops):
        return "unknown", ""
    return quantity(flops), "" if flops_per_second is None else f"{flops / flops_per_second / 3600:.3g}"
