"""The README's numbers are those of the committed records."""

from __future__ import annotations

import runpy
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def test_the_readme_shows_the_tables_of_the_committed_records() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    filled = runpy.run_path(str(PROJECT / "benchmarks" / "readme.py"))["filled"]
    assert "fvae-lora |" in readme
    assert readme == filled(readme)
