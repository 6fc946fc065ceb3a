"""A run that is stopped, however it is stopped, ends as if nothing had happened: equal to the bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import CONTEXT, LIVELY, attempt, result

from fvae_lora.experiments import cli
from fvae_lora.experiments.errors import RunError
from fvae_lora.experiments.recipe import Recipe
from fvae_lora.experiments.run_folder import RunFolder
from fvae_lora.experiments.runner import run
from fvae_lora.experiments.training import FolderCallback

IMPATIENT = LIVELY | {"train": {"epochs": 30, "learning_rate": 1e-9, "patience": 4}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], dict[str, Any]]:
    done: dict[str, dict[str, Any]] = {}

    def of(recipe: Recipe) -> dict[str, Any]:
        key = recipe.model_dump_json()
        if key not in done:
            # as deep below the data as the runs that it is compared with, for their records name the data relatively
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert attempt(recipe, folder)
            done[key] = result(folder)
        return done[key]

    return of


Undisturbed = Callable[[Recipe], dict[str, Any]]


@pytest.mark.parametrize(
    ("place", "calls"),
    [
        ("write", 1),
        ("append", 1),
        ("append", 3),
        ("inside a checkpoint", 1),
        ("inside a checkpoint", 2),
        ("keep_checkpoints", 2),
        ("write", 3),
        ("remove", 1),
        ("save_adapter", 1),
        ("write", 8),
        ("remove", 4),
    ],
)
def test_killed_at_a_delicate_moment(
    make_recipe: Callable[..., Recipe], undisturbed: Undisturbed, tmp_path: Path, place: str, calls: int
) -> None:
    recipe, folder = make_recipe(**LIVELY), tmp_path / "run"
    assert not attempt(recipe, folder, die=(place, calls)), "it was to die there"
    assert not (folder / "run.json").exists() or json.loads((folder / "run.json").read_text())["state"] == "running"
    assert attempt(recipe, folder)
    assert result(folder) == undisturbed(recipe)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(LIVELY, id="fvae-lora"),
        pytest.param(LIVELY | {"method": "full"}, id="full"),
        pytest.param(IMPATIENT, id="patience", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(
    make_recipe: Callable[..., Recipe], undisturbed: Undisturbed, tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe, folder = make_recipe(**changes), tmp_path / "run"
    expected = undisturbed(recipe)
    began = time.monotonic()
    assert attempt(recipe, tmp_path / "timed" / "run")
    duration = time.monotonic() - began
    kills = 0
    while not attempt(
        recipe, folder, random.uniform(0.2, 0.9) * duration * (1 + kills / 10)
    ):  # a machine may get busier
        kills += 1
        assert kills < 30, "it never gets on"
    assert result(folder) == expected


def test_ctrl_c_says_how_to_go_on(make_recipe: Callable[..., Recipe], undisturbed: Undisturbed, tmp_path: Path) -> None:
    recipe, folder = make_recipe(**LIVELY | {"train": {"epochs": 40}}), tmp_path / "run"
    process = CONTEXT.Process(target=_main, args=(recipe, folder, tmp_path / "said"))
    process.start()
    while not (folder / "metrics.jsonl").exists() or not list(folder.glob("checkpoints/*/.whole")):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last == "fvae-lora: stopped; the same command goes on where it was"
    assert json.loads((folder / "run.json").read_text())["state"] == "running"
    assert attempt(recipe, folder)
    assert result(folder) == undisturbed(recipe)


def _main(recipe: Recipe, folder: Path, said: Path) -> None:
    import sys

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    cli.hush()
    sys.stderr = said.open("w")
    sys.exit(cli.exit_code(lambda: run(recipe, folder, quiet=True)))


def test_a_loss_that_is_no_number_names_step_and_layer_and_keeps_the_checkpoint(
    make_recipe: Callable[..., Recipe], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(**LIVELY), tmp_path / "run"

    def poison(self: FolderCallback, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 9:  # in the third epoch of four steps
            layer = model.get_submodule("base_model.model.vit.layers.1.attention.k_proj")
            next(p for name, p in layer.named_parameters() if "encoder1" in name).data.fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FolderCallback, "on_step_begin", poison)
        with pytest.raises(RunError, match=r"the loss is nan at step 10: vit\.layers\.1\.attention\.k_proj has .*nan"):
            run(recipe, folder, quiet=True)
    record = json.loads((folder / "run.json").read_text())
    assert record["state"] == "failed"
    assert "step 10: vit.layers.1.attention.k_proj" in record["reason"]
    last = RunFolder(folder).last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-8"
    assert attempt(recipe, folder)
    assert result(folder) == undisturbed(recipe)


def test_a_learning_rate_that_explodes_is_one_line(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(method="full", train={"learning_rate": 1e30, "max_grad_norm": 0})
    with pytest.raises(RunError, match=r"(the loss is (nan|inf) at step|the gradient's norm is (nan|inf) at step) \d"):
        run(recipe, tmp_path, quiet=True)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"
