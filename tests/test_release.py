"""A release: one version everywhere, and what cannot be released is refused before anything is changed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("packaging")
yaml = pytest.importorskip("yaml", reason="the experiments are not installed")

PROJECT = Path(__file__).parents[1]
RELEASE = runpy.run_path(str(PROJECT / "tools" / "release.py"))
TODAY = "2026-11-25"
WORKFLOWS = PROJECT / ".github" / "workflows"


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))


def commands(jobs: dict[str, Any]) -> Iterator[str]:
    for job in jobs.values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with what a release changes."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fvae-lora"\nversion = "0.1.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n### Added\n- All of it.\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> None:
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "something")


def put_in_step(root: Path, asked: str | None = None, today: str = TODAY) -> str:
    return RELEASE["put_in_step"](root, asked, today)


def assert_refused(root: Path, says: str, asked: str | None = None) -> None:
    before = git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD")
    with pytest.raises(RELEASE["ReleaseError"], match=re.escape(says)) as refused:
        put_in_step(root, asked)
    assert "\n" not in str(refused.value)
    assert (git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD")) == before


def test_what_has_the_version_has_the_same_one() -> None:
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert RELEASE["version_of"](PROJECT) == cited
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d\S*) - \d{4}-\d{2}-\d{2}$", changelog, re.MULTILINE)
    assert released[:1] in ([], [cited])
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE) == ["Unreleased", *released]


def test_a_release_dates_the_changelog_and_sets_the_version(checkout: Path) -> None:
    assert put_in_step(checkout, "0.2.0") == "0.2.0"
    assert (checkout / "pyproject.toml").read_text().endswith('version = "0.2.0"\n')
    assert (checkout / "CITATION.cff").read_text() == "cff-version: 1.2.0\nversion: 0.2.0\n"
    changelog = (checkout / "CHANGELOG.md").read_text()
    assert "## Unreleased\n\n## 0.2.0 - 2026-11-25\n\n### Added\n- All of it.\n" in changelog
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "log", "-1", "--format=%s") == "Version 0.2.0\n"


def test_a_release_that_failed_is_tried_again_on_the_same_day(checkout: Path) -> None:
    assert put_in_step(checkout) == "0.1.0"
    before = git(checkout, "rev-parse", "HEAD")
    assert put_in_step(checkout) == "0.1.0"
    assert git(checkout, "rev-parse", "HEAD") == before


def test_what_is_not_committed_is_not_released(checkout: Path) -> None:
    (checkout / "new.py").write_text("")
    assert_refused(checkout, "new.py is not committed; commit or remove all that is changed first, 1 in all")


def test_a_version_of_another_day_is_not_released(checkout: Path) -> None:
    put_in_step(checkout, today="2026-11-24")
    assert_refused(checkout, f"CHANGELOG.md has 0.1.0 of 2026-11-24, and today is {TODAY}")


def test_a_version_is_not_released_twice_nor_backwards(checkout: Path) -> None:
    git(checkout, "tag", "v0.1.0")
    assert_refused(checkout, "0.1.0 was released, as the tag v0.1.0 says; VERSION=... gives the next")
    assert_refused(checkout, "VERSION=0.0.9: expected one like 0.2.0, not before 0.1.0", "0.0.9")
    assert_refused(checkout, "VERSION=next: expected one like 0.2.0", "next")


def test_a_release_has_news(checkout: Path) -> None:
    put_in_step(checkout)
    assert_refused(checkout, "CHANGELOG.md says of nothing under Unreleased that could be released", "0.2.0")


def test_the_workflow_runs_what_a_change_must_pass_here() -> None:
    must_pass = re.findall(r"^make ([\w-]+)", (PROJECT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    jobs = workflow("ci.yml")["jobs"]
    assert jobs["linux"]["strategy"]["matrix"]["target"] == must_pass
    (make,) = (step for step in jobs["linux"]["steps"] if "make" in step.get("run", ""))
    assert f'make demo DEMO_FLAGS="{make["env"]["DEMO_FLAGS"]}"' in (PROJECT / ".ci" / "run").read_text()


def test_every_target_that_a_workflow_makes_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = set(workflow("ci.yml")["jobs"]["linux"]["strategy"]["matrix"]["target"])
    for name in ("ci.yml", "release.yml"):
        made |= {word for run in commands(workflow(name)["jobs"]) for word in re.findall(r"\bmake ([a-z][\w-]*)", run)}
    assert {"dist", "test"} <= made <= targets


def test_the_workflows_hold_no_secret_and_publish_with_a_token_of_the_job_alone() -> None:
    for file in WORKFLOWS.glob("*.yml"):
        assert "secrets." not in file.read_text(encoding="utf-8"), file.name
    release = workflow("release.yml")
    assert release["permissions"] == {"contents": "read"}
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in release["jobs"]["build"]
