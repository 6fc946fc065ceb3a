"""What the commands say where nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fvae_lora.experiments.recipe import recipe_file

Cli = Callable[..., tuple[int, str, str]]


def test_train_ends_with_a_table_that_fits_a_narrow_terminal(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cli("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "r", "--quiet")
    assert code == 0
    for column in ("accuracy", "trainable", "inference", "time", "memory", "lora"):
        assert column in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "The run is in" in out


def test_progress_bars_are_on_unless_they_are_not_wanted(cli: Cli, small: list[str], tmp_path: Path) -> None:
    loud = cli("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "a")
    silent = cli("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "b", "--quiet")
    assert "it/s]" in loud[2]
    assert silent[2] == ""


def test_a_run_has_a_folder_of_its_own_by_default(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("train", "image/default", *small, "--method", "linear-probe", "--seed", "3", "--quiet")[0] == 0
    assert (tmp_path / "runs" / "linear-probe-seed3" / "run.json").exists()


def test_report_writes_the_page_and_the_tables(cli: Cli, small: list[str], tmp_path: Path) -> None:
    cli("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "runs" / "r", "--quiet")
    code, out, _ = cli("report", tmp_path / "runs", "--out", tmp_path / "told")
    assert code == 0
    assert "lora" in out
    assert {p.name for p in (tmp_path / "told").iterdir()} == {"report.html", "report.csv", "report.md", "report.tex"}


def test_recipes_are_listed_shown_and_copied(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, listed, _ = cli("recipes")
    assert cli("recipes", "list")[1] == listed
    for name in ("image/default", "image/reference", "image/demo", "fvae-lora", "full", "sklearn-digits"):
        assert name in listed
    assert cli("recipes", "show", "image/default")[1] == recipe_file("image/default").read_text()
    assert cli("recipes", "copy", "image/default", "mine.yaml")[0] == 0
    (tmp_path / "mine.yaml").write_text((tmp_path / "mine.yaml").read_text().replace("seed: 1", "seed: 5"))
    assert cli("train", "mine.yaml", *small, "--method", "linear-probe", "--quiet")[0] == 0
    assert (tmp_path / "runs" / "linear-probe-seed5").exists()
    code, _, err = cli("recipes", "copy", "image/default", "mine.yaml")
    assert (code, err) == (2, "fvae-lora: mine.yaml: exists already\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "image/demo", "seed=1", "seed=2"], "seed: given twice, as seed=2 and as seed=1"),
        (["train", "image/demo", "seed=1", "--seed", "1"], "seed: given twice, as seed=1 and by an option (--seed, "),
        (["train", "image/demo", "method=lora", "--method", "full"], "method: given twice, as method=lora and by an"),
        (["train", "image/demo", "model=a", "--model", "b"], "model: given twice"),
        (["train", "image/demo", "dataset=a", "--dataset", "b"], "dataset: given twice"),
        (["train", "image/demo", "train={}", "train.epochs=1"], "train.epochs: given twice"),
        (["train", "image/demo", "--seed", "1", "--seed", "2"], "--seed: given twice"),
        (["compare", "image/demo", "--seeds", "1", "--seeds", "2"], "--seeds: given twice"),
        (["compare", "image/demo", "method=lora"], "method: runs of a comparison differ in it; --methods is for that"),
        (["compare", "image/demo", "seed=3"], "seed: runs of a comparison differ in it; --seeds is for that"),
        (["compare", "image/demo", "dataset=a", "--dataset", "b"], "dataset: given twice"),
        (["compare", "image/demo", "adapter.r=2", "--vary", "adapter.r=2,4"], "adapter.r: given twice, as adapter.r=2"),
        (["compare", "image/demo", "adapter.r=2", "--grid", "adapter.r=2,4"], "adapter.r: given twice, as adapter.r=2"),
        (["compare", "image/demo", "--vary", "adapter.r=2", "--vary", "adapter.r=4"], "--vary adapter.r: given twice"),
        (["compare", "image/demo", "--vary", "adapter.r=2", "--grid", "adapter.r=4"], "--vary has it too"),
    ],
)
def test_what_is_given_twice_is_refused(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(*arguments, exactly=True)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_a_command_with_one_line_and_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fvae_lora.experiments.demo.demo", interrupted)
    assert cli("demo") == (130, "", "fvae-lora: stopped; the same command goes on where it was\n")


def test_a_comparison_is_refused_before_any_of_its_runs_when_a_method_has_nothing_to_train(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = cli("compare", "speech/whisper", "--model", "any", "--dataset", "any", "--out", tmp_path / "runs")
    assert code == 2
    assert err.endswith("method: a model that writes has no head that this would train, got 'linear-probe'\n")
    assert not (tmp_path / "runs").exists()
