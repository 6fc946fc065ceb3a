"""How far something is, as lines of a log: without a terminal bars would fill it with the codes that move them."""

import sys
import time
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fvae_lora_experiments.run.timing import PAUSE_S, ends


class ProgressLines(TrainerCallback):
    """Says now and then how far training is, and what the last epoch has brought."""

    def __init__(self, metric: str):
        self.metric, self.scores = metric, ""
        self.began = self.said = time.monotonic()
        self.began_with = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """From here on time counts."""
        self.began = self.said = time.monotonic()
        self.began_with = state.global_step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """An epoch has its scores."""
        names = dict.fromkeys(("loss", self.metric))
        scores = [f"{name} {metrics[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in metrics]
        self.scores = f", validation after epoch {round(state.epoch or 0, 2):g}: {', '.join(scores)}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A step is done."""
        if time.monotonic() - self.said >= PAUSE_S:
            self._say(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last line."""
        self._say(state)

    def _say(self, state: TrainerState) -> None:
        self.said = time.monotonic()
        done, left = state.global_step - self.began_with, state.max_steps - state.global_step
        end = f", {ends(timedelta(seconds=round((self.said - self.began) * left / done)))}" if left and done else ""
        print(f"step {state.global_step} of {state.max_steps}{self.scores}{end}", file=sys.stderr, flush=True)
