"""Sweeps in processes of their own, which start fast and can be killed, and what a sweep leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from arguments import later_wins
from fvae_lora_experiments import cli, process, signals
from processes import CONTEXT, wait_for


class Compare:
    """`fvae-lora compare` with two jobs, writing to `out`; what it prints goes to a file beside `out`."""

    COMMAND: Sequence[str] = ("compare", "image/default", "--jobs", "2")

    def __init__(self, out: Path, options: Sequence[str | Path], said: str = "said"):
        self.out = out
        self.said_file = out.with_suffix(f".{said}")
        arguments = later_wins([*self.COMMAND, *options, "--out", out])
        self.process = CONTEXT.Process(target=_compare, args=(arguments, self.said_file, dict(os.environ)), daemon=True)
        self.process.start()

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self.said_file.read_text() if self.said_file.exists() else ""

    def workers(self) -> list[psutil.Process]:
        """Its processes that do runs."""
        assert self.process.pid is not None
        return psutil.Process(self.process.pid).children()

    def lasts(self, seconds: float | None) -> bool:
        """Whether it is still at work after so many seconds; None is for ever."""
        self.process.join(seconds)
        return self.process.is_alive()

    def wait_for(self, what: Callable[[], object]) -> None:
        """Until `what` it does can be seen."""
        try:
            wait_for(what, self.process)
        except AssertionError as error:
            raise AssertionError(self.said) from error

    def wait_for_runs(self, count: int) -> None:
        """Until so many runs have begun to train."""
        self.wait_for(lambda: len(list(self.out.rglob("metrics.jsonl"))) >= count)

    def end(self) -> int | None:
        """Waits for its end; its exit code."""
        self.process.join()
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        """Sends it a signal, and waits for its end; its exit code."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(self.process.pid, number)
        return self.end()


class Tune(Compare):
    """`fvae-lora tune`."""

    COMMAND = ("tune", "image/default")


def _compare(arguments: list[str], said: Path, env: dict[str, str]) -> None:
    os.environ.update(env)  # the server that processes are forked from may be older than what a test has set
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    signals.exit_on_signal()
    sys.stdout = sys.stderr = cli.console.file = said.open("w", buffering=1)
    sys.exit(process.exit_code(lambda: cli.app(arguments, standalone_mode=False)))


def left(out: Path) -> dict[str, Any]:
    """All that the runs of a sweep leave, but what it cost, by the run's name."""
    runs = {}
    for folder in sorted(file.parent for file in out.rglob("run.json")):
        record = json.loads((folder / "run.json").read_text())
        for key in ("time", "memory", "git_commit"):
            record.pop(key, None)
        # not the adapter's configuration: peft writes the target modules, a set, in any order
        weights = {file.name: file.read_bytes() for file in sorted((folder / "adapter").glob("*.safetensors"))}
        files = {"curve": (folder / "metrics.jsonl").read_text(), "weights": weights}
        names = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        runs[str(folder.relative_to(out))] = {"record": record, "names": names, **files}
    return runs


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Compares what two sweeps left, one thing at a time: a difference in bytes of weights would fill the screen."""
    assert a.keys() == b.keys()
    for name, run in a.items():
        for what in ("record", "curve", "names"):
            assert run[what] == b[name][what], name
        assert run == b[name], f"{name}: other weights"


def states(out: Path) -> dict[str, str]:
    """The state of each run, by its name."""
    return {file.parent.name: json.loads(file.read_text())["state"] for file in out.rglob("run.json")}


def assert_survives(
    kills: int, folder: Path, options: Sequence[str | Path], workers: Callable[[Compare], list[Callable[[], object]]]
) -> None:
    """Kills sweeps at random moments, restarts each, and sees that they end as an undisturbed one does, to the bit.

    A sweep that comes to its end before there were enough `kills` is followed by another.

    Args:
        kills: how many, about half of them of sweeps and half of workers.
        folder: where to.
        options: of the sweeps.
        workers: what kills the workers that a sweep has at the moment, one by one.
    """
    began = time.monotonic()
    undisturbed = Compare(folder / "undisturbed", options)
    assert undisturbed.end() == 0, undisturbed.said
    duration = time.monotonic() - began
    expected = left(folder / "undisturbed")
    while kills > 0:
        out = folder / f"{kills}-kills-left"
        while (sweep := Compare(out, options)).lasts(random.uniform(0, 0.7) * duration if kills > 0 else None):
            if random.random() < 0.5 and (alive := workers(sweep)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    random.choice(alive)()
                    kills -= 1
                for _ in range(40):
                    if "killed by SIGKILL" in sweep.said or not sweep.lasts(0.1):
                        break
                sweep.kill(signal.SIGINT)
            else:
                kills -= sweep.kill() == -signal.SIGKILL
        assert sweep.end() == 0, sweep.said
        assert_same(expected, left(out))
