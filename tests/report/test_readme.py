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


def test_each_study_has_its_runs_a_page_and_a_recipe_from_which_they_come() -> None:
    studies = [folder for folder in (PROJECT / "studies").iterdir() if folder.is_dir()]
    assert len(studies) >= 10
    for study in studies:
        assert study / "README.md" in README["PAGES"], study.name
        recipe = "image/demo" if study.name == "demo" else str(study / "recipe.yaml")
        of_method = {run.record.method: run.recipe for run in read_runs(study) if run.record}
        for method, known in of_method.items():
            asked = load_recipe(recipe, options={"method": method, "model": "any", "dataset": "any"}).model_dump()
            for section in ("data", "image", "text", "speech", "commonsense"):
                assert asked[section] == known[section], f"{study.name}: {method}: {section}"


def test_the_studies_are_small() -> None:
    assert sum(file.stat().st_size for file in (PROJECT / "studies").rglob("*.gz")) < 2e6
