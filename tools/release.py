"""A release: version, changelog and citation in step; built, checked, installed where nothing else is, tried, tagged.

    make release                  of the version in pyproject.toml
    make release VERSION=0.2.0    sets it first
    make dist                     only builds and tries what is committed

Nothing leaves this machine: pushing the commit and its tag does that (.github/workflows/release.yml).
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[1]
UNRELEASED = "## Unreleased\n"


class ReleaseError(Exception):
    """The release cannot be made; the message says what to do first."""


def put_in_step(root: Path, asked: str | None, today: str) -> str:
    """Writes the version and its date to pyproject.toml, CITATION.cff and CHANGELOG.md, and commits that.

    Args:
        root: a checkout.
        asked: the version; None for that of pyproject.toml.
        today: the date, as 2026-11-25.

    Returns:
        The version. If all was in step already, nothing is committed.

    Raises:
        ReleaseError: the tree has changes, the version was released or is older than the last. Nothing was changed.
    """
    if changed := _git(root, "status", "--porcelain").splitlines():
        raise ReleaseError(
            f"{changed[0][3:]} is not committed; commit or remove all that is changed first, {len(changed)} in all"
        )
    current = version_of(root)
    version = asked or current
    try:
        if str(Version(version)) != version or Version(version) < Version(current):
            raise ReleaseError(f"VERSION={version}: expected one like 0.2.0, not before {current}")
    except InvalidVersion as error:
        raise ReleaseError(f"VERSION={version}: expected one like 0.2.0") from error
    if _git(root, "tag", "--list", f"v{version}"):
        raise ReleaseError(f"{version} was released, as the tag v{version} says; VERSION=... gives the next")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = dict(re.findall(r"^## (\d\S*) - (\S+)$", changelog, re.MULTILINE))
    if dated.get(version, today) != today:
        raise ReleaseError(f"CHANGELOG.md has {version} of {dated[version]}, and today is {today}; correct one of them")
    if version not in dated:
        news = changelog.partition(UNRELEASED)[2].partition("\n## ")[0]
        if not news.strip():
            raise ReleaseError("CHANGELOG.md says of nothing under Unreleased that could be released")
        changelog = changelog.replace(UNRELEASED, f"{UNRELEASED}\n## {version} - {today}\n", 1)
    contents = {
        "CHANGELOG.md": changelog,
        "pyproject.toml": _with_version(root / "pyproject.toml", r'^version = "(.*)"$', version),
        "CITATION.cff": _with_version(root / "CITATION.cff", r"^version: (.*)$", version),
    }
    for name, text in contents.items():
        (root / name).write_text(text, encoding="utf-8")
    if _git(root, "status", "--porcelain"):
        _git(root, "commit", "--quiet", "--message", f"Version {version}", "--", *contents)
    return version


def version_of(root: Path) -> str:
    """The version in pyproject.toml."""
    return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def build(root: Path, dist: Path) -> Path:
    """Builds the sdist and, from it, the wheel of what is committed, and checks both; returns the wheel."""
    version = version_of(root)
    with tempfile.TemporaryDirectory() as place:
        archive, source = Path(place, "source.tar"), Path(place, "source")
        _git(root, "archive", "--output", str(archive), "HEAD")
        with tarfile.open(archive) as packed:
            packed.extractall(source, filter="data")
        _run(sys.executable, "-m", "build", "--outdir", dist, source)
    wheel, sdist = dist / f"fvae_lora-{version}-py3-none-any.whl", dist / f"fvae_lora-{version}.tar.gz"
    _run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return wheel


def try_out(root: Path, wheel: Path) -> None:
    """Installs the wheel into an environment of its own, and runs the short demo from there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as place:
        programs = Path(place, "venv", "bin")
        pip = (programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
        constraints = root / "constraints.txt"
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        _run(sys.executable, "-m", "venv", Path(place, "venv"))
        _run(*pip, torch)
        _run(*pip, "--constraint", constraints, f"{wheel}[experiments]")
        _run(programs / "fvae-lora", "demo", "--quick", "--out", Path(place, "demo"), cwd=place, env=environment)


def _with_version(file: Path, pattern: str, version: str) -> str:
    text = file.read_text(encoding="utf-8")
    found = list(re.finditer(pattern, text, re.MULTILINE))
    if len(found) != 1:
        raise ReleaseError(f"{file.name}: expected one line like {pattern}, found {len(found)}")
    return text[: found[0].start(1)] + version + text[found[0].end(1) :]


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def _run(*command: str | Path, **options: object) -> None:
    print("--", *command, flush=True)
    done = subprocess.run(list(map(str, command)), **options)
    if done.returncode:
        raise ReleaseError(f"{Path(command[0]).name} ended with exit code {done.returncode}; nothing was tagged")


def main() -> None:
    """Makes the release, or only what would be uploaded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="the version to set (default: that of pyproject.toml)")
    parser.add_argument("--dist", action="store_true", help="only build and try what is committed")
    asked = parser.parse_args()
    try:
        if not asked.dist:
            put_in_step(ROOT, asked.version, datetime.now(UTC).date().isoformat())
        wheel = build(ROOT, ROOT / "dist")
        try_out(ROOT, wheel)
        if not asked.dist:
            tag = f"v{version_of(ROOT)}"
            _git(ROOT, "tag", "--annotate", tag, "--message", f"Version {tag[1:]}")
            print(f"{tag} is ready in dist/; git push --follow-tags publishes it")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
