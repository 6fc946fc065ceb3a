"""One look at the data before training: what it says, where it is printed, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from colours import write_pictures
from fvae_lora_experiments.check import guess_task, inspect_data
from fvae_lora_experiments.data.summary import print_summary
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.schema import Recipe
from layouts import TASKS, lay_out, questions, recordings, texts, write
from sentences import write_encoder

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Train and test, with what is no data, a picture in both, and a class that test lacks."""
    folder = tmp_path / "data"
    write_pictures(folder / "Train", 4)
    write_pictures(folder / "test", 2, seed=1)
    shutil.rmtree(folder / "test" / "red")
    shutil.copy(folder / "Train" / "blue" / "0.png", folder / "test" / "blue" / "0.png")
    shutil.copytree(folder / "test", folder / "old")
    (folder / "Train" / "red" / "about.txt").write_text("")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


SAID = """\
read for the task image
split rows from
train 9 Train/, without the rows drawn from it
validation 3 0.25 of train, stratified, split seed 0
test 4 the official test split, test/
class train validation test
blue 3 1 2
green 3 1 2
red 3 1 0
Left out, not an image that can be read: .txt (1)
Left out, not in a split's folder: old/ (4)
Images: 16 decoded; none turned, transparent or scaled
Also in train: 0 of 3 validation rows, 1 of 4 test rows
Warning: no row in test of class red
Warning: 1 row of test also in train"""


def words(text: str) -> str:
    """What was printed, without the width of columns, from the task on."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    joined = "\n".join(lines)
    return joined[joined.index("read for") :]


def test_check_says_what_training_would_see(cli: Cli, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = cli("check", "data", "data.validation_share=0.25", "data.split_seed=0")
    assert (code, err) == (0, "")
    assert words(out) == SAID
    assert max(len(line) for line in out.splitlines()) <= 80
    (kept,) = (data.parent / "cache").rglob("images/*.json")
    assert json.loads(kept.read_text())["count"] == 16


def test_check_refuses_what_training_would_refuse_in_the_same_words(cli: Cli, small: list[str], data: Path) -> None:
    (data / "test" / "blue" / "1.png").write_bytes((data / "test" / "blue" / "1.png").read_bytes()[:-20])
    train = cli("train", "image/default", *small, "data.validation_share=0.25", "--dataset", data)
    check = cli("check", "image/default", *small, "data.validation_share=0.25", "--dataset", data)
    assert train[0] == check[0] == 2
    assert train[2] == check[2] == f"fvae-lora: {data}/test/blue/1.png: not a readable image\n"
    code, _, err = cli("check", data, "data.validation_share=0.25")
    assert code == 2
    assert err.endswith("1.png: not a readable image (read for the task image; --task chooses another)\n")
    assert cli("check", "image/default", *small, "--dataset", "no/where")[0] == 2
    assert "--task nope: no such task; allowed are image, text" in cli("check", data, "--task", "nope")[2]


def test_train_begins_with_the_summary_and_records_it(cli: Cli, small: list[str], data: Path, tmp_path: Path) -> None:
    options = [*small, "train.epochs=1", "data.validation_share=0.25", "--dataset", data, "--method", "linear-probe"]
    code, out, _ = cli("train", "image/default", *options, "--out", tmp_path / "loud")
    assert code == 0
    assert "".join(out.split()).startswith(f"Data:{data}")  # a long name is wrapped
    assert out.index("Left out") < out.index("accuracy")
    code, silent, _ = cli("train", "image/default", *options, "--out", tmp_path / "silent", "--quiet")
    assert code == 0
    assert "Left out" not in silent
    for name in ("loud", "silent"):
        kept = json.loads((tmp_path / name / "run.json").read_text())["dataset"]
        assert kept["left_out"] == {
            "not in a split's folder": {"old/": 4},
            "not an image that can be read": {".txt": 1},
        }
        assert kept["counts"]["class"]["red"] == {"train": 3, "validation": 1, "test": 0}
        assert kept["also_in_train"] == {"validation": 0, "test": 1}
        assert kept["images"]["count"] == 16
        assert kept["warnings"] == ["no row in test of class red", "1 row of test also in train"]


def test_compare_begins_with_the_summary_of_each_data_set_once(
    cli: Cli, small: list[str], data: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*small, "train.epochs=1", "data.validation_share=0.25"]
    compare = ["compare", "image/default", *settings, "--methods", "linear-probe", "--out", tmp_path / "runs"]
    asked: list[int] = []
    monkeypatch.setattr(
        "fvae_lora_experiments.sweep.run_sweep.run_sweep", lambda runs, *_: asked.append(len(runs)) or []
    )
    code, out, err = cli(*compare, "--dataset", f"{data},{pictures}", "--seeds", "1,2")
    assert (code, err, asked) == (0, "", [4])
    assert out.count("Data: ") == 2
    assert out.count("Left out") == 3
    seed = ["--method", "linear-probe", "--seed", "1", "--out", tmp_path / "runs" / "linear-probe-seed1", "--quiet"]
    assert cli("train", "image/default", *settings, *seed)[0] == 0
    assert "Data: " not in cli(*compare, "--seeds", "1")[1], "all is done already"
    assert cli(*compare, "--seeds", "1,2")[1].count("Data: ") == 1


def test_a_comparison_on_data_that_are_refused_says_so_as_its_runs_do(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fvae_lora_experiments.sweep.run_sweep.run_sweep", lambda *_: ["a: dataset no/where: no such folder"]
    )
    code, out, err = cli("compare", "image/default", *small, "--dataset", "no/where", "--out", tmp_path / "runs")
    assert code == 1
    assert "Data: " not in out
    assert err.count("\n") == 1


def test_data_that_are_not_there_are_no_matter_of_the_task(cli: Cli, tmp_path: Path) -> None:
    assert cli("check", tmp_path / "nowhere")[2] == f"fvae-lora: dataset {tmp_path}/nowhere: no such file or folder\n"
    code, _, err = cli("check", "no/where")
    assert code == 2
    assert err.startswith("fvae-lora: dataset no/where: no such folder, and no such name in the cache; ")
    assert "--task" not in err


def test_rows_that_are_cut_are_counted_where_the_tokenizer_is_known(cli: Cli, tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "bert")
    rows = [row | {"text": "good film " * (1 + 9 * (i % 2))} for i, row in enumerate(texts(20))]
    write(tmp_path / "train.csv", rows)
    check = ["check", "text/default", "text.max_length=12", "--dataset", tmp_path / "train.csv", "--model"]
    code, out, err = cli(*check, model)
    assert code == 0, err
    assert "Rows cut: 7 of train, 1 of validation, 2 of test" in out
    assert cli(*check, "no/model")[0] == 2


@pytest.mark.parametrize("task", TASKS)
def test_the_task_of_a_table_is_told_by_its_columns(task: str, tmp_path: Path) -> None:
    assert guess_task(str(lay_out(tmp_path, task, {"train": 8}))) == task


def test_questions_and_recordings_are_summarised_too(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "questions" / "train.jsonl", questions(20))
    write(tmp_path / "questions" / "test.jsonl", questions(4))
    code, out, err = cli("check", "questions")
    assert code == 0, err
    assert "Also in train: 0 of 2 validation rows, 4 of 4 test rows" in out
    write(tmp_path / "recordings" / "train.jsonl", recordings(20))
    code, _, err = cli("check", "recordings")
    assert code == 2
    assert "train.jsonl, row 1, recordings/0.wav: not a readable sound file" in err


def test_many_classes_are_shortened_and_names_are_not_read_as_markup(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", texts(120, [f"[red]class {i:02}" for i in range(30)]))
    recipe = load_recipe(
        "text/default",
        ["data.test_share=0.25", "data.validation_share=0.4"],
        {"model": "none", "dataset": str(tmp_path)},
    )
    console = Console(width=60, record=True)
    print_summary(inspect_data(recipe, with_model=False), console)
    lines = console.export_text().splitlines()
    assert sum("[red]class" in line for line in lines) == 10
    assert any(line.startswith("20 more, each") for line in lines)
    assert max(map(len, lines)) <= 60


def test_an_image_that_was_decoded_is_not_decoded_again(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = inspect_data(make_recipe())
    monkeypatch.setattr("fvae_lora_experiments.tasks.image.inspect_images", None)
    assert inspect_data(make_recipe()).facts() == first.facts()
