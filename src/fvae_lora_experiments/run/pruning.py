"""Ending a run early: somebody else, who sees other runs too, judges whether it is worth going on with."""

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fvae_lora_experiments.tasks import Metric

Judge = Callable[[int, float], str | None]
"""Told, after each epoch, its number and the best validation score so far; says why the run is to end, or None."""


class PrunedError(Exception):
    """The run was ended early; the message says why."""


class PruningCallback(TrainerCallback):
    """Asks a judge after each epoch; the last one only informs it, because nothing is left to be saved.

    Raises:
        PrunedError: the judge wants the run to end.
    """

    def __init__(self, metric: Metric, judge: Judge):
        self.metric, self.judge = metric, judge

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Passes on the best score so far, by which a run is judged in the end, too."""
        score = metrics[f"eval_{self.metric.name}"]
        if state.best_metric is not None:
            score = (max if self.metric.greater_is_better else min)(score, state.best_metric)
        why = self.judge(math.ceil(round(state.epoch or 0, 6)), score)
        if why and state.global_step < state.max_steps:
            raise PrunedError(why)
