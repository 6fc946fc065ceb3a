"""A worker of a search: it takes one trial after another until all have been begun."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.pruners import MedianPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.console import Console

from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.run.timing import eta
from fvae_lora_experiments.tasks import load_task
from fvae_lora_experiments.tune.space import Knob, starting_points
from fvae_lora_experiments.tune.study import DATA, METRIC, REASON, Journal, Plan, StudyFolder

UNPRUNED = 5
"""How many trials must be finished before others are pruned, beside the starting points, which are good ones."""


class SeededSampler(BaseSampler):
    """Optuna's TPE, whose random numbers depend on a seed and the trial's number alone.

    So a search that was stopped goes on as if it had not been, if one worker does it.
    """

    def __init__(self, seed: int):
        self.seed, self.number, self.tpe = seed, -1, TPESampler()

    def _of(self, trial: FrozenTrial) -> TPESampler:
        if trial.number != self.number:
            mixed = np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]
            self.number, self.tpe = trial.number, TPESampler(seed=int(mixed))
        return self.tpe

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """See `BaseSampler`."""
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)


@dataclass
class _Begun:
    """A trial that this process does."""

    trial: Trial
    values: dict[str, Any]
    lock: FileLock


@dataclass
class Progress:
    """How far the searches of a command are, and when they will have ended."""

    total: int
    """Trials of all methods."""
    done_before: int
    """Those that had ended when this command began."""
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def eta(self) -> str:
        """`ends 14:05, in 0:12:03`, by the trials that ended since; empty if nothing is known."""
        ended = self.done - self.done_before
        if ended <= 0 or self.done >= self.total:
            return ""
        elapsed = time.monotonic() - self.started
        return eta(timedelta(seconds=round(elapsed * (self.total - self.done) / ended)))


class Worker:
    """Does trials of one search, beside others that may do so in other processes or on other machines.

    Args:
        folder: the search's.
        plan: what is searched.
        trials: how many trials the search has.
        console: where progress is shown.

    Raises:
        UserError: the folder holds another search, or its journal is not readable.
    """

    def __init__(self, folder: StudyFolder, plan: Plan, trials: int, console: Console):
        self.folder, self.plan, self.trials, self.console = folder, plan, trials, console
        self.metric = load_task(plan.recipe).metric
        with folder.locked():
            if is_new := not folder.plan_file.exists():
                folder.journal.unlink(missing_ok=True)  # of a search that was killed while it began
            else:
                folder.refuse_others(plan)
            greater_is_better = self.metric.greater_is_better if is_new else None
            unpruned = UNPRUNED + len(points := starting_points(plan.recipe, plan.space))
            pruner = MedianPruner(unpruned, n_warmup_steps=plan.recipe.train.epochs // 2)
            self.journal = Journal(folder, greater_is_better, SeededSampler(plan.seed), pruner)
            self.study = self.journal.study
            if is_new:
                self.study.set_user_attr(METRIC, self.metric.name)
                for point in points:
                    self.study.enqueue_trial(point)
                folder.write_plan(plan)
        self.failures: dict[int, str] = {}
        """Of trials that failed here, which the next command tries again."""

    def done(self) -> int:
        """How many trials have ended."""
        return sum(trial.state.is_finished() for trial in self.journal.begun())

    def work(self, progress: Progress, after_each: Callable[[], object]) -> None:
        """Does trials until all have been begun.

        Args:
            progress: of all searches of the command.
            after_each: called when a trial has ended.

        Raises:
            UserError: the first trial was refused, and so would be all others.
        """
        others = progress.done - self.done()
        while begun := self._begin():
            try:
                line = self._do(begun)
            finally:
                begun.lock.release()
                clear_device_cache(garbage_collection=True)  # two models at once may be one too many
            progress.done = others + self.done()
            where = f"{self.plan.recipe.method} trial {begun.trial.number + 1}/{self.trials}"
            line = ", ".join(filter(None, (f"{where}: {line}", progress.eta())))
            self.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
            after_each()

    def _begin(self) -> _Begun | None:
        """A trial whose process is gone, or else a new one, if there is one left."""
        with self.folder.locked():
            known = self.journal.begun()
            for left in known:
                if left.state == TrialState.RUNNING and left.number not in self.failures:
                    lock = self.folder.claim(left.number)
                    if lock is not None:
                        return self._begun(self.journal.trial(left.number), lock)
            if len(known) >= self.trials:
                return None
            trial = self.study.ask()
            lock = self.folder.claim(trial.number)
            assert lock is not None, "nobody else can know of it"
            return self._begun(trial, lock)

    def _begun(self, trial: Trial, lock: FileLock) -> _Begun:
        return _Begun(trial, {key: _suggest(trial, key, knob) for key, knob in self.plan.space.items()}, lock)

    def _do(self, begun: _Begun) -> str:
        """Does a trial, and says how it ended."""
        trial, number = begun.trial, begun.trial.number
        for other in self.journal.begun():
            if other.state == TrialState.COMPLETE and other.params == trial.params:
                self.study.tell(number, other.value)
                return f"the same point as trial {other.number + 1}"
        run, recipe = self.folder.run(number), self.plan.trial_recipe(begun.values)
        try:
            record = run.read_for(recipe)
            if record is None or not (record.state in ("complete", "pruned") or record.diverged):
                with self.console.status("") as status:
                    reported = set(self.study.get_trials(deepcopy=False)[number].intermediate_values)
                    judge = _Judge(trial, self.plan, self.metric.name, reported, status.update)
                    record = run_recipe(recipe, run.path, quiet=True, judge=judge)
        except RunError as error:
            record = run.read()
            if record is None or not record.diverged:
                self.failures[number] = str(error)
                return f"failed: {error}"
        except UserError as error:
            if not any(other.state.is_finished() for other in self.journal.begun()):
                raise
            return self._end_without_score(number, f"refused: {error}")
        return self._end(number, record)

    def _end(self, number: int, record: Record) -> str:
        self._refuse_other_data(number, record)
        score = record.score if record.state == "complete" else None
        if score is None:
            how = "pruned" if record.state == "pruned" else "diverged"
            return self._end_without_score(number, f"{how}: {record.reason}")
        self.study.tell(number, score)
        best = self.study.best_trial
        said = "the best so far" if best.number == number else f"best {best.value:.4f} of trial {best.number + 1}"
        return f"{self.metric.name} {score:.4f}, {said}"

    def _refuse_other_data(self, number: int, record: Record) -> None:
        """The model and the data of all trials must be the same by contents, not only by name."""
        found = [record.model.fingerprint, record.dataset.fingerprint]
        known = self.study.user_attrs.get(DATA)
        if known is None:
            self.study.set_user_attr(DATA, found)
        elif known != found:
            run = self.folder.run(number).path
            raise UserError(
                f"{run}: done on another model or other data than the trials before; delete it to repeat it"
            )

    def _end_without_score(self, number: int, reason: str) -> str:
        trial = self.journal.trial(number)
        trial.set_user_attr(REASON, reason)
        self.study.tell(number, state=TrialState.PRUNED)
        return reason


class _Judge:
    """Reports the scores of a trial to its study, and ends it where the study's pruner says so."""

    def __init__(self, trial: Trial, plan: Plan, metric: str, reported: set[int], show: Callable[[str], None]):
        self.trial, self.plan, self.metric, self.reported, self.show = trial, plan, metric, reported, show

    def __call__(self, epoch: int, score: float) -> str | None:
        if epoch not in self.reported:
            self.trial.report(score, epoch)
        where = f"epoch {epoch} of {self.plan.recipe.train.epochs}, validation {self.metric} {score:.4f}"
        self.show(f"{self.plan.recipe.method} trial {self.trial.number + 1}: {where}")
        return f"{where}, worse than most at that epoch" if self.trial.should_prune() else None


def _suggest(trial: Trial, key: str, knob: Knob) -> Any:
    if knob.kind == "switch":
        return trial.suggest_categorical(key, [False, True])
    if knob.kind == "integer":
        return trial.suggest_int(key, int(knob.low), int(knob.high), log=knob.log)
    return trial.suggest_float(key, knob.low, knob.high, log=knob.log)
