"""A run's folder: what it holds, how it is written, and how it is locked against other processes.

`run.json` is the record, `metrics.jsonl` the learning curve, `adapter/` what was trained, `checkpoints/` what an
unfinished run resumes from. Every file is replaced completely or not at all; whenever the process is killed, the
folder is in a consistent state.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.places import portable_path, short_name
from fvae_lora_experiments.recipe import check_recipe, flatten
from fvae_lora_experiments.run.distributed import main_only
from fvae_lora_experiments.run.record import Event, Record, parse_events, parse_record
from fvae_lora_experiments.schema import WITHOUT_EFFECT, Recipe


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Replaces the file `path` by `contents` in one step that survives a crash."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(contents.encode() if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(OSError):
            part.unlink()
        raise


class RunFolder:
    """One run's folder. Of several processes of a run, only the main one changes it.

    Args:
        path: the folder; created when the run is locked.
    """

    def __init__(self, path: Path):
        self.path = path
        self.record_file = path / "run.json"
        self.metrics_file = path / "metrics.jsonl"
        self.predictions_file = path / "predictions.csv"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"

    @contextlib.contextmanager
    def locked(self, wait_s: float = 0) -> Iterator[None]:
        """Locks the folder for this process; the system releases the lock however the process ends.

        Args:
            wait_s: how long to wait for another process to release it.

        Raises:
            UserError: another process holds the lock, or the folder is not writable.
        """
        existed = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=wait_s)
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.path}: another process is using this run's folder") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to: {error.strerror}") from error
        try:
            yield
        finally:
            if not existed and not self.record_file.exists():
                Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            if not existed:
                with contextlib.suppress(OSError):  # not empty if a run has begun
                    self.path.rmdir()

    def read(self) -> Record | None:
        """The record, or None if there is none yet.

        Raises:
            UserError: it is not a complete record.
        """
        try:
            return parse_record(self.record_file.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.record_file}: {error.strerror}; nothing was changed") from error
        except ValueError as error:
            raise UserError(f"{self.record_file}: not a complete record: {error}; nothing was changed") from error

    def initial_record(self, recipe: Recipe, earlier: Record | None = None) -> Record:
        """The record at the start of a run: the recipe, and what an `earlier` start of the run has found out."""
        places = {"model": portable_path(recipe.model, self.path), "dataset": portable_path(recipe.dataset, self.path)}
        asked = Record(
            schema=1,
            state="running",
            reason=None,
            diverged=False,
            task=recipe.task,
            method=recipe.method,
            seed=recipe.seed,
            recipe=recipe.model_dump() | places,
        )
        if earlier is None:
            return asked
        return earlier.model_copy(update={key: getattr(asked, key) for key in asked.model_fields_set})

    def read_for(self, recipe: Recipe) -> Record | None:
        """The record, which must be of this recipe's run, or None if there is none yet.

        The paths of model and data may have changed; their contents are compared by fingerprint when they are opened.
        A finished run of fewer epochs is resumed if its checkpoints were kept, and its record says so.

        Raises:
            UserError: the folder holds a run of another recipe, or an incomplete record.
        """
        record = self.read()
        if record is None:
            return None
        earlier = check_recipe(record.recipe, str(self.record_file)).model_dump()
        there, here = flatten(earlier), flatten(self.initial_record(recipe).recipe)
        compared = sorted((there.keys() | here.keys()) - {"model", "dataset", *WITHOUT_EFFECT})
        others = [key for key in compared if there.get(key) != here.get(key)]
        if others == ["train.epochs"] and record.state == "complete" and there["train.epochs"] < here["train.epochs"]:
            return self._to_be_extended(record, there["train.epochs"], recipe)
        for key in others:
            raise UserError(
                f"{self.path}: holds a run of another recipe, {key} is {there.get(key)} there and "
                f"{here.get(key)} here; nothing was changed"
            )
        return record

    def _to_be_extended(self, record: Record, epochs: int, recipe: Recipe) -> Record:
        holds = f"{self.path}: holds a finished run of {epochs} epochs"
        elsewhere = f"another --out gets a run of {recipe.train.epochs}; nothing was changed"
        if not METHODS[recipe.method].resumable:
            raise UserError(f"{holds}, and {recipe.method} cannot go on from there; {elsewhere}")
        if self.last_checkpoint() is None:
            raise UserError(f"{holds} without its checkpoints, which train.keep_checkpoints=true keeps; {elsewhere}")
        return record.model_copy(update={"state": "running", "extended_from": [*record.extended_from, epochs]})

    @main_only
    def write(self, record: Record) -> None:
        """Replaces the record."""
        self._replace(record)

    def mark_failed(self, reason: str, opening: Record | None = None, diverged: bool = False) -> None:
        """Marks the record of a run that had begun as failed; a half-written checkpoint is deleted to make room for it.

        Any process may do this: the main one may be waiting for the one that failed.

        Args:
            reason: why it failed.
            opening: the initial record if there is none yet; without it, none is written.
            diverged: whether it would fail the same way again.
        """
        with contextlib.suppress(OSError):
            self.drop_unfinished_checkpoints()
            if record := self.read() or opening:
                failed = {"state": "failed", "reason": reason, "diverged": diverged}
                self._replace(record.model_copy(update=failed))

    def _replace(self, record: Record) -> None:
        write_atomically(self.record_file, json.dumps(record.contents(), indent=1) + "\n")

    def restore(self, record: Record, events: Iterable[Event]) -> None:
        """Writes a record and a learning curve that were read from elsewhere."""
        self._replace_curve(events)
        self._replace(record)

    def _replace_curve(self, events: Iterable[Event]) -> None:
        write_atomically(self.metrics_file, "".join(map(_line, events)))

    @main_only
    def append(self, event: Event) -> None:
        """Adds one line to the learning curve."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_line(event))
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> list[Event]:
        """The learning curve, without a truncated last line; empty if there is no readable file."""
        try:
            return parse_events(self.metrics_file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return []

    @main_only
    def save_predictions(self, table: str) -> None:
        """Replaces what was predicted of the test split."""
        write_atomically(self.predictions_file, table)

    @main_only
    def rewind(self, step: int) -> None:
        """Removes the steps after `step` from the learning curve, because they will be repeated."""
        self._replace_curve([e for e in self.events() if e.step <= step and e.event != "test"])

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        whole = [c for c in self.checkpoints.glob("checkpoint-*") if (c / ".whole").exists()]
        return max(whole, key=checkpoint_step, default=None)

    @main_only
    def keep_checkpoints(self, *keep: int) -> None:
        """Marks the checkpoints of these steps as complete and removes all others."""
        for step in keep:
            (self.checkpoints / f"checkpoint-{step}" / ".whole").touch()
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            if checkpoint_step(checkpoint) not in keep:
                (checkpoint / ".whole").unlink(missing_ok=True)
                shutil.rmtree(checkpoint)

    @main_only
    def drop_unfinished_checkpoints(self) -> None:
        """Removes checkpoints whose writing was interrupted."""
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            if not (checkpoint / ".whole").exists():
                shutil.rmtree(checkpoint)

    @main_only
    def save_adapter(self, checkpoint: Path, base: str) -> None:
        """Copies the model's files from a checkpoint to `adapter/`, as the run's result.

        Where they contain `base`, the path of the base model on this machine, or its path when the checkpoint was
        written, it is replaced by its short name.
        """
        part = self.path / ".adapter.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file in checkpoint.iterdir():
            if file.suffix == ".safetensors" or file.name in ("adapter_config.json", "config.json", "README.md"):
                shutil.copyfile(file, part / file.name)
        config = part / "adapter_config.json"
        then = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"] if config.exists() else base
        for file in (*part.glob("*.json"), *part.glob("*.md")):
            text = file.read_text(encoding="utf-8")
            for place in filter(None, (then, base)):
                text = text.replace(place, short_name(base))
            file.write_text(text, encoding="utf-8")
        shutil.rmtree(self.adapter, ignore_errors=True)
        part.rename(self.adapter)


def _line(event: Event) -> str:
    return json.dumps(event.contents()) + "\n"


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
