"""A recorded run that is repeated: what differs is said, the scores are compared, and nothing is overwritten."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from arguments import assert_refused
from finished_runs import events, stopping_after_first_epoch
from fvae_lora_experiments import process, signals
from fvae_lora_experiments.cli import app
from fvae_lora_experiments.report.numbers import prediction_interval
from fvae_lora_experiments.reproduce.recorded import find_recorded
from fvae_lora_experiments.reproduce.verdict import siblings
from fvae_lora_experiments.run.archive import pack
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from processes import CONTEXT

Cli = Callable[..., tuple[int, str, str]]

SEEDS = (1, 2, 3)
SCORES = 4  # loss and accuracy, on test and over the epochs
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of three seeds, and one of other settings."""
    folder = tmp_path_factory.mktemp("study")
    process.silence_libraries()
    for seed in SEEDS:
        run_recipe(make_recipe(method="fvae-lora", seed=seed), folder / f"seed{seed}", quiet=True)
    run_recipe(make_recipe(method="linear-probe", seed=9), folder / "probe", quiet=True)
    return folder


@pytest.fixture(scope="module")
def repeated(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first seed's run once more, finished."""
    folder = tmp_path_factory.mktemp("repeated") / "seed1"
    process.silence_libraries()
    run_recipe(make_recipe(method="fvae-lora", seed=1), folder, quiet=True)
    return folder


@pytest.fixture
def reproduce(cli: Cli, vit: Path, pictures: Path) -> Cli:
    """The command, told where model and data are."""
    return lambda *arguments: cli("reproduce", "--model", vit, "--dataset", pictures, "--quiet", *arguments)


@pytest.fixture
def copied(study: Path, tmp_path: Path) -> Path:
    return shutil.copytree(study, tmp_path / "copied")


def change(run: Path, **changes: Any) -> Path:
    """Changes a record's entries; those that are mappings are merged into what is there."""
    file = run / "run.json"
    record = json.loads(file.read_text())
    for key, value in changes.items():
        record[key] = record[key] | value if isinstance(value, Mapping) else value
    file.write_text(json.dumps(record))
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_small_run_is_reproduced_to_the_bit(cli: Cli, study: Path, tmp_path: Path) -> None:
    before = contents(study)
    code, out, error = cli("reproduce", study / "seed1", "--out", tmp_path / "again", "--quiet")
    assert (code, error) == (0, "")
    assert out.count("equal to the bit") == SCORES
    assert events(tmp_path / "again") == events(study / "seed1")
    assert contents(study) == before
    (same,) = (line for line in out.splitlines() if line.startswith("The same: "))
    for name in ("data colours", "model tiny-vit", "torch", "threads", "precision fp32"):
        assert f" {name} " in f"{same},".replace(",", " "), name


def test_a_packed_run_is_reproduced_where_its_model_and_data_are_now(
    reproduce: Cli, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pack(study, tmp_path / "a.runs.jsonl.gz")
    code, out, error = reproduce("a.runs.jsonl.gz:seed1")
    assert (code, error) == (0, "")
    assert out.count("equal to the bit") == SCORES
    assert events(tmp_path / "runs" / "reproduced" / "seed1") == events(study / "seed1")
    code, out, _ = reproduce(f"{tmp_path}:seed1")
    assert code == 0
    assert "was repeated already" in out


def test_a_score_near_those_of_other_seeds_is_within_their_spread(reproduce: Cli, copied: Path, repeated: Path) -> None:
    run = change(copied / "seed1", metrics={"test": {"accuracy": 0.5, "loss": 1.0}})
    for seed, loss in ((2, 0.9), (3, 1.1)):
        change(copied / f"seed{seed}", metrics={"test": {"accuracy": 0.5, "loss": loss}})
    again = json.loads((repeated / "run.json").read_text())["metrics"]["test"]
    low, high = prediction_interval([1.0, 0.9, 1.1])
    assert low < again["loss"] < high, "this test cannot tell"
    assert again["accuracy"] != 0.5, "this test cannot tell"
    code, out, error = reproduce(run, "--out", repeated)
    assert "test loss: within the seeds' spread (recorded 1, now " in out
    assert "test accuracy: differs (recorded 0.5, now " in out  # all seeds agree on another
    assert (code, error) == (1, f"fvae-lora: {run}: not reproduced: test accuracy\n")


def test_without_siblings_only_the_bit_counts(reproduce: Cli, copied: Path, repeated: Path) -> None:
    shutil.rmtree(copied / "seed3")
    scores = json.loads((repeated / "run.json").read_text())["metrics"]["test"]
    run = change(copied / "seed1", metrics={"test": scores | {"loss": scores["loss"] + 1e-7}})
    code, out, error = reproduce(run, "--out", repeated)
    assert (code, error) == (1, f"fvae-lora: {run}: not reproduced: test loss\n")
    assert "found 1\n" in out


def test_a_curve_that_differs_in_one_epoch_is_not_equal(reproduce: Cli, copied: Path, repeated: Path) -> None:
    lines = events(copied / "seed1")
    next(line for line in lines if line["event"] == "validation")["loss"] += 1e-7
    (copied / "seed1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = reproduce(copied / "seed1", "--out", repeated)
    assert code == 0
    assert "validation loss over epochs: within the seeds' spread (" in out
    assert out.count("equal to the bit") == SCORES - 1


def test_other_versions_are_said_and_the_run_goes_on(reproduce: Cli, copied: Path, repeated: Path) -> None:
    run = change(copied / "seed1", versions={"peft": "0.20.0"}, git_commit="0" * 40, hardware={"cpu": "another"})
    code, out, error = reproduce(run, "--out", repeated)
    assert (code, error) == (0, "")
    assert "Differs: peft 0.20.0 when it was recorded, " in out
    assert "Differs: git commit 000000000000 when it was recorded, " in out
    assert "Differs: cpu another when it was recorded, " in out


def test_siblings_differ_in_the_seed_alone(study: Path) -> None:
    recorded = find_recorded(str(study / "seed1"))
    assert {run.name for run in siblings(recorded.run, recorded.others)} == {"seed2", "seed3"}
    assert find_recorded(f"{study}:seed1").recipe == recorded.recipe


def test_the_interval_of_a_further_seed_is_students() -> None:
    low, high = prediction_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert high - 2 == pytest.approx(4.302653 * 1 * (1 + 1 / 3) ** 0.5, rel=1e-6)
    assert prediction_interval([1.0]) is None


RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "it is not finished": ({"state": "running"}, "no finished run, so there is nothing to compare with; its state is"),
    "it failed": ({"state": "failed", "reason": "the loss is NaN"}, "its state is failed"),
    "a package is gone": (
        {"versions": {"a-package-of-old": "1.0"}},
        "was made with a-package-of-old 1.0, not installed here; nothing was run",
    ),
    "a key is gone": (
        {"recipe": {"momentum": 0.9}, "versions": {"fvae-lora": "0.0.1"}},
        "speech, train, adapter, fvae, ablation; recorded with fvae-lora 0.0.1, and this is",
    ),
    "a method is gone": ({"recipe": {"method": "lora-of-old"}}, "method: expected one of"),
    "it has no scores": ({"metrics": {"test": {}}}, "its record has no accuracy to compare with"),
    "it went on later": ({"extended_from": [1]}, "went on after it was finished, which no single run repeats"),
    "it was tested on other data": (
        {"dataset": {"tested_on": {"fingerprint": "0"}}},
        "was tested on data that had changed, which no single run repeats",
    ),
    "its model is of other contents": (
        {"model": {"fingerprint": "0"}},
        "not what the run was started with (tiny-vit, other contents); nothing was run",
    ),
}


@pytest.mark.parametrize("why", RECORDS)
def test_a_record_that_cannot_be_repeated_is_refused_in_one_line(
    reproduce: Cli, copied: Path, tmp_path: Path, why: str
) -> None:
    changes, says = RECORDS[why]
    run = change(copied / "seed1", **changes)
    before = contents(tmp_path)
    assert_refused(reproduce(run, "--out", tmp_path / "again"), f"{run}: ", says)
    assert contents(tmp_path) == before
    assert not (tmp_path / "again").exists()


def test_a_record_whose_data_have_changed_is_refused(cli: Cli, study: Path, pictures: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pictures, tmp_path / "data")
    shutil.copyfile(data / "train" / "red" / "0.png", data / "train" / "red" / "1.png")
    answer = cli("reproduce", study / "seed1", "--dataset", data, "--out", tmp_path / "again", "--quiet")
    assert_refused(answer, f"{study / 'seed1'}: dataset {data}: not what the run was started with", "nothing was run")
    assert not (tmp_path / "again").exists()


def test_a_record_whose_data_have_moved_names_the_option(cli: Cli, study: Path, vit: Path, tmp_path: Path) -> None:
    pack(study, tmp_path / "a.runs.jsonl.gz")
    answer = cli("reproduce", f"{tmp_path}:seed1", "--model", vit, "--out", tmp_path / "again")
    assert_refused(answer, "no such file or folder any more; --dataset says where it is now")


def test_what_is_not_a_run_is_refused(cli: Cli, study: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"schema": 1, "sta')
    line = json.dumps({"run": "../out", "record": json.loads((study / "seed1" / "run.json").read_text()), "curve": []})
    (tmp_path / "evil.runs.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert_refused(cli("reproduce", tmp_path / "empty"), "not a run (a folder with a run.json); a run of a study is")
    assert_refused(cli("reproduce", tmp_path / "none"), "none: not a run")
    assert_refused(cli("reproduce", f"{tmp_path / 'none'}:seed1"), "none: no such file or folder")
    assert_refused(
        cli("reproduce", f"{tmp_path / 'empty'}:seed1"), "empty: no run (a folder with a run.json, or a file"
    )
    assert_refused(cli("reproduce", tmp_path / "broken"), f"{tmp_path / 'broken'}: run.json: ")
    assert_refused(cli("reproduce", f"{study}:sed1"), "no run of the name sed1; it has probe, seed1, seed2 and 1 more")
    assert_refused(cli("reproduce", f"{tmp_path / 'evil.runs.jsonl.gz'}:../out"), "../out: not the name of a run")


def test_nothing_is_overwritten(
    reproduce: Cli, copied: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter").write_text("precious")
    (tmp_path / "file").write_text("precious")
    change(shutil.copytree(copied / "seed1", tmp_path / "other"), dataset={"fingerprint": "0"})
    shorter = make_recipe(method="fvae-lora", train={"epochs": 1, "keep_checkpoints": True})
    run_recipe(shorter, tmp_path / "shorter", quiet=True)
    before = contents(tmp_path)
    for out, says in {
        copied / "seed1": "the record itself; --out names another folder",
        tmp_path / "mine": "not empty, and not a run; --out names another folder; nothing was changed",
        tmp_path / "file": "file/run.json: Not a directory; nothing was changed",
        copied / "seed2": "holds a run of another recipe, seed is 2 there and 1 here; nothing was changed",
        tmp_path / "other": "holds a run with colours of other contents than the record's colours",
        tmp_path / "shorter": "holds a finished run of fewer epochs",
    }.items():
        assert_refused(reproduce(copied / "seed1", "--out", out), f"{out}", says)
    assert contents(tmp_path) == before


def test_a_run_that_failed_is_resumed_by_the_same_command(cli: Cli, study: Path, tmp_path: Path) -> None:
    again = ("reproduce", study / "seed1", "--out", tmp_path / "again", "--quiet")
    with stopping_after_first_epoch():
        assert cli(*again)[0] == 1
    code, out, error = cli(*again)
    assert (code, error) == (0, "")
    assert out.count("equal to the bit") == SCORES


def _interrupted(arguments: list[str], said: Path) -> None:
    append = RunFolder.append
    calls = []

    def send(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        append(*args)

    RunFolder.append = send
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.exit_on_signal()
    sys.stderr = said.open("w")
    sys.exit(process.exit_code(lambda: app(arguments, standalone_mode=False)))


@pytest.mark.slow
def test_ctrl_c_leaves_a_folder_that_the_same_command_resumes(cli: Cli, study: Path, tmp_path: Path) -> None:
    again = ["reproduce", str(study / "seed1"), "--out", str(tmp_path / "again"), "--quiet"]
    interrupted = CONTEXT.Process(target=_interrupted, args=(again, tmp_path / "said"))
    interrupted.start()
    interrupted.join()
    assert interrupted.exitcode == 130
    assert (tmp_path / "said").read_text() == "fvae-lora: stopped; the same command resumes where it was\n"
    assert json.loads((tmp_path / "again" / "run.json").read_text())["state"] == "running"
    code, out, error = cli(*again)
    assert (code, error) == (0, "")
    assert out.count("equal to the bit") == SCORES


@pytest.mark.slow
def test_a_run_of_the_committed_demo_is_reproduced_on_whatever_processor(cli: Cli, tmp_path: Path) -> None:
    study = PROJECT / "studies" / "demo"
    code, out, error = cli("reproduce", f"{study}:linear-probe-seed1", "--out", tmp_path / "again", "--quiet")
    assert (code, error) == (0, ""), out
