"""One model of the record, for writing and for reading: old records are read, and newer ones lose nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.report import summary_rows
from fvae_lora_experiments.run.folder import RunFolder

FIRST = Path(__file__).parents[1] / "data" / "runs" / "schema-1"
"""A run of the first version that wrote records: without `metric`, `diverged`, a recipe's `purpose` and more."""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(FIRST, tmp_path / "run")))


def test_a_run_of_the_first_version_is_reported_with_its_curve(folder: RunFolder) -> None:
    (row,) = summary_rows(folder.path)
    assert (row.state, row.method, row.metric, row.seeds) == ("complete", "linear-probe", "accuracy", (1,))
    assert row.score == 0.8665183537263627
    assert (row.trainable_parameters, row.peak_memory_mb) == (1290, 659.992576)
    events = folder.events()
    assert [e.scores["accuracy"] for e in events if e.event == "test"] == [row.score]
    assert [round(e.epoch) for e in events if e.event == "validation"] == list(range(1, 21))


def test_what_is_read_is_written_again_unchanged(folder: RunFolder) -> None:
    record, curve = json.loads(folder.record_file.read_text()), folder.metrics_file.read_text()
    folder.write(folder.read())  # type: ignore[arg-type]
    folder.rewind(10**9)
    assert json.loads(folder.record_file.read_text()) == record
    assert folder.metrics_file.read_text() == "".join(line for line in curve.splitlines(True) if '"test"' not in line)


def test_what_a_newer_version_knows_is_kept(folder: RunFolder) -> None:
    newer = json.loads(folder.record_file.read_text()) | {"energy": {"joules": 3.5}}
    for part in ("model", "dataset", "parameters", "time", "memory", "flops", "metrics"):
        newer[part]["since"] = ["a later", {"version": 1}]
    folder.record_file.write_text(json.dumps(newer))
    folder.metrics_file.write_text('{"event": "train", "step": 1, "epoch": 0.5, "loss": 2, "lenses": {"a": [1]}}\n')
    before = folder.metrics_file.read_text()
    folder.write(folder.read())  # type: ignore[arg-type]
    folder.rewind(1)
    assert json.loads(folder.record_file.read_text()) == newer
    assert folder.metrics_file.read_text() == before
    folder.mark_failed("the disk is full")
    assert json.loads(folder.record_file.read_text())["energy"] == {"joules": 3.5}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema: Input should be 1"),
        ({"state": "resting"}, "state: Input should be 'running', 'complete', 'failed' or 'pruned'"),
        ({"seed": "one"}, "seed: Input should be a valid integer"),
        ({"model": 3}, "model: Input should be an object"),
    ],
)
def test_a_record_that_would_be_misread_is_refused_in_one_line(
    folder: RunFolder, change: dict[str, object], said: str
) -> None:
    folder.record_file.write_text(json.dumps(json.loads(folder.record_file.read_text()) | change))
    with pytest.raises(UserError) as refused:
        folder.read()
    assert str(refused.value).startswith(f"{folder.record_file}: not a complete record: {said}")
    assert str(refused.value).endswith("; nothing was changed")
    assert "\n" not in str(refused.value)
    (row,) = summary_rows(folder.path)
    assert (row.state, row.reason.startswith(f"run.json: {said}")) == ("unreadable", True)
