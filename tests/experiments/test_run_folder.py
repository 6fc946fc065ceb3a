"""The record: whole or not there, one process at a time, and nothing in it that tells where somebody works."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.places import portable_path, resolve_portable, short_name
from fvae_lora_experiments.run.folder import RunFolder, write_atomically
from fvae_lora_experiments.run.record import Event
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from processes import CONTEXT, attempt

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    file = tmp_path / "run.json"
    write_atomically(file, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[broken], full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new" * 1000)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_curve_is_read_without_the_line_that_was_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [{"event": "train", "step": step, "epoch": step / 4} for step in (2, 4, 6)]
    for line in lines:
        folder.append(Event.model_validate(line))
    folder.metrics_file.write_text(folder.metrics_file.read_text()[:-9])
    assert [event.contents() for event in folder.events()] == lines[:2]
    folder.rewind(2)
    assert folder.metrics_file.read_text() == json.dumps(lines[0]) + "\n"


def test_a_folder_that_another_process_is_using(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    ready, leave = CONTEXT.Event(), CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(tmp_path, ready, leave))
    process.start()
    ready.wait()
    with pytest.raises(UserError, match="another process is using this run's folder"):
        run_recipe(make_recipe(), tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    process.kill()
    process.join()
    run_recipe(make_recipe(), tmp_path, quiet=True)


def _hold(folder: Path, ready: object, leave: object) -> None:
    with RunFolder(folder).locked():
        ready.set()  # type: ignore[attr-defined]
        leave.wait()  # type: ignore[attr-defined]


def test_a_place_that_is_no_folder(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        run_recipe(make_recipe(), tmp_path / "file" / "run", quiet=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        run_recipe(make_recipe(), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    "limit",
    [3_000, 12_000, pytest.param(6_000, marks=pytest.mark.slow), pytest.param(24_000, marks=pytest.mark.slow)],
)
def test_when_nothing_more_can_be_written_the_run_fails_and_goes_on_later(
    make_recipe: Callable[..., Recipe], tmp_path: Path, limit: int
) -> None:
    """A limit on the size of files fails at another file each time: record, configuration, adapter, generators."""
    recipe = make_recipe(method="fvae-lora")
    run_recipe(recipe, tmp_path / "earlier", quiet=True)
    earlier = {file: file.read_bytes() for file in (tmp_path / "earlier").rglob("*") if file.is_file()}
    process = CONTEXT.Process(target=_run_limited, args=(recipe, tmp_path / "run", limit))
    process.start()
    process.join()
    assert process.exitcode == 1
    file = tmp_path / "run" / "run.json"
    if file.exists():
        record = json.loads(file.read_text())
        assert record["state"] == "failed"
        assert re.search("File too large|could not be written; .* MB are free", record["reason"]), record["reason"]
        assert str(tmp_path) not in record["reason"]
    else:
        assert limit == 3_000, "the record itself fits"
    assert earlier == {file: file.read_bytes() for file in earlier}
    assert attempt(recipe, tmp_path / "run")
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("earlier", "run")]
    assert metrics[0] == metrics[1]


def _run_limited(recipe: Recipe, folder: Path, limit: int) -> None:
    from fvae_lora_experiments.errors import RunError

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run_recipe(recipe, folder, quiet=True)
    except RunError:
        sys.exit(1)


def test_names_that_a_record_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home" / "alice")
    home = tmp_path / "home" / "alice"
    for place in (home / "data" / "dtd", home / "runs" / "r1", tmp_path / "home" / "bob" / "dtd"):
        place.mkdir(parents=True)
    run_folder = home / "runs" / "r1"
    relative = portable_path(str(home / "data" / "dtd"), run_folder)
    assert relative == "../../data/dtd"
    assert Path(resolve_portable(relative, run_folder)).resolve() == home / "data" / "dtd"
    assert portable_path(str(tmp_path / "home" / "bob" / "dtd"), run_folder) == "dtd"
    assert portable_path("owner/name", run_folder) == "owner/name"
    assert portable_path("sklearn-digits", run_folder) == "sklearn-digits"
    monkeypatch.chdir(run_folder)
    (run_folder / "here").mkdir()
    assert portable_path("here", run_folder) == "./here"
    assert short_name("../../data/dtd") == "dtd"


TELLING = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|scratch|var|opt|private)/|[A-Z]:\\\\|file://")


def telling(text: str) -> list[str]:
    names = [name for name in (os.uname().nodename, Path.home().name) if len(name) > 4]
    return TELLING.findall(text) + [name for name in names if name in text]


def test_a_record_does_not_tell_where_it_was_made(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    assert telling(json.dumps({"model": "/home/alice/vit"}))
    for method in ("fvae-lora", "linear-probe", "full"):
        run_recipe(make_recipe(method=method), tmp_path / method, quiet=True)
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".jsonl", ".md"):
            assert not telling(file.read_text()), file


def test_no_committed_record_tells_where_it_was_made() -> None:
    git = ["git", "ls-files", "-z", "--", "*runs.jsonl.gz", "*run.json", "*adapter_config.json", "*rates.json"]
    listed = subprocess.run(git, cwd=PROJECT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        contents = (PROJECT / name).read_bytes()
        text = gzip.decompress(contents) if name.endswith(".gz") else contents
        assert not telling(text.decode()), name
