"""Many runs in one file: reported as their folders are, the same to the byte, silent about where they were done."""

from __future__ import annotations

import getpass
import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.report import summary_rows
from fvae_lora_experiments.run.archive import pack, read_runs, unpack
from fvae_lora_experiments.sweep.plan import contenders
from synthetic_runs import metrics, record, write_demo, write_run

PROJECT = Path(__file__).parents[2]
Cli = Callable[..., tuple[int, str, str]]
REPORT = ("report.csv", "report.md", "report.tex", "report.html")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_demo(tmp_path_factory.mktemp("runs") / "demo")
    shutil.rmtree(folder / "cut-off")
    return folder


@pytest.fixture(scope="module")
def packed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "demo" / "runs.jsonl.gz"
    assert pack(demo, file) == 12
    return file


def test_a_file_of_runs_is_reported_as_their_folder_is(demo: Path, packed: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("report", demo, "--out", tmp_path / "folder")[0] == 0
    assert cli("report", packed, "--out", tmp_path / "file")[0] == 0
    assert cli("report", packed.parent, "--out", tmp_path / "folder-of-file")[0] == 0
    for name in REPORT:
        told = (tmp_path / "folder" / name).read_bytes()
        assert told == (tmp_path / "file" / name).read_bytes() == (tmp_path / "folder-of-file" / name).read_bytes()


def test_the_report_of_a_file_lies_beside_it_and_that_of_several_where_one_says(
    demo: Path, packed: Path, tmp_path: Path, cli: Cli
) -> None:
    file = Path(shutil.copy(packed, tmp_path / "my-runs.jsonl.gz"))
    assert cli("report", file)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((file.name, *REPORT))
    code, _, error = cli("report", demo, file)
    assert (code, error.count("\n"), "--out" in error) == (2, 1, True)
    assert cli("report", demo, file, "--out", tmp_path / "both")[0] == 0
    assert "the same recipe and seed as demo/lora-1" in (tmp_path / "both" / "report.csv").read_text()


def test_a_folder_may_hold_both_folders_and_files_of_runs(demo: Path, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(demo / "lora-1", tmp_path / "own" / "lora-1")
    (tmp_path / "studies" / "demo").mkdir(parents=True)
    shutil.copy(packed, tmp_path / "studies" / "demo")
    names = [run.name for run in read_runs(tmp_path)]
    assert names[:2] == ["own/lora-1", "studies/demo/full-1"]
    assert len(names) == 13


def test_a_file_beside_the_folders_of_its_runs_adds_nothing_to_the_report(demo: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(demo, tmp_path / "demo"))
    pack(out, out / "runs.jsonl.gz")
    assert summary_rows(out) == summary_rows(demo)
    shutil.rmtree(out / "lora-1")
    assert summary_rows(out) == summary_rows(demo)


def test_the_same_runs_are_the_same_bytes(demo: Path, packed: Path, tmp_path: Path) -> None:
    os.utime(Path(shutil.copytree(demo, tmp_path / "later" / "demo")) / "lora-1" / "run.json", (0, 0))
    pack(tmp_path / "later" / "demo", tmp_path / "runs.jsonl.gz")
    assert (tmp_path / "runs.jsonl.gz").read_bytes() == packed.read_bytes()
    names = [json.loads(line)["run"] for line in gzip.decompress(packed.read_bytes()).splitlines()]
    assert names == sorted(folder.name for folder in demo.iterdir())


def test_unpacking_gives_back_what_was_packed(demo: Path, packed: Path, tmp_path: Path, cli: Cli) -> None:
    code, said, _ = cli("unpack", packed, tmp_path / "runs")
    assert (code, "12 runs" in " ".join(said.split())) == (0, True)
    for folder in demo.iterdir():
        back = tmp_path / "runs" / folder.name
        assert json.loads((back / "run.json").read_text()) == json.loads((folder / "run.json").read_text())
        curves = [(at / "metrics.jsonl").read_text().splitlines() for at in (back, folder)]
        assert [*map(json.loads, curves[0])] == [*map(json.loads, curves[1])]


def test_a_sweep_goes_on_from_unpacked_runs(tmp_path: Path) -> None:
    def asked(out: Path) -> Any:
        places = {"model": "vit-fashion-mnist", "dataset": "sklearn-digits"}
        (contender,) = contenders("image/default", out, ["lora"], options=places)
        return contender.run(1)

    done = asked(tmp_path / "runs")
    done.folder.path.mkdir(parents=True)
    done.folder.write(done.folder.initial_record(done.recipe).model_copy(update={"state": "complete"}))
    pack(tmp_path / "runs", tmp_path / "runs.jsonl.gz")
    assert not asked(tmp_path / "again").is_done()
    unpack(tmp_path / "runs.jsonl.gz", tmp_path / "again")
    assert asked(tmp_path / "again").is_done()


def test_a_run_without_its_adapter_cannot_be_scored_again(tmp_path: Path, cli: Cli) -> None:
    unpack(PROJECT / "studies" / "demo" / "runs.jsonl.gz", tmp_path)
    for command in (("evaluate",), ("export", "--out", tmp_path / "small")):
        code, _, error = cli(command[0], tmp_path / "lora-seed1", *command[1:])
        assert (code, error.count("\n"), "adapter" in error) == (2, 1, True), error


@pytest.mark.parametrize(
    "change",
    [
        {"reason": "/home/alice/data/1.png: not a readable image"},
        {"reason": "no room in /scratch/me/x"},
        {"reason": "it lies in ~alice/data"},
        {"reason": r"C:\Users\alice\data"},
        {"reason": "file://data"},
        {"recipe": {"dataset": "/data"}},
        {"hardware": {"device": "cpu", "where": f"on {socket.gethostname()}."}},
        {"energy": [{"/mnt/meter/1": 3.5}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_that_tells_where_it_was_done_is_not_packed(tmp_path: Path, cli: Cli, change: dict[str, Any]) -> None:
    write_run(tmp_path / "runs" / "good", record("lora", 1))
    write_run(tmp_path / "runs" / "tells", record("lora", 2) | change)
    code, _, error = cli("pack", tmp_path / "runs", tmp_path / "study" / "runs.jsonl.gz")
    assert (code, error.count("\n")) == (2, 1)
    assert f": tells: record.{next(iter(change))}" in error
    assert "no absolute path, host or user" in error
    assert not (tmp_path / "study").exists()


def test_the_user_s_name_is_found_as_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fvae_lora_experiments.run import archive

    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    archive._identifying.cache_clear()
    write_run(tmp_path / "1", record("lora", 1, reason="malice and alice-in-wonderland"))
    pack(tmp_path, tmp_path / "runs.jsonl.gz")
    write_run(tmp_path / "2", record("lora", 2, reason="the folder of alice"))
    with pytest.raises(UserError, match="the folder of alice"):
        pack(tmp_path / "2", tmp_path / "2.runs.jsonl.gz")
    archive._identifying.cache_clear()


def test_names_on_the_hub_ways_up_and_a_data_set_s_own_classes_are_packed(tmp_path: Path) -> None:
    run = record("lora", 1, reason="see https://example.org/a/b; 3/4 of owner/name, ~5")
    run["dataset"]["classes"] = ["/m/09j2d", "/home/alice"]
    run["recipe"] |= {"model": "owner/name", "dataset": "../../lab/digits"}
    write_run(tmp_path / "runs" / "1", run, metrics("lora", epochs=1))
    assert pack(tmp_path / "runs", tmp_path / "runs.jsonl.gz") == 1
    assert summary_rows(tmp_path / "runs.jsonl.gz") == summary_rows(tmp_path / "runs")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("runs.jsonl.gz", "runs: cut: run.json: Invalid JSON"),
        ("runs.zip", "expected a name that ends in runs.jsonl.gz"),
        ("old.runs.jsonl.gz", "exists already"),
    ],
)
def test_what_cannot_be_packed_is_one_line(tmp_path: Path, cli: Cli, file: str, said: str) -> None:
    write_run(tmp_path / "runs" / "cut", json.dumps(record())[:300])
    (tmp_path / "old.runs.jsonl.gz").write_text("old")
    code, _, error = cli("pack", tmp_path / "runs", tmp_path / file)
    assert (code, error.count("\n"), said in error) == (2, 1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.runs.jsonl.gz", "runs"]
    assert (tmp_path / "old.runs.jsonl.gz").read_text() == "old"


def test_two_runs_of_one_name_are_neither_packed_nor_unpacked(packed: Path, tmp_path: Path) -> None:
    shutil.copy(packed, tmp_path / "a.runs.jsonl.gz")
    shutil.copy(packed, tmp_path / "b.runs.jsonl.gz")
    with pytest.raises(UserError, match="full-1: there are two runs of this name"):
        pack(tmp_path, tmp_path / "runs.jsonl.gz")
    (tmp_path / "a.runs.jsonl.gz").write_bytes(2 * packed.read_bytes())
    with pytest.raises(UserError, match="full-1: there are two runs of this name"):
        unpack(tmp_path / "a.runs.jsonl.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda packed: packed[: len(packed) // 2], "not a complete file of runs"),
        (lambda _: b"runs", "not a complete file of runs"),
        (lambda _: gzip.compress(b"\xff"), "not a complete file of runs"),
        (lambda _: gzip.compress(b'{"run": "a"}\n'), "line 1: not a run with its record and its curve"),
        (lambda _: gzip.compress(b"[" * 10**5), "line 1: not a run"),
        (lambda _: gzip.compress(b'{"run": 1, "record": 2, "curve": 3}'), "line 1: not a run"),
        (lambda _: gzip.compress(b""), "no run"),
    ],
    ids=["cut off", "not gzip", "not text", "not a run", "deep", "other types", "empty"],
)
def test_a_file_that_is_no_whole_file_of_runs_is_one_line(
    packed: Path, tmp_path: Path, cli: Cli, spoil: Callable[[bytes], bytes], said: str
) -> None:
    file = tmp_path / "runs.jsonl.gz"
    file.write_bytes(spoil(packed.read_bytes()))
    for command in (("report", file), ("report", tmp_path), ("unpack", file, tmp_path / "out")):
        code, _, error = cli(*command)
        assert (code, error.count("\n"), said in error) == (2, 1, True), error
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_run_of_another_schema_in_a_file_is_listed_and_not_counted(tmp_path: Path, cli: Cli) -> None:
    runs = [{"run": str(seed), "record": record("lora", seed, schema=seed), "curve": []} for seed in (1, 2)]
    file = tmp_path / "runs.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(run) + "\n" for run in runs).encode()))
    good, odd = summary_rows(file)
    assert (good.seeds, odd.state, odd.run, odd.reason) == (
        (1,),
        "unreadable",
        "2",
        "run.json: schema: Input should be 1",
    )
    code, _, error = cli("unpack", file, tmp_path / "out")
    assert (code, error.count("\n"), "schema: Input should be 1" in error) == (2, 1, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "", "."])
def test_unpacking_stays_in_its_folder(tmp_path: Path, cli: Cli, name: str) -> None:
    file = tmp_path / "runs.jsonl.gz"
    line = {"run": name, "record": record("lora"), "curve": []}
    file.write_bytes(gzip.compress(json.dumps(line).encode()))
    code, _, error = cli("unpack", file, tmp_path / "inside" / "out")
    assert (code, error.count("\n"), "not the name of a run" in error) == (2, 1, True)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_unpacking_overwrites_nothing(packed: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "lora-1").mkdir()
    code, _, error = cli("unpack", packed, tmp_path)
    assert (code, error.count("\n"), "lora-1: exists already" in error) == (2, 1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["lora-1"]
