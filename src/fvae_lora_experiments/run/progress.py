"""Progress as lines of a log: without a terminal, progress bars would fill it with control codes."""

import sys
import time
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fvae_lora_experiments.run.timing import REPORT_INTERVAL_S, eta


class ProgressLines(TrainerCallback):
    """Prints from time to time how far training is, and the scores of the last epoch."""

    def __init__(self, metric: str):
        self.metric, self.scores = metric, ""
        self.started = self.last_printed = time.monotonic()
        self.steps_at_start = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock."""
        self.started = self.last_printed = time.monotonic()
        self.steps_at_start = state.global_step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Keeps the scores of an epoch."""
        names = dict.fromkeys(("loss", self.metric))
        scores = [f"{name} {metrics[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in metrics]
        self.scores = f", validation after epoch {round(state.epoch or 0, 2):g}: {', '.join(scores)}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prints a line if the last one is old enough."""
        if time.monotonic() - self.last_printed >= REPORT_INTERVAL_S:
            self._print(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Prints the last line."""
        self._print(state)

    def _print(self, state: TrainerState) -> None:
        self.last_printed = time.monotonic()
        done, left = state.global_step - self.steps_at_start, state.max_steps - state.global_step
        end = (
            f", {eta(timedelta(seconds=round((self.last_printed - self.started) * left / done)))}"
            if left and done
            else ""
        )
        print(f"step {state.global_step} of {state.max_steps}{self.scores}{end}", file=sys.stderr, flush=True)
