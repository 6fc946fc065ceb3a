"""Runs in processes of their own that can be killed; they start fast, because a server has imported everything."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from fvae_lora_experiments.process import silence_libraries
from fvae_lora_experiments.run import runner
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.schema import Recipe

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fvae_lora_experiments.run.runner", "fvae_lora_experiments.tasks.image", "sklearn"])

LIVELY: dict[str, Any] = {
    "method": "fvae-lora",
    "image": {"augmentation": ["random_resized_crop", "horizontal_flip"]},
    "adapter": {"dropout": 0.2},
    "train": {"epochs": 4, "log_every": 3},
}

PLACES = {
    "append": (RunFolder, "append"),
    "write": (RunFolder, "write"),
    "keep_checkpoints": (RunFolder, "keep_checkpoints"),
    "save_adapter": (RunFolder, "save_adapter"),
    "inside a checkpoint": (Trainer, "_save_rng_state"),
    "remove": (shutil, "rmtree"),
}


def do_run(recipe: Recipe, folder: Path, die: tuple[str, int] | None = None) -> None:
    """A run; with `die` its process is killed when it gets to that place for the n-th time."""
    if die is not None:
        owner, name = PLACES[die[0]]
        setattr(owner, name, _deadly(getattr(owner, name), die[1]))
    silence_libraries()
    runner.run_recipe(recipe, folder, quiet=True)


def _deadly(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = calls

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


def attempt(recipe: Recipe, folder: Path, seconds: float | None = None, die: tuple[str, int] | None = None) -> bool:
    """Whether the run came to its end; after so many `seconds` it is killed."""
    process = CONTEXT.Process(target=do_run, args=(recipe, folder, die))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode == 0


def wait_for(what: Callable[[], object], process: BaseProcess) -> None:
    """Until `what` a process does can be seen; an error where the process ends without."""
    while not what():
        process.join(0.02)
        assert process.is_alive() or what(), f"it ended, with exit code {process.exitcode}"


def result(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but what it cost and which commit it ran on."""
    record = json.loads((folder / "run.json").read_text())
    for key in ("time", "memory", "git_commit"):
        del record[key]
    files = {file.name: file.read_bytes() for file in sorted((folder / "adapter").iterdir())}
    names = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
    return {"record": record, "curve": (folder / "metrics.jsonl").read_text(), "adapter": files, "names": names}


def assert_alike(alone: Path, together: Path) -> None:
    """Compares what one process left with what two did: the same but for the order in which numbers were added."""
    one, two = result(alone), result(together)
    assert two["record"]["hardware"].pop("processes") == 2
    assert one["record"]["hardware"].pop("processes") == 1
    for left in (one, two):
        left["curve"] = [json.loads(line) for line in left["curve"].splitlines()]
        del left["record"]["hardware"]["threads"]
    assert len(two["curve"]) == len(one["curve"])
    for ours, theirs in zip(two["curve"], one["curve"], strict=True):
        assert ours.pop("event") == theirs.pop("event")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for part in ("validation", "test"):
        assert two["record"]["metrics"][part] == pytest.approx(one["record"]["metrics"].pop(part), rel=1e-5)
    del two["record"]["metrics"], one["record"]["metrics"]
    assert two["record"] == one["record"]
    assert two["names"] == one["names"]
    assert two["adapter"].keys() == one["adapter"].keys()
