"""Several processes do one run, and its record means what it would mean of one."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchrun_worker
from fvae_lora_experiments.process import exit_code, silence_libraries
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.run.trainer import RunTrainer
from fvae_lora_experiments.schema import Recipe
from processes import CONTEXT, LIVELY, assert_alike, result
from torchrun import torchrun

WITHOUT_NOISE = ("lora", "linear-probe", "adalora")


def without_noise(method: str) -> dict[str, Any]:
    """Three steps an epoch; three rows to validate on, so that the second process gets none."""
    return {"method": method, "adapter": {"dropout": 0}, "data": {"train_rows": 24}}


def together(folder: Path, recipes: dict[str, Recipe], die: tuple[str, int] | None = None) -> tuple[int, str]:
    """Does the runs in two processes, each in its folder; exit code and standard error."""
    jobs = [
        {"recipe": recipe.model_dump(), "folder": str(folder / name), "die": die} for name, recipe in recipes.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(torchrun_worker.__file__, str(folder / "jobs.json"))
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def done(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch for all that nothing disturbs."""
    folder = tmp_path_factory.mktemp("together")
    recipes = {method: make_recipe(**without_noise(method)) for method in WITHOUT_NOISE}
    code, errors = together(folder, recipes | {"lively": make_recipe(**LIVELY)})
    assert code == 0, errors[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", WITHOUT_NOISE)
def test_two_processes_learn_and_score_what_one_does(
    make_recipe: Callable[..., Recipe], done: Path, tmp_path: Path, method: str
) -> None:
    run_recipe(make_recipe(**without_noise(method)), tmp_path / "alone", quiet=True)
    assert_alike(tmp_path / "alone", done / method)


@pytest.mark.slow
def test_the_adapter_of_two_processes_scores_in_one_what_they_recorded(done: Path) -> None:
    record = json.loads((done / "lively" / "run.json").read_text())
    assert record["state"] == "complete"
    assert evaluate(done / "lively", quiet=True) == pytest.approx(record["metrics"]["test"], rel=1e-6)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_command_line_resumes_it(
    make_recipe: Callable[..., Recipe], done: Path, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(**LIVELY), tmp_path / "run"
    code, _ = together(tmp_path, {"run": recipe}, die=("inside a checkpoint", 3))
    assert code == 1
    last = RunFolder(folder).last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-8", "killed in the third epoch of four steps"
    states = [torch.load(last / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in (0, 1)]
    assert not torch.equal(*states), "each process draws its own noise"

    (tmp_path / "recipe.yaml").write_text(recipe.model_dump_json())  # JSON is YAML
    program = str(Path(sys.executable).with_name("fvae-lora"))
    resumed = torchrun("--no-python", program, "train", str(tmp_path / "recipe.yaml"), "--out", str(folder))
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stdout.count("The run is in") == 1
    ours, theirs = result(folder), result(done / "lively")
    for adapter in (ours["adapter"], theirs["adapter"]):
        del adapter["adapter_config.json"]  # peft writes a set in it, in any order
    assert ours == theirs


def one_of_two(
    rank: int, port: int, said: Path, recipe: Recipe, folder: Path, fail: Callable[..., Any] | None = None
) -> None:
    """A process of a run that a launcher other than torchrun might start."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    silence_libraries()
    if fail is not None and rank == 1:
        RunTrainer.training_step = fail  # type: ignore[method-assign]
    sys.stderr = (said / f"{rank}.txt").open("w")
    sys.exit(exit_code(lambda: run_recipe(recipe, folder, quiet=True)))


def fall_over(trainer: RunTrainer, *_: Any, **__: Any) -> Any:
    raise RuntimeError(f"out of memory in {trainer.args.process_index}\nand much more")


def two_that_fail(
    said: Path, recipe: Recipe, folder: Path, fail: Callable[..., Any] | None = None
) -> tuple[int, list[str]]:
    """The exit code that is not 1, if any, and all that the two processes say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said.mkdir()
    both = [CONTEXT.Process(target=one_of_two, args=(rank, port, said, recipe, folder, fail)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    lines = [line for rank in (0, 1) for line in (said / f"{rank}.txt").read_text().splitlines()]
    return max(process.exitcode or 0 for process in both), lines


def test_a_batch_that_cannot_be_shared_out_is_refused_in_one_line(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    code, lines = two_that_fail(tmp_path / "said", make_recipe(train={"batch_size": 7}), tmp_path / "run")
    assert code == 2
    assert lines == [
        "fvae-lora: train.batch_size: 7 rows cannot be divided evenly among 2 processes; multiples of 2 are allowed"
    ]
    assert not (tmp_path / "run").exists()


def test_what_ends_one_process_is_said_once_and_recorded(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    code, lines = two_that_fail(tmp_path / "said", make_recipe(method="lora"), tmp_path / "run", fall_over)
    assert code == 1
    assert lines == [f"fvae-lora: {tmp_path / 'run'}: out of memory in 1"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["state"], record["reason"]) == ("failed", "out of memory in 1")


@pytest.mark.parametrize("command", ["compare", "demo"])
def test_commands_that_are_no_single_run_refuse_several_processes(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("fvae_lora_experiments.run.distributed.first_to_fail", lambda: True)
    code, _, errors = cli(command, "image/default")
    assert code == 2
    assert errors == f"fvae-lora: {command}: cannot run in several processes; torchrun is for train\n"
