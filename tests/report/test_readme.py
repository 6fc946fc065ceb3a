"""The numbers of the README and of the studies' pages are those of the committed runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.archive import read_runs

PROJECT = Path(__file__).parents[2]


README = runpy.run_path(str(PROJECT / "benchmarks" / "readme.py"))


@pytest.mark.parametrize("page", sorted(README["PAGES"]), ids=lambda page: str(page.relative_to(PROJECT)))
def test_a_page_shows_the_tables_of_the_committed_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert ":begin -->" in text
    assert text == README["filled"](page)


def recipes_of(study: Path) -> dict[Path, str]:
    """The files of a study's runs, and the recipe of each: `NAME.yaml` of `NAME-runs.jsonl.gz`."""
    named = {
        file: study / f"{file.name.removesuffix('runs.jsonl.gz').rstrip('-') or 'recipe'}.yaml"
        for file in study.glob("*runs.jsonl.gz")
    }
    return {file: str(recipe) if recipe.exists() else "image/demo" for file, recipe in named.items()}


def test_each_study_has_its_runs_a_page_and_a_recipe_from_which_they_come() -> None:
    studies = [folder for folder in (PROJECT / "studies").iterdir() if folder.is_dir()]
    assert len(studies) >= 10
    for study in studies:
        assert study / "README.md" in README["PAGES"], study.name
        for file, recipe in recipes_of(study).items():
            of_method = {run.record.method: run.recipe for run in read_runs(file) if run.record}
            for method, known in of_method.items():
                asked = load_recipe(recipe, options={"method": method, "model": "any", "dataset": "any"}).model_dump()
                for section in ("data", "image", "text", "speech", "commonsense"):
                    assert asked[section] == known[section], f"{study.name}: {method}: {section}"


@pytest.mark.parametrize(
    ("name", "study", "data"),
    [
        ("hutto-sentiment", "minilm", "hutto-sentiment"),
        ("spam-assassin", "minilm-spam", "spam-assassin"),
        ("openclipart-20", "clip", "openclipart-20"),
        ("openclipart-15", "clip", "openclipart-20"),
        ("elpv", "clip", "elpv"),
        ("elpv-mono", "clip", "elpv"),
    ],
)
def test_the_study_of_uncertainty_has_the_rates_that_other_studies_chose(name: str, study: str, data: str) -> None:
    for method in ("lora", "dora", "fvae-no-elbo", "fvae-lora"):
        asked = load_recipe(
            str(PROJECT / "studies" / "uncertainty" / f"{name}.yaml"),
            options={"method": method, "model": "any", "dataset": "any"},
        )
        chosen = {
            run.recipe["train"]["learning_rate"]
            for run in read_runs(PROJECT / "studies" / study)
            if run.record
            and not run.record.is_selection
            and run.record.dataset.name == data
            and [run.recipe[key] for key in ("method", "fvae", "ablation")]
            == [asked.model_dump()[key] for key in ("method", "fvae", "ablation")]
        }
        assert chosen == {asked.train.learning_rate}, method


def test_the_studies_are_small() -> None:
    assert sum(file.stat().st_size for file in (PROJECT / "studies").rglob("*.gz")) < 3e6
