"""A run that is stopped, however it is stopped, ends as if nothing had happened: equal to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fvae_lora_experiments import process
from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.run.trainer import FolderCallback, RunTrainer
from fvae_lora_experiments.schema import Recipe
from processes import CONTEXT, LIVELY, attempt, result, wait_for

Cli = Callable[..., tuple[int, str, str]]
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
        ("inside a checkpoint", 2),
        pytest.param("write", 1, marks=pytest.mark.slow),
        pytest.param("append", 3, marks=pytest.mark.slow),
        pytest.param("remove", 1, marks=pytest.mark.slow),
        pytest.param("save_adapter", 1, marks=pytest.mark.slow),
        pytest.param("append", 1, marks=pytest.mark.slow),
        pytest.param("inside a checkpoint", 1, marks=pytest.mark.slow),
        pytest.param("keep_checkpoints", 2, marks=pytest.mark.slow),
        pytest.param("write", 3, marks=pytest.mark.slow),
        pytest.param("write", 8, marks=pytest.mark.slow),
        pytest.param("remove", 4, marks=pytest.mark.slow),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(LIVELY, id="fvae-lora"),
        pytest.param(LIVELY | {"method": "full"}, id="full"),
        pytest.param(IMPATIENT, id="patience"),
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
    recipe, folder = make_recipe(**LIVELY | {"train": {"epochs": 12}}), tmp_path / "run"
    process = CONTEXT.Process(target=_main, args=(recipe, folder, tmp_path / "said"))
    process.start()
    wait_for(lambda: (folder / "metrics.jsonl").exists() and list(folder.glob("checkpoints/*/.whole")), process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    last = (tmp_path / "said").read_text().splitlines()[-1]
    assert last == "fvae-lora: stopped; the same command resumes where it was"
    assert json.loads((folder / "run.json").read_text())["state"] == "running"
    assert attempt(recipe, folder)
    assert result(folder) == undisturbed(recipe)


def _main(recipe: Recipe, folder: Path, said: Path) -> None:
    import sys

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    process.silence_libraries()
    sys.stderr = said.open("w")
    sys.exit(process.exit_code(lambda: run_recipe(recipe, folder, quiet=True)))


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
            run_recipe(recipe, folder, quiet=True)
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
        run_recipe(recipe, tmp_path, quiet=True)
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_of_validation_that_is_no_number_is_a_run_that_diverged(
    make_recipe: Callable[..., Recipe], tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = RunTrainer.training_step

    def poison(self: RunTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 7:  # the last step of the second epoch: training itself sees nothing of it
            monkeypatch.setattr(model.get_base_model().classifier, "forward", lambda x: x[..., :3] * value)
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", poison)
    with pytest.raises(RunError, match=r"the validation loss is nan at step 8"):
        run_recipe(make_recipe(), tmp_path, quiet=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["state"], record["diverged"]) == ("failed", True)
    assert record["reason"] == "the validation loss is nan at step 8"
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open() if "validation" in line] == [4]
    assert RunFolder(tmp_path).last_checkpoint() == tmp_path / "checkpoints" / "checkpoint-4"


def test_a_loss_of_the_test_split_that_is_no_number_is_a_run_that_diverged(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = RunTrainer.score

    def poison(self: RunTrainer, rows: Any, split: str) -> dict[str, float]:
        self.model.get_base_model().classifier.weight.data.fill_(float("nan"))
        return score(self, rows, split)

    monkeypatch.setattr(RunTrainer, "score", poison)
    with pytest.raises(RunError, match=r"the test loss is nan"):
        run_recipe(make_recipe(), tmp_path, quiet=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["state"], record["diverged"], record["reason"]) == ("failed", True, "the test loss is nan")


@pytest.fixture
def untested(
    make_recipe: Callable[..., Recipe], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Makes a run that is trained, and whose test split could then not be read; gives the folder of its first class."""

    def make(**changes: Any) -> Path:
        shutil.copytree(pictures, tmp_path / "data")
        picture = tmp_path / "data" / "test" / "red" / "0.png"
        save = RunFolder.save_adapter

        def and_spoil(self: RunFolder, *arguments: Any) -> None:
            save(self, *arguments)
            picture.write_bytes(picture.read_bytes()[:-30])

        recipe = make_recipe(dataset=str(tmp_path / "data"), **changes)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_adapter", and_spoil)
            with pytest.raises(RunError, match=r"0\.png: not a readable image"):
                run_recipe(recipe, tmp_path / "run", quiet=True)
        return picture.parent

    return make


def test_a_run_that_is_trained_is_finished_on_repaired_data_and_its_record_says_that_they_differ(
    untested: Callable[..., Path], make_recipe: Callable[..., Recipe], cli: Cli, tmp_path: Path
) -> None:
    folder, path = untested(), tmp_path / "run"
    before = json.loads((path / "run.json").read_text())
    assert before["state"] == "failed"
    (folder / "0.png").unlink()
    recipe = make_recipe(dataset=str(tmp_path / "data"))
    with pytest.raises(
        UserError, match=r"not what the run was started with .*; its training is complete: fvae-lora eva"
    ):
        run_recipe(recipe, path, quiet=True)
    assert json.loads((path / "run.json").read_text()) == before, "nothing was changed"

    code, out, err = cli("evaluate", path)
    assert code == 0, err
    refusal = "dataset data: not what the run was started with (data, other contents)"
    assert f"fvae-lora: warning: {refusal}; the record says so\n" in err
    record = json.loads((path / "run.json").read_text())
    assert (record["state"], record["reason"]) == ("complete", None)
    assert out.count(f"{record['metrics']['test']['loss']:.6f}") == 2
    changed = record["dataset"].pop("tested_on")
    assert record["dataset"] == before["dataset"], "what it was trained on stays"
    assert changed["splits"] == before["dataset"]["splits"] | {"test": 11}
    assert changed["fingerprint"] != before["dataset"]["fingerprint"]
    assert not (path / "checkpoints").exists()
    code, again, _ = cli("evaluate", path)
    assert (code, out.endswith(again)) == (0, True), "it is scored on these from now on"
    (folder / "1.png").unlink()
    assert cli("evaluate", path)[0] == 2


def test_a_run_that_is_trained_ends_as_undisturbed_where_the_data_are_as_before(
    untested: Callable[..., Path], pictures: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = untested(method="fvae-lora")
    shutil.copy(pictures / "test" / "red" / "0.png", folder)
    evaluate(tmp_path / "run", quiet=True)
    recipe = make_recipe(method="fvae-lora", dataset=str(tmp_path / "data"))
    run_recipe(recipe, tmp_path / "alone", quiet=True)
    assert result(tmp_path / "run") == result(tmp_path / "alone")


def test_a_run_with_cached_states_is_finished_on_repaired_data(
    untested: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "cache"))
    folder = untested(adapter={"layers": [1]}, train={"cache_frozen": True})
    shutil.copy(folder / "1.png", folder / "0.png")
    scores = evaluate(tmp_path / "run", quiet=True)
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "other"))
    assert evaluate(tmp_path / "run", quiet=True) == scores


def test_a_run_is_not_finished_on_data_of_other_classes_nor_before_it_is_trained(
    untested: Callable[..., Path], make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder, path = untested(), tmp_path / "run"
    for split in ("train", "test"):
        (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / "crimson")
    (folder.parent / "crimson" / "0.png").unlink()
    with pytest.raises(UserError, match=r"other contents.*, and other classes"):
        evaluate(path, quiet=True)
    shutil.rmtree(path / "checkpoints" / "checkpoint-8")
    with pytest.raises(UserError, match=r"run: no finished run; its state is failed"):
        evaluate(path, quiet=True)
    with pytest.raises(UserError, match=r"other contents\)$"):
        run_recipe(make_recipe(dataset=str(tmp_path / "data")), path, quiet=True)
