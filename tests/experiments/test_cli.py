"""What the commands say where nothing is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fvae_lora_experiments.recipe import RecipeKey, check_recipe, flatten, recipe_keys, shipped_recipes

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


def test_progress_is_bars_on_a_terminal_lines_in_a_log_and_nothing_where_it_is_not_wanted(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "cache"))
    train = ("train", "image/default", *small, "adapter.layers=[1]", "train.cache_frozen=true", "--method", "lora")
    code, out, err = cli(*train, "--out", tmp_path / "a")
    assert code == 0
    assert re.fullmatch(r"step 8 of 8, validation after epoch 2: loss \d\.\d{4}, accuracy \d\.\d{4}\n", err), err
    monkeypatch.setattr("fvae_lora_experiments.run.progress.REPORT_INTERVAL_S", 0)
    log = cli(*train, "--out", tmp_path / "b")[2].splitlines()
    assert [line.partition(" of 8")[0] for line in log] == [f"step {n}" for n in (*range(1, 9), 8)]
    assert re.search(r"step 6 of 8, validation after epoch 1: loss .*, accuracy .*, ends \d\d:\d\d, in \d:", log[5])
    for written in (out, err, *log):
        assert not {"\r", "\x1b"} & {*written}
    assert cli("evaluate", tmp_path / "a")[2] == ""
    assert cli(*train, "--out", tmp_path / "c", "--quiet")[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "it/s" in cli(*train, "--out", tmp_path / "d")[2]


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
    assert cli("recipes", "show", "image/default")[1] == shipped_recipes()["image/default"]
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
        (["compare", "image/demo", "method=lora"], "method: set by the comparison; use --methods"),
        (["compare", "image/demo", "seed=3"], "seed: set by the comparison; use --seeds"),
        (["compare", "image/demo", "dataset=a", "--dataset", "b"], "dataset: given twice"),
        (["compare", "image/demo", "adapter.r=2", "--vary", "adapter.r=2,4"], "adapter.r: given twice, as adapter.r=2"),
        (["compare", "image/demo", "adapter.r=2", "--grid", "adapter.r=2,4"], "adapter.r: given twice, as adapter.r=2"),
        (["compare", "image/demo", "--vary", "adapter.r=2", "--vary", "adapter.r=4"], "--vary adapter.r: given twice"),
        (["compare", "image/demo", "--vary", "adapter.r=2", "--grid", "adapter.r=4"], "also given in --vary"),
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


def test_help_is_shown_as_it_was_written(cli: Cli) -> None:
    code, out, _ = cli("compare", "--help")
    assert code == 0
    assert "time limit of a run, as minutes, H:M:S or D-H:M:S." in " ".join(out.split())
    assert "[KEY=VALUE]" in out


def test_the_command_alone_says_what_there_is_and_nothing_more(cli: Cli) -> None:
    code, out, err = cli()
    assert (code, err) == (2, "")
    assert out.startswith("Usage: ")
    assert "import-reference" in out
    assert not out.endswith("\n\n")


def test_names_are_shown_as_they_are(cli: Cli, small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "[bold]:smile:[/red]"
    code, said, err = cli("train", "image/default", *small, "--method", "linear-probe", "--out", out, "--quiet")
    assert code == 0, err
    assert str(out) in said.replace("\n", "")


def test_every_key_is_listed_with_its_default_what_is_allowed_and_what_it_means(cli: Cli) -> None:
    code, out, err = cli("recipes", "show", "--all")
    assert (code, err) == (0, "")
    listed = dict(re.findall(r"^(\S+): (.*)$", out, re.MULTILINE))
    complete = check_recipe({"model": "m", "dataset": "d"}, "test").model_dump()
    assert listed.keys() == flatten(complete).keys()
    defaults = {key: yaml.safe_load(value) for key, value in listed.items() if key not in ("model", "dataset")}
    assert defaults | {"model": "m", "dataset": "d"} == flatten(complete)
    assert "train.epochs: 30\n    # integer from 1\n    # Number of passes over the training split.\n" in out
    assert "train.warmup_ratio: 0.1\n    # number from 0 and below 1\n" in out
    assert "image.size: null\n    # integer from 1 or null\n" in out
    assert "data.protocol: clean\n    # clean, reported-on-validation, reference, reference-on-test\n" in out
    assert "adapter.layers: null\n    # list of 1 or more (integer from 0) or null\n" in out
    assert max(len(line) for line in out.splitlines()) <= 120


@pytest.mark.parametrize("key", recipe_keys(), ids=lambda key: key.name)
def test_every_key_has_a_meaning(key: RecipeKey) -> None:
    assert key.meaning.endswith(".")
    assert len(key.meaning) > 15
    assert key.allowed


def test_every_key_is_listed_as_a_recipe_has_it(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: image/demo\ntrain: {epochs: 3}\n")
    _, out, _ = cli("recipes", "show", tmp_path / "mine.yaml", "--all")
    assert "train.epochs: 3\n    # integer from 1; 30 by default\n" in out
    assert "model: vit-fashion-mnist\n    # text\n" in out
    assert cli("recipes", "show")[2] == "fvae-lora: recipes show: expected a recipe, or --all\n"
    assert cli("recipes", "show", "nope", "--all")[0] == 2


def test_ctrl_c_ends_a_command_with_one_line_and_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fvae_lora_experiments.demo.run_demo", interrupted)
    assert cli("demo") == (130, "", "fvae-lora: stopped; the same command resumes where it was\n")


def test_a_comparison_is_refused_before_any_of_its_runs_when_a_method_has_nothing_to_train(
    cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, _, err = cli("compare", "speech/whisper", "--model", "any", "--dataset", "any", "--out", tmp_path / "runs")
    assert code == 2
    assert err.endswith("method: a model that generates text has no head to train, got 'linear-probe'\n")
    assert not (tmp_path / "runs").exists()
