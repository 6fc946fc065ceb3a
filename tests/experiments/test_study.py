"""Studies: a table of the paper by its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from arguments import assert_refused
from fvae_lora_experiments.data.spurious import CELEBA, SPUCO_ANIMALS, WATERBIRDS
from fvae_lora_experiments.data.timit import PHONES
from fvae_lora_experiments.forecast import GPU, forecast
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.places import DATA_ROOT
from fvae_lora_experiments.published import configuration_of, data_of, published_data
from fvae_lora_experiments.recipe import load_recipe, shipped_studies
from fvae_lora_experiments.report.paper import paper
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.study import Study, load_study
from fvae_lora_experiments.sweep.plan import PlannedRun, runs_of
from hub import write_data_sets

Cli = Callable[..., tuple[int, str, str]]


def planned(name: str, out: Path) -> list[PlannedRun]:
    study = load_study(name)
    return runs_of(study.contenders(out, study.methods), study.seeds)


@pytest.mark.parametrize("name", shipped_studies())
def test_a_study_is_its_recipes_times_its_methods_times_its_seeds(name: str, tmp_path: Path) -> None:
    study, runs = load_study(name), planned(name, tmp_path)
    asked = product(study.seeds, study.recipes, study.methods)
    for run, (seed, recipe, method) in zip(runs, asked, strict=True):
        place = f"{Path(recipe).stem}/" if len(study.recipes) > 1 else ""
        assert run.name == f"{place}{method}-seed{seed}"
        named = {"dataset": study.datasets[recipe]} if recipe in study.datasets else {}
        assert run.recipe == load_recipe(recipe, options={"method": method, "seed": seed, **named, **study.changes})


@pytest.mark.parametrize("name", shipped_studies())
def test_all_that_a_study_needs_is_known_beforehand(name: str, tmp_path: Path) -> None:
    for run in planned(name, tmp_path):
        assert data_of(run.recipe), run.recipe.dataset
        assert configuration_of(run.recipe.model), run.recipe.model
    assert load_study(name).methods == [m for m in load_study(name).methods if m in METHODS]


def test_the_published_sizes_are_those_that_reading_checks() -> None:
    for name, published in (("waterbirds", WATERBIRDS), ("celeba", CELEBA), ("spuco-animals", SPUCO_ANIMALS)):
        known = published_data()[name]
        assert known.classes == len(published.classes)
        assert known.rows == {split: sum(counts) for split, counts in published.counts.items()}
    assert published_data()["timit"].classes == len(PHONES)


def test_each_table_of_the_paper_has_a_study_with_its_methods() -> None:
    for table in paper()[1]:
        assert {*table.figures} == {*load_study(table.study).methods}, table.study


@pytest.mark.parametrize("change", [{"extra": 1}, {"seeds": []}, {"recipes": "image/dtd"}, {"methods": [[]]}])
def test_a_study_with_a_wrong_key_or_value_is_refused(change: dict[str, object]) -> None:
    tree = yaml.safe_load(shipped_studies()["paper/images"])
    Study.model_validate(tree)
    with pytest.raises(ValidationError):
        Study.model_validate(tree | change)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare", "paper/imags"], ("study paper/imags: no such study; allowed are paper/", "mean paper/images?")),
        (["compare", "paper/images,image/dtd"], ("a study is compared alone",)),
        (["compare", "paper/images", "--dataset", "x"], ("dataset: a study has its own", "--data-root DIR")),
        (["compare", "paper/images", "dataset=x"], ("dataset: a study has its own",)),
        (["compare", "paper/images", "train.epoch=x"], ("train.epoch: unknown key",)),
        (["compare", "paper/images", "--methods", "lorax"], ("method: expected one of",)),
        (["train", "paper/images"], ("recipe paper/images: a study", "fvae-lora compare paper/images")),
        (["tune", "paper/images"], ("recipe paper/images: a study",)),
    ],
)
def test_a_mistaken_request_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(cli(*arguments), *says)
    assert not list(tmp_path.iterdir())


def test_missing_data_are_named_with_where_to_get_them_before_anything_runs(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOT, "")
    root, out = tmp_path / "data", tmp_path / "runs"
    (root / "celeba").mkdir(parents=True)
    refused = cli("compare", "paper/spurious", "--data-root", root, "--out", out)
    assert_refused(refused, "2 of 3", "DIR/spuco-animals", "package spuco", "DIR/waterbirds", "metadata.csv")
    assert "DIR/celeba" not in refused[2]
    assert_refused(
        cli("compare", "paper/images", "--data-root", root, "--out", out), "tanganke/dtd", "DIR/tanganke/dtd"
    )
    assert not out.exists()


def test_recipes_lists_the_studies_and_shows_one(cli: Cli) -> None:
    _, listed, _ = cli("recipes")
    for name in shipped_studies():
        assert name in listed
    assert cli("recipes", "show", "paper/images")[1] == shipped_studies()["paper/images"]


def test_a_change_of_a_study_can_be_changed_again(tmp_path: Path) -> None:
    study = load_study("paper/commonsense")
    (run,) = runs_of(study.contenders(tmp_path, ["lora"], ["commonsense.test_sets=[piqa]"]), [1])
    assert run.recipe.commonsense.test_sets == ["piqa"]


def test_a_dry_run_needs_neither_data_nor_models_and_counts_what_is_done(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATA_ROOT, "")
    dry = ("compare", "paper/speech", "--methods", "lora", "--dry-run", "--out", tmp_path)
    first = planned("paper/speech", tmp_path)[1]
    assert (first.recipe.method, first.recipe.seed) == ("lora", 1)
    folder = RunFolder(first.folder.path)
    folder.path.mkdir()
    folder.write(folder.initial_record(first.recipe).model_copy(update={"state": "complete"}))
    code, out, error = cli(*dry)
    assert (code, error) == (0, "")
    assert "Runs to do: 2; done already: 1" in out
    line = next(line.split() for line in out.splitlines() if line.startswith("lora"))
    assert line[2:4] == ["2", f"{2 * 30 * 231:,}"]  # 3,696 sentences in batches of 16
    assert float(line[-1]) > 0
    assert f"one {GPU} at 40%" in out
    slower = cli(*dry, "--flops-per-second", "1e12")[1]
    hours = next(line.split() for line in slower.splitlines() if line.startswith("lora"))[-1]
    assert float(hours) == pytest.approx(float(line[-1]) * 0.4 * 67e12 / 1e12, rel=0.01)
    assert [path.name for path in tmp_path.iterdir()] == [folder.path.name]


@pytest.mark.parametrize(
    ("study", "parameters"),
    [
        ("paper/images", 85_800_000),
        ("paper/glue", 124_650_000),
        ("paper/speech", 315_450_000),
        ("paper/commonsense", 8_030_000_000),
    ],
)
def test_the_shipped_configurations_are_those_of_models_of_that_size(study: str, parameters: int) -> None:
    (run,) = runs_of(load_study(study).contenders(Path("runs"), ["lora"])[:1], [1])
    found = forecast(run.recipe, published=True)
    width = 2 if run.recipe.train.precision == "bf16" else 4
    assert (found.state - 16 * found.trainable) / width == pytest.approx(parameters, rel=0.005)
    assert found.flops


@pytest.mark.slow
def test_a_study_runs_reports_the_papers_figures_and_resumes(cli: Cli, vit: Path, tmp_path: Path) -> None:
    write_data_sets(tmp_path)
    small = ("train.epochs=1", "train.batch_size=8", "adapter.r=4", "image.augmentation=[]")
    study = ("compare", "paper/images", *small, "--model", vit, "--data-root", tmp_path / "datasets")
    study = (*study, "--methods", "lora,fvae-lora", "--seeds", "1", "--out", tmp_path / "runs")
    code, _, error = cli(*study)
    assert code == 0, error
    records = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("run.json")}
    assert len(records) == 12
    markdown = cli("report", tmp_path / "runs") and (tmp_path / "runs" / "report.md").read_text(encoding="utf-8")
    assert "paper, accuracy %" in markdown
    assert re.search(r"\| lora \|.*\| 74\.65 \| −\d+\.\d\d \|", markdown)
    assert cli(*study)[0] == 0
    assert {path: path.read_bytes() for path in records} == records
