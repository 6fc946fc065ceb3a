"""The numbers of the README and of the pages of results are those of the committed records."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


README = runpy.run_path(str(PROJECT / "benchmarks" / "readme.py"))


@pytest.mark.parametrize("page", README["PAGES"], ids=lambda page: str(page.relative_to(PROJECT)))
def test_a_page_shows_the_tables_of_the_committed_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "±" in text
    assert text == README["filled"](page)
