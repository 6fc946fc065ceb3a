"""docs/paper.md: its tables are those that the code makes now, and its commands work."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fvae_lora_experiments.cli import app
from fvae_lora_experiments.places import DATA_ROOT
from fvae_lora_experiments.process import exit_code
from fvae_lora_experiments.recipe import shipped_studies
from fvae_lora_experiments.study import load_study

PROJECT = Path(__file__).parents[2]
TEXT = (PROJECT / "docs" / "paper.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^fvae-lora compare .*", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def writer() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(PROJECT / "benchmarks"), *sys.path])
        yield runpy.run_path(str(PROJECT / "benchmarks" / "paper.py"))


def block(name: str) -> str:
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    return TEXT.partition(begin)[2].partition(end)[0]


@pytest.mark.slow
@pytest.mark.parametrize("study", shipped_studies())
def test_the_page_shows_what_a_study_takes_as_a_dry_run_counts_it(writer: dict[str, Any], study: str) -> None:
    assert block(f"{study} cost") == writer["BLOCKS"][f"{study} cost"]()


def test_the_page_shows_the_papers_figures_and_ours(writer: dict[str, Any]) -> None:
    names = [name for name in writer["BLOCKS"] if not name.endswith("cost")]
    assert len(names) == 9
    for name in names:
        assert block(name) == writer["BLOCKS"][name]()


def test_each_study_has_its_section_with_one_command_and_its_data() -> None:
    for name in shipped_studies():
        assert any(f" {name} " in command for command in COMMANDS), name
        study = load_study(name)
        for folder in study.datasets.values():
            assert f"`DIR/{folder}`" in TEXT
        assert not study.datasets or f"compare {name} --data-root DIR" in TEXT


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a dry run of one method and one seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(DATA_ROOT, "")
    (tmp_path / "DIR").mkdir()
    words = [word for word in shlex.split(command)[1:] if word != "--dry-run"]
    less = ["--dry-run", "--methods", "lora", "--seeds", "1"]
    assert exit_code(lambda: app([*words, *less], standalone_mode=False)) == 0
    assert f"Runs to do: {len(load_study(words[1]).recipes)}; done already: 0" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["DIR"]
