"""The numbers of the README and of the results page are those of the committed records."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/results/README.md"])
def test_a_page_shows_the_tables_of_the_committed_records(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    filled = runpy.run_path(str(PROJECT / "benchmarks" / "readme.py"))["filled"]
    assert "fvae-lora |" in text
    assert text == filled(PROJECT / page)
