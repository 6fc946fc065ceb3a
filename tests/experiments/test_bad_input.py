"""A user's mistakes: one line that names what is wrong, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arguments import assert_refused
from colours import write_pictures

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures, to be spoilt."""
    shutil.copytree(pictures, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def train(cli: Cli, vit: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def run(dataset: Path | str, *more: str | Path) -> tuple[int, str, str]:
        options = ["--model", vit, "--method", "lora", "--out", tmp_path / "run", "--quiet", *more]
        return cli("train", "image/default", "train.epochs=1", "train.batch_size=8", "--dataset", dataset, *options)

    return run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "image/default"], "model: missing; give model=... (or --model)"),
        (["train", "image/nope"], "recipe image/nope: no such file, and no shipped recipe"),
        (
            ["train", "image/default", "--model", "./nowhere", "--dataset", "sklearn-digits"],
            "model ./nowhere: no such folder",
        ),
        (["train", "image/default", "--model", "no/model", "--dataset", "sklearn-digits"], "model no/model: "),
        (
            ["train", "image/default", "--model", "vit-fashion-mnist", "--dataset", "./nowhere"],
            "no such file or folder",
        ),
        (["train", "image/default", "--model", "vit-fashion-mnist", "--dataset", "no/data"], "dataset no/data: "),
        (["train", "image/demo", "--method", "lorax"], "method: expected one of fvae-lora, fvae-lora-reference"),
        (["train", "image/demo", "--seed", "x"], "--seed"),
        (["train", "image/demo", "--sed", "1"], "--sed"),
        (["train", "image/demo", "train.epochs=none"], "train.epochs: input should be a valid integer"),
        (["train", "image/demo", "train.precision=fp16"], "train.precision: fp16 needs a GPU"),
        (["train", "image/demo", "adapter.target_modules=[nope]"], "adapter.target_modules: 'nope' matches no module"),
        (["train", "image/demo", "fvae.residual_dim=4", "fvae.latent_fusion=average"], "latent_fusion"),
        (["compare", "image/demo", "--methods", "lora,lorax"], "method: expected one of"),
        (["compare", "image/demo", "--methods", "lora,lora"], "lora-seed1 is requested twice"),
        (["compare", "image/demo", "--seeds", "1,,2"], "--seeds: expected values separated by commas"),
        (
            ["compare", "image/demo", "--vary", "train.epochs="],
            "--vary train.epochs: expected values separated by commas",
        ),
        (["compare", "image/demo", "--jobs", "0"], "--jobs"),
        (["evaluate", "nowhere"], "nowhere: no finished run"),
        (["report", "nowhere"], "nowhere: no such file or folder"),
        (["recipes", "show", "nope"], "recipe nope: no such file"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_bad_command_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(cli(*arguments), says)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_folder_that_is_no_model(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    result = cli("train", "image/default", "--model", pictures, "--dataset", pictures, "--out", tmp_path / "run")
    assert_refused(result, f"model {pictures}: cannot be loaded for image classification")
    assert not (tmp_path / "run").exists()


def test_one_class(train: Cli, data: Path) -> None:
    for part in ("train", "test"):
        for name in ("red", "green"):
            shutil.rmtree(data / part / name)
    assert_refused(train(data), "split train has only one class: blue")


def test_labels_that_differ_between_splits(train: Cli, data: Path, tmp_path: Path) -> None:
    (data / "test" / "red").rename(data / "test" / "crimson")
    assert_refused(train(data), "split test and split train differ in their labels: crimson, red")
    assert not (tmp_path / "run").exists()


def test_an_empty_split(train: Cli, data: Path) -> None:
    shutil.rmtree(data / "test")
    (data / "test").mkdir()
    assert_refused(train(data), "split test is empty")


def test_an_empty_folder(train: Cli, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert_refused(train(tmp_path / "nothing"), "no images; it has nothing; readable layouts: ")


def test_no_train_split(train: Cli, data: Path) -> None:
    shutil.rmtree(data / "train")
    assert_refused(train(data), "no train split; it has test")


def test_too_few_rows_to_split(train: Cli, tmp_path: Path) -> None:
    write_pictures(tmp_path / "few", 1)
    assert_refused(train(tmp_path / "few"), "no test split, and none can be taken from train")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut off"])
def test_an_unreadable_image(train: Cli, data: Path, tmp_path: Path, content: bytes) -> None:
    (data / "test" / "red" / "2.png").write_bytes(content)
    assert_refused(train(data), str(data / "test" / "red" / "2.png"), "not a readable image")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_that_is_cut_off_is_found_before_training(train: Cli, data: Path, tmp_path: Path, split: str) -> None:
    """A JPEG's header says nothing of its end: this shows only when it is decoded."""
    from PIL import Image

    picture = data / split / "red" / "cut.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(picture)
    picture.write_bytes(picture.read_bytes()[:-600])
    assert_refused(train(data), f"{picture}: not a readable image")
    assert not (tmp_path / "run").exists()


def test_a_model_whose_images_have_another_size(train: Cli, vit: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    config = tmp_path / "vit" / "preprocessor_config.json"
    config.write_text(config.read_text().replace(": 8", ": 16"))
    code, _, err = train(data, "--model", tmp_path / "vit")
    assert code == 1
    assert err.count("\n") == 1
    assert "image size" in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def test_a_bug_is_shown_and_marks_the_run_as_failed(
    train: Cli, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("fvae_lora_experiments.run.trainer.FolderCallback.on_log", bug)
    code, _, err = train(data)
    assert code == 1
    assert err.startswith("Traceback")
    assert err.endswith("KeyError: 'a bug'\n")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def test_a_run_folder_of_another_recipe(train: Cli, data: Path, tmp_path: Path) -> None:
    assert train(data)[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert_refused(train(data, "--seed", "2"), "holds a run of another recipe, seed is 1 there and 2 here")
    assert_refused(train(data, "--method", "full"), "holds a run of another recipe")
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize("spoil", [lambda text: text[: len(text) // 2], lambda _: "", lambda _: "[]", lambda _: "{}"])
def test_a_record_that_is_cut_off(train: Cli, data: Path, tmp_path: Path, spoil: Callable[[str], str]) -> None:
    file = tmp_path / "run" / "run.json"
    file.parent.mkdir()
    file.write_text(spoil(json.dumps({"schema": 1, "state": "running", "recipe": {}})))
    before = file.read_bytes()
    assert_refused(train(data), str(file), "nothing was changed")
    assert file.read_bytes() == before


def test_evaluating_on_other_data_or_another_model(train: Cli, cli: Cli, data: Path, tmp_path: Path) -> None:
    assert train(data)[0] == 0
    run = tmp_path / "run"
    (data / "test" / "red" / "0.png").write_bytes((data / "test" / "red" / "1.png").read_bytes())
    assert_refused(cli("evaluate", run), "not what the run was started with")
    assert_refused(cli("evaluate", run, "--dataset", "sklearn-digits"), "dataset sklearn-digits: not what the run")


def test_a_run_whose_data_changed_does_not_go_on(train: Cli, data: Path, tmp_path: Path) -> None:
    assert train(data)[0] == 0
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text()) | {"state": "running"}
    file.write_text(json.dumps(record))
    (data / "train" / "red" / "0.png").unlink()
    assert_refused(train(data), "not what the run was started with")
    assert json.loads(file.read_text()) == record
