"""Runs peft's own test-suite with FVAE-LoRA in LoRA's place: ``python tests/peft_suite/run.py [pytest's options]``.

The suite is in peft's source distribution, of the version that is installed; pip fetches it into .cache. Two profiles
run side by side, see `plugin`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import stand_ins
from exclusions import MODULES

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "peft-suite"
PROFILES = ("full", "linear")
LEAST_PASSED = 900  # in each profile; fewer would mean that the suite has changed its ways and passes us by


def fetch(peft_version: str) -> Path | None:
    """Unpack the suite of a version of peft, fetching it if need be.

    Args:
        peft_version: The version.

    Returns:
        The folder that holds ``tests``, or ``None`` if it cannot be had.
    """
    folder = CACHE / f"peft-{peft_version}"
    if (folder / "tests" / "__init__.py").exists():
        return folder
    archive = CACHE / f"peft-{peft_version}.tar.gz"
    if not archive.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "peft", "--dest", str(CACHE), f"peft=={peft_version}"]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode or not archive.exists():
            return None
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            inside = member.name.startswith(f"peft-{peft_version}/tests/") and ".." not in Path(member.name).parts
            if content is not None and inside:
                target = CACHE / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())
    (folder / "tests" / "__init__.py").touch()  # its modules import each other relatively
    return folder


def start(profile: str, folder: Path, hub: Path, options: list[str], report: Path) -> subprocess.Popen[bytes]:
    """Start pytest on the suite; its output goes beside the report, which is JUnit's XML."""
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", os.devnull, "--rootdir", ".", "--confcutdir", "."]
    command += ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-rfEs", "--disable-warnings"]
    command += ["--profile", profile, f"--junitxml={report}", "-o", "junit_logging=no", *options]
    if not any(option.startswith("tests/") for option in options):
        command += [f"tests/{module}.py" for module in MODULES if (folder / "tests" / f"{module}.py").exists()]
    with report.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def counts(report: Path) -> dict[str, Counter[str]]:
    """How many tests of each module passed, failed or were skipped."""
    found: dict[str, Counter[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        module = (case.get("classname") or "").removeprefix("tests.").split(".")[0]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.setdefault(module, Counter())[outcome] += 1
    return found


def main() -> int:
    """Run both profiles; print what passed, module by module. The logs give the reason of every skip."""
    peft_version, options = version("peft"), sys.argv[1:]
    CACHE.mkdir(parents=True, exist_ok=True)
    if (folder := fetch(peft_version)) is None:
        print(f"peft {peft_version}'s source distribution cannot be had: its test-suite was not run")
        return 0
    hub = CACHE / f"models-transformers-{version('transformers')}"
    stand_ins.build(hub)
    reports = {profile: CACHE / f"{peft_version}-{profile}.xml" for profile in PROFILES}
    running = {profile: start(profile, folder, hub, options, report) for profile, report in reports.items()}
    good = True
    for profile, process in running.items():
        code = process.wait()
        found = counts(reports[profile])
        total = sum(found.values(), Counter())
        print(f"peft {peft_version}, profile {profile}: {dict(total)}; see {reports[profile].with_suffix('.log')}")
        for module, outcomes in sorted(found.items()):
            print(f"  {module}: {', '.join(f'{outcomes[kind]} {kind}' for kind in ('passed', 'failed', 'skipped'))}")
        good = good and code == 0 and (bool(options) or total["passed"] >= LEAST_PASSED)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
