"""`inspect --detector` and `predict --foreign`: inputs unlike those of training."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colours import write_pictures
from fvae_lora import ForeignInputDetector
from fvae_lora_experiments.predict.request import DETECTOR
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks.image import ImageTask

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Path:
    """A run of FVAE-LoRA on images of three colours."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = make_recipe(method="fvae-lora", train={"learning_rate": 0.01}, data={"validation_share": 0.5})
    run_recipe(recipe, folder, quiet=True)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Images of black and white noise."""
    for i in range(4):
        pixels = 255 * np.random.default_rng(i).integers(0, 2, (8, 8, 3)).astype("uint8")
        (tmp_path / "foreign").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "foreign" / f"{i}.png")
    return tmp_path / "foreign"


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_foreign_rows_are_told_from_those_of_the_test(cli: Cli, run: Path, pictures: Path, foreign: Path) -> None:
    plain = table(cli("predict", run, pictures / "test", foreign)[1])
    code, said, err = cli("inspect", run, "--detector")
    assert (code, err) == (0, "")
    assert "INPUT... --foreign uses it" in " ".join(said.split())
    assert (run / "adapter" / DETECTOR).is_file()
    code, out, err = cli("predict", run, pictures / "test", foreign, "--foreign", "--batch-size", "5")
    assert (code, err) == (0, "")
    rows = table(out)
    scores, p = ([float(row.pop(name)) for row in rows] for name in ("foreign_score", "foreign_p_value"))
    assert rows == plain
    assert min(scores[-4:]) > max(scores[:-4])
    assert p[-4:] == pytest.approx([1 / 16] * 4, abs=1e-6)  # 15 rows were held out
    assert np.mean(p[:-4]) > 0.2
    lines = run.parent / "o.jsonl"
    assert cli("predict", run, foreign, "--foreign", "--probabilities", "--out", lines)[0] == 0
    found = [json.loads(line)["foreign_score"] for line in lines.read_text().splitlines()]
    assert found == pytest.approx(scores[-4:], rel=1e-4)


def test_a_missing_detector_names_the_command_that_makes_one(cli: Cli, run: Path, foreign: Path) -> None:
    code, _, err = cli("predict", run, foreign, "--foreign")
    assert (code, err) == (
        2,
        f"fvae-lora: {run}: no detector of foreign inputs beside its adapter; fvae-lora inspect {run} --detector makes "
        "one\n",
    )


def test_a_detector_that_is_truncated_or_of_another_adapter_is_refused(
    cli: Cli, run: Path, foreign: Path, make_recipe: Callable[..., Recipe]
) -> None:
    other = run.parent / "other"
    run_recipe(make_recipe(method="fvae-lora", seed=3, train={"epochs": 1}), other, quiet=True)
    assert cli("inspect", run, "--detector")[0] == 0
    numbers = run / "adapter" / "foreign_inputs.safetensors"
    for file in (DETECTOR, numbers.name):
        shutil.copy(run / "adapter" / file, other / "adapter")
    numbers.write_bytes(numbers.read_bytes()[:-9])
    for place, problem in {run: f"{numbers} is truncated", other: "is of other weights than the model's"}.items():
        code, out, err = cli("predict", place, foreign, "--foreign")
        assert (code, out) == (2, "")
        assert problem in err
        assert err.endswith(f"; fvae-lora inspect {place} --detector makes a new one\n")
        assert err.count("\n") == 1


def test_what_cannot_have_a_detector(
    cli: Cli, run: Path, pictures: Path, foreign: Path, make_recipe: Callable[..., Recipe]
) -> None:
    lora = run.parent / "lora"
    run_recipe(make_recipe(train={"epochs": 1}), lora, quiet=True)
    write_pictures(foreign.parent / "other", 6, seed=9)
    refused: dict[tuple[Any, ...], str] = {
        ("predict", lora, foreign, "--foreign"): "--foreign: method lora has no autoencoder that would know",
        ("inspect", run / "adapter", "--dataset", pictures, "--detector"): "is only an adapter; give the folder of",
        ("inspect", run, "--dataset", foreign.parent / "other", "--detector"): "other is not that of the run, on which",
    }
    for command, problem in refused.items():
        code, _, err = cli(*command)
        assert code == 2
        assert problem in err


@pytest.mark.slow
def test_a_run_whose_data_have_moved_gets_the_same_detector(cli: Cli, run: Path, pictures: Path) -> None:
    moved = Path(shutil.copytree(pictures, run.parent / "moved"))
    written = []
    for options in ([], ["--dataset", moved]):
        assert cli("inspect", run, "--detector", *options)[0] == 0
        written.append((run / "adapter" / DETECTOR).read_bytes())
    assert written[0] == written[1]


@pytest.mark.slow
def test_ctrl_c_leaves_the_detector_that_was_there(
    cli: Cli, run: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("inspect", run, "--detector")[0] == 0
    before = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ForeignInputDetector, "_score", stop)
    assert cli("inspect", run, "--detector")[0] == 130
    assert {file.name: file.read_bytes() for file in (run / "adapter").iterdir()} == before
    monkeypatch.setattr(ImageTask, "collate", stop)
    assert cli("inspect", run, "--detector")[0] == 130
    monkeypatch.undo()
    assert cli("predict", run, foreign, "--foreign")[0] == 0
