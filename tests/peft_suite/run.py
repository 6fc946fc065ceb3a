"""Runs peft's own test-suite with FVAE-LoRA in LoRA's place: ``python tests/peft_suite/run.py``.

The suite is in peft's source distribution, of the version that is installed; it is fetched through pip into .cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import stand_ins
from exclusions import MODULES

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "peft-suite"
PROFILES = ("full", "linear")


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
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "peft", "--dest", str(CACHE), f"peft=={peft_version}"]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode or not archive.exists():
            return None
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar if member.name.startswith(f"peft-{peft_version}/tests/")]
        tar.extractall(CACHE, members=wanted, filter="data")
    (folder / "tests" / "__init__.py").touch()  # its modules import each other relatively
    return folder


def main() -> int:
    """Run both profiles side by side; print what failed and a count of the rest."""
    peft_version = version("peft")
    folder = fetch(peft_version)
    if folder is None:
        print(f"peft {peft_version}'s source distribution cannot be had: its test-suite was not run")
        return 0
    hub = CACHE / f"models-transformers-{version('transformers')}"
    stand_ins.build(hub)
    environment = os.environ | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", os.devnull, "--rootdir", ".", "--confcutdir", "."]
    command += [
        "-q",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--tb=short",
        "-rfEs",
        "--disable-warnings",
        *sys.argv[1:],
    ]
    if not any(argument.startswith("tests/") for argument in sys.argv[1:]):
        command += [str(Path("tests", f"{module}.py")) for module in MODULES]
    runs = {}
    for profile in PROFILES:
        log = CACHE / f"{peft_version}-{profile}.log"
        with log.open("w") as output:
            runs[profile, log] = subprocess.Popen(
                [*command, "--profile", profile], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
    failed = False
    for (profile, log), process in runs.items():
        code = process.wait()
        failed = failed or code != 0
        print(f"peft {peft_version}, profile {profile}: {log.read_text().splitlines()[-1].strip('= ')}  ({log})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
