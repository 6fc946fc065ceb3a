"""A run that was moved, or that goes on under other libraries, is still the run that it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from finished_runs import stopping_after_first_epoch
from fvae_lora_experiments.run.record import parse_record
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe

Cli = Callable[..., tuple[int, str, str]]


def test_a_run_folder_that_was_moved_evaluates_predicts_reports_and_is_exported_and_pushed(
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
    code, out, error = cli("predict", moved, data / "test", "--model", vit)
    assert (code, error, out.count("\n")) == (0, "", 13)
    code, _, error = cli("export", moved, "--model", vit, "--out", tmp_path / "small")
    assert (code, error) == (0, "")
    assert cli("push", moved, "me/mine", "--dry-run")[0] == 0
    assert (moved / "run.json").read_bytes() == before


@pytest.fixture
def stopped(cli: Cli, small: list[str], tmp_path: Path) -> Sequence[str | Path]:
    """The command of a run that failed after its first epoch, in `tmp_path`."""
    train = ("train", "image/default", *small, "--method", "lora", "--out", tmp_path, "--quiet")
    with stopping_after_first_epoch():
        assert cli(*train)[0] == 1
    return train


def test_a_run_that_goes_on_under_other_versions_says_which(
    cli: Cli, stopped: Sequence[str | Path], tmp_path: Path
) -> None:
    file = tmp_path / "run.json"
    record = json.loads(file.read_text())
    now = record["versions"]["peft"]
    record["versions"] |= {"peft": "0.20.0", "a-package-of-old": "1"}
    file.write_text(json.dumps(record))
    code, _, error = cli(*stopped)
    assert code == 0
    assert f"fvae-lora: warning: {tmp_path}: was begun under peft 0.20.0 (now {now}); what follows may differ" in error
    done = parse_record(file.read_bytes())
    assert (done.state, done.versions["peft"], done.earlier_versions) == ("complete", now, [{"peft": "0.20.0"}])


def test_a_run_that_goes_on_under_the_same_versions_says_nothing(
    cli: Cli, stopped: Sequence[str | Path], tmp_path: Path
) -> None:
    assert cli(*stopped)[::2] == (0, "")
    assert "earlier_versions" not in json.loads((tmp_path / "run.json").read_text())
