"""A run that was moved, or that goes on under other libraries, is still the run that it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finished_runs import stop_after_first_epoch
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe

Cli = Callable[..., tuple[int, str, str]]


def test_a_run_folder_that_was_moved_evaluates_reports_and_is_pushed(
    make_recipe: Callable[..., Recipe], cli: Cli, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(pictures, tmp_path / "here" / "data")
    record = run_recipe(make_recipe(method="fvae-lora", dataset=str(data)), tmp_path / "here" / "run", quiet=True)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    moved = (tmp_path / "here" / "run").rename(tmp_path / "elsewhere" / "deep" / "run")
    before = (moved / "run.json").read_bytes()

    code, _, error = cli("evaluate", moved, "--model", vit)
    assert code == 2
    assert error.endswith("/data: no such file or folder any more; --dataset says where it is now\n")
    code, out, error = cli("evaluate", moved, "--model", vit, "--dataset", data)
    assert code == 0, error
    assert out.count(f"{record.metrics.test['loss']:.6f}") == 2
    code, out, error = cli("report", moved.parent)
    assert code == 0, error
    assert f"{100 * record.metrics.test['accuracy']:.2f}" in out
    assert cli("push", moved, "me/mine", "--dry-run")[0] == 0
    assert (moved / "run.json").read_bytes() == before


@pytest.fixture
def stopped(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """The recipe of a run that was stopped after its first epoch, in `tmp_path`."""
    recipe = make_recipe()
    stop_after_first_epoch(recipe, tmp_path)
    return recipe


def test_a_run_that_goes_on_under_other_versions_says_which(
    stopped: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    record = json.loads(file.read_text())
    now = record["versions"]["peft"]
    record["versions"] |= {"peft": "0.20.0", "a-package-of-old": "1"}
    file.write_text(json.dumps(record))
    done = run_recipe(stopped, tmp_path, quiet=True)
    line = f"fvae-lora: warning: {tmp_path}: was begun under peft 0.20.0 (now {now}); what follows may differ"
    assert line in capsys.readouterr().err
    assert (done.state, done.versions["peft"], done.earlier_versions) == ("complete", now, [{"peft": "0.20.0"}])


def test_a_run_that_goes_on_under_the_same_versions_says_nothing(
    stopped: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_recipe(stopped, tmp_path, quiet=True)
    assert capsys.readouterr().err == ""
    assert "earlier_versions" not in done.contents()
