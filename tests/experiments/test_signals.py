"""Ctrl-C and SIGTERM, whenever they come: one line, and the exit code of a shell."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from fvae_lora_experiments import process, signals
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from processes import CONTEXT, LIVELY, attempt, result
from sweeps import Compare, left, states

LINE = "fvae-lora: stopped; the same command resumes where it was\n"
SIGNALS = [signal.SIGINT, signal.SIGTERM]

PROGRAM = """
import importlib.abc, os, signal, sys

number, moment = int(sys.argv.pop(1)), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored

class Signalling(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == moment:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Signalling())
sys.argv[0] = "fvae-lora"
from fvae_lora_experiments.__main__ import main
main()
"""
"""The command line in a process that is sent a signal when it begins to import a module."""


def signalled(number: int, moment: str, *arguments: str | Path) -> tuple[int, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number)), moment, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.returncode, done.stderr


def lines(text: str) -> Sequence[str]:
    """What the program itself says; a library may say something while it is imported."""
    return [line for line in text.splitlines(keepends=True) if "fvae-lora" in line or "Traceback" in line]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "moment",
    [
        "torch",
        pytest.param("fvae_lora", marks=pytest.mark.slow),
        pytest.param("peft", marks=pytest.mark.slow),
        pytest.param("transformers.modeling_utils", marks=pytest.mark.slow),
        pytest.param("fvae_lora_experiments.cli", marks=pytest.mark.slow),
        pytest.param("fvae_lora_experiments.recipe", marks=pytest.mark.slow),
        pytest.param("datasets", marks=pytest.mark.slow),
        pytest.param("transformers.trainer", marks=pytest.mark.slow),
        pytest.param("transformers.models.vit.modeling_vit", marks=pytest.mark.slow),
        pytest.param("fvae_lora_experiments.run.runner", marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_libraries_load_is_one_line(
    small: list[str], tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    train = ("train", "image/default", *small, "--out", tmp_path / "run", "--quiet")
    code, said = signalled(number, moment, *train)
    assert (code, lines(said)) == (128 + number, [LINE]), said
    assert not (tmp_path / "run").exists()


def _main(recipe: Recipe, folder: Path, said: Path, moment: str, number: int) -> None:
    owner, name = MOMENTS[moment]
    function = getattr(owner, name)
    calls = []

    def send(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, send)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.exit_on_signal()
    process.silence_libraries()
    signals.raise_on_signal()
    sys.stderr = said.open("w")
    sys.exit(process.exit_code(lambda: run_recipe(recipe, folder, quiet=True)))


MOMENTS: dict[str, tuple[Any, str]] = {
    "the record is written": (RunFolder, "write"),
    "the curve is written": (RunFolder, "append"),
    "checkpoints are swept": (RunFolder, "keep_checkpoints"),
    "a file is flushed": (os, "fsync"),
}


@pytest.fixture(scope="module")
def alone(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run leaves when nobody stops it."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert attempt(make_recipe(**LIVELY), folder)
    return result(folder)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("a file is flushed", signal.SIGTERM),
        pytest.param("the curve is written", signal.SIGINT, marks=pytest.mark.slow),
        *(
            pytest.param(moment, number, marks=pytest.mark.slow)
            for moment in ("the record is written", "checkpoints are swept")
            for number in SIGNALS
        ),
    ],
)
def test_a_run_that_is_told_to_stop_goes_on_where_it_was(
    make_recipe: Callable[..., Recipe], alone: dict[str, Any], tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    recipe, folder = make_recipe(**LIVELY), tmp_path / "run"
    process = CONTEXT.Process(target=_main, args=(recipe, folder, tmp_path / "said", moment, int(number)))
    process.start()
    process.join()
    assert process.exitcode == 128 + number
    assert (tmp_path / "said").read_text() == LINE
    assert json.loads((folder / "run.json").read_text())["state"] == "running"
    assert attempt(recipe, folder)
    assert result(folder) == alone


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_sweep_that_is_told_to_stop_leaves_no_process(
    small: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "s"
    sweep = Compare(out, [*small, "train.epochs=500", "--methods", "fvae-lora,lora", "--seeds", "1"])
    sweep.wait_for_runs(2)
    workers = sweep.workers()
    assert sweep.kill(number) == 128 + number
    assert sweep.said.endswith(LINE)
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert left(out)
    assert set(states(out).values()) == {"running"}


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = """
import os, signal, sys
from fvae_lora_experiments import signals
signal.signal(signal.SIGINT, signal.default_int_handler)
signals.exit_on_signal(); signals.raise_on_signal()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except signals.Terminated:
    os.kill(os.getpid(), signal.SIGINT)
    print("it goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", LINE)


def test_what_is_ignored_stays_ignored() -> None:
    program = """
import os, signal
from fvae_lora_experiments import signals
signal.signal(signal.SIGINT, signal.SIG_IGN)
signals.exit_on_signal(); signals.raise_on_signal()
os.kill(os.getpid(), signal.SIGINT)
print("it goes on")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "it goes on\n", "")
