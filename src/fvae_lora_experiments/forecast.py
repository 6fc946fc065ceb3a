"""What runs would do and cost, computed from their data and their models' configurations; nothing is written."""

import math
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, TrainerCallback

from fvae_lora import add_elbo
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.models.pretrained import without_weights
from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.published import PublishedData, data_of
from fvae_lora_experiments.report.numbers import memory, quantity
from fvae_lora_experiments.run.flops import kept_bytes, training_flops
from fvae_lora_experiments.run.state_cache import collate
from fvae_lora_experiments.run.trainer import RunTrainer, trainer_arguments
from fvae_lora_experiments.schema import DataSettings, Recipe, TextSettings
from fvae_lora_experiments.stand_ins import stand_in, training_rows
from fvae_lora_experiments.sweep.plan import PlannedRun
from fvae_lora_experiments.tasks import load_task


@dataclass(frozen=True)
class Forecast:
    """What a run takes.

    The numbers are those that the run would record, except that attention always counts here. A record lacks its FLOPs
    if the device computes attention in a kernel that torch does not count, as on a CPU.
    """

    steps: int
    """Optimizer steps."""
    trainable: int
    """Trained parameters."""
    state: int
    """Bytes of weights and, for trained ones, of gradients and AdamW's two moments."""
    activations: int | None
    """Bytes that the forward of a batch keeps for the backward in fp32 (`kept_bytes`); None if it cannot be counted."""
    flops: int | None
    """Of the whole training; None if they cannot be counted."""

    @property
    def bytes(self) -> int:
        """Of memory, as far as it is known."""
        return self.state + (self.activations or 0)


def forecast(recipe: Recipe, published: bool = False) -> Forecast:
    """Forecasts training by `recipe`: builds its model without weights, and opens its data.

    Args:
        recipe: the recipe.
        published: takes its data's size and its model's configuration from what was published (`stand_ins`), and opens
            nothing.

    Raises:
        UserError: data or a model that training would refuse, as far as can be seen without weights.
    """
    if published:
        facts = data_of(recipe)
        rows = training_rows(recipe, facts)
        known = facts.model_copy(update={"rows": {"train": 1}}).model_dump_json()
        step = _published_step(_step_alone(recipe).model_dump_json(), known, min(recipe.train.batch_size, rows))
    else:
        with _quietly_without_weights():
            model, batch, rows = _opened(recipe)
            step = _step(recipe, model, batch)
    size, accumulated = recipe.train.batch_size, recipe.train.gradient_accumulation
    epoch = math.ceil(math.ceil(rows / size) / accumulated)
    steps = recipe.train.max_steps or recipe.train.epochs * epoch
    flops = None if step.flops is None else step.flops * steps * accumulated
    return replace(step, steps=steps, flops=flops)


@contextmanager
def _quietly_without_weights() -> Iterator[None]:
    with without_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _step(recipe: Recipe, model: PreTrainedModel, batch: dict[str, Any]) -> Forecast:
    """What a single batch takes."""
    adapted = _adapted(model, recipe)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    state = round(frozen * load_task(recipe).bytes_per_frozen_weight) + BYTES_PER_TRAINED * trainable
    flops, activations = _run_on_meta(adapted, batch) or (None, None)
    return Forecast(1, trainable, state, activations, flops)


@cache
def _published_step(recipe: str, facts: str, size: int) -> Forecast:
    """A step by a recipe and published facts, both as JSON; data sets of one study differ in few numbers."""
    asked = Recipe.model_validate_json(recipe)
    with _quietly_without_weights():
        return _step(asked, *stand_in(asked, PublishedData.model_validate_json(facts), size))


def _step_alone(recipe: Recipe) -> Recipe:
    """The recipe without what the cost of a step does not depend on."""
    train = recipe.train.model_copy(update={"epochs": 1, "max_steps": None, "learning_rate": 1.0})
    text = TextSettings(max_length=recipe.text.max_length)
    same = {"dataset": "any", "data": DataSettings(), "seed": 0, "purpose": "result", "text": text, "train": train}
    return recipe.model_copy(update=same)


BYTES_PER_TRAINED = 4 * 4
"""A trained weight, its gradient and AdamW's two moments, in fp32."""


def _opened(recipe: Recipe) -> tuple[PreTrainedModel, dict[str, Any], int]:
    """The recipe's model, its first batch, and the number of its training rows."""
    task = load_task(recipe)
    splits = task.split(task.open_source())
    model, processor = task.load_model(splits.classes)
    rows = task.datasets(splits, model, processor)["train"]
    return model, collate(task, [rows[i] for i in range(min(recipe.train.batch_size, len(rows)))]), len(rows)


def _run_on_meta(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[int, int] | None:
    """FLOPs of a batch, forward and backward, and the bytes kept in between; None if the forward depends on values."""
    batch.pop("attention_mask", None)  # padding costs as much
    vars(model.config)["apply_spec_augment"] = False  # masks are drawn by values, and cost nothing
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    for inputs, loss in (
        (batch, lambda output: output.loss),
        (unlabelled, lambda output: add_elbo(output.logits.sum(), model)),  # CTC looks at labels, which have no values
    ):
        try:
            with kept_bytes(model) as kept:
                return training_flops(model, inputs, loss), kept()
        except (RuntimeError, NotImplementedError):
            continue
    return None


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
        return model.to("meta")  # weight norms make a part of their own elsewhere
    try:
        config = configure(recipe, model)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True
        return get_peft_model(model, config).to("meta")
    except ValueError as error:
        raise UserError(f"recipe: {error}") from error


@dataclass(frozen=True)
class Cost:
    """What the runs of one setting, which differ in seed and learning rate alone, take together."""

    recipe: Recipe
    """That of one of them."""
    runs: int
    steps: int
    trainable: int
    bytes: int
    """Of one run, see `Forecast`."""
    flops: float
    """NaN if they cannot be counted."""
    hours: float
    """On one device; NaN if nothing is known of it."""


Speed = float | Literal["timed"] | None
"""FLOPs that the device does in a second, or "timed" for a few steps of each setting here; None for `ASSUMED`."""

GPU = "H100 SXM"
PEAK = {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12}
"""FLOPs a second of that GPU, dense, by precision of computation; fp32 without TF32, as torch computes by default."""
UTILISATION = 0.4
"""The share of the peak that is assumed to be reached."""


def costs(runs: Iterable[PlannedRun], speed: Speed, published: bool = False) -> list[Cost]:
    """What each setting takes.

    Args:
        runs: those that are to be done.
        speed: of the device; with None, hours are only known of a `published` study, on the assumed GPU.
        published: as for `forecast`.

    Raises:
        UserError: as `forecast`.
    """
    alike: dict[str, list[PlannedRun]] = {}
    for run in runs:
        # neither the seed nor the learning rate changes the cost
        key = run.recipe.model_dump_json(exclude={"seed": True, "purpose": True, "train": {"learning_rate"}})
        alike.setdefault(key, []).append(run)
    found = []
    for same in alike.values():
        recipe, count = same[0].recipe, len(same)
        one = forecast(recipe, published)
        flops = math.nan if one.flops is None else float(one.flops * count)
        if speed == "timed":
            hours = seconds_per_step(recipe) * one.steps * count / 3600
        elif speed is None and not published:
            hours = math.nan
        else:
            hours = flops / (speed or UTILISATION * PEAK[recipe.train.precision]) / 3600
        found.append(Cost(recipe, count, one.steps * count, one.trainable, one.bytes, flops, hours))
    return found


def print_forecast(runs: Sequence[PlannedRun], speed: Speed, console: Console, published: bool = False) -> None:
    """Prints a line for each setting whose runs are not all done, and their sum.

    Args:
        runs: the plan.
        speed: as for `costs`.
        console: where to print.
        published: as for `forecast`.

    Raises:
        UserError: as `forecast`; a folder that holds another recipe's run.
    """
    to_do = [run for run in runs if not run.is_done()]
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "data set", "runs", "steps", "trainable", "memory", "FLOPs", "hours"):
        table.add_column(heading, justify="left" if heading in ("method", "data set") else "right")
    lines = costs(to_do, speed, published)
    for line in lines:
        name, recipe = short_name(line.recipe.dataset), line.recipe
        counts = (str(line.runs), f"{line.steps:,}", quantity(line.trainable), memory(line.bytes / 1e6))
        where = f"{name} {recipe.data.config}" if recipe.data.config else name
        table.add_row(*map(Text, (recipe.method, where, *counts, *_cost(line.flops, line.hours))))
    if len(lines) > 1:
        total = _cost(sum(line.flops for line in lines), sum(line.hours for line in lines))
        steps = sum(line.steps for line in lines)
        table.add_row("all", "", str(len(to_do)), f"{steps:,}", "", "", *total, style="bold")
    console.print(f"Runs to do: {len(to_do)}; done already: {len(runs) - len(to_do)}", highlight=False)
    if to_do:
        console.print(table)
        for note in _notes(to_do, speed, published):
            console.print(note, highlight=False, soft_wrap=True)


def _notes(runs: Sequence[PlannedRun], speed: Speed, published: bool) -> Iterator[str]:
    """What the numbers of `costs` mean and assume."""
    cached = "; train.cache_frozen saves some" if any(r.recipe.train.cache_frozen for r in runs) else ""
    given = "" if speed or published else "; --timed or --flops-per-second gives the hours"
    counted = "FLOPs and hours are those of training on one device, all epochs, without validation and test"
    yield f"{counted}{cached}{given}. Nothing was written."
    yield (
        "Memory is that of weights (4 bytes for each parameter, 2 for frozen ones in bf16), of gradients and AdamW's "
        "state (12 for each trained one), and of what a batch's forward keeps, counted in fp32: an upper bound in bf16."
    )
    if published:
        yield "From published sizes of data sets and shipped configurations of models: neither was opened."
        yield from assumptions([run.recipe for run in runs], speed)


def assumptions(recipes: Sequence[Recipe], speed: Speed = None) -> Iterator[str]:
    """What `costs` assumes of published data and of the device, in sentences."""
    for task, recipe in {recipe.task: recipe for recipe in recipes}.items():
        length = data_of(recipe).length
        if task == "text":
            yield f"Each text counts with text.max_length, {recipe.text.max_length} tokens: an upper bound."
        elif length:
            kind = "samples" if task == "phonemes" else "tokens"
            yield f"Each input counts with {length:,} {kind}, padding included: an assumption."
    if speed is None:
        used = sorted({recipe.train.precision for recipe in recipes})
        peaks = ", ".join(f"{PEAK[precision] / 1e12:g} TFLOPS in {precision}" for precision in used)
        yield (
            f"Hours are those of one {GPU} at {UTILISATION:.0%} of its peak ({peaks}), an assumption; "
            "--flops-per-second is for others, --timed for this machine."
        )


def _cost(flops: float, hours: float) -> tuple[str, str]:
    return "unknown" if math.isnan(flops) else quantity(flops), "" if math.isnan(hours) else f"{hours:.3g}"
