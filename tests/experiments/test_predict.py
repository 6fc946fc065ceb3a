"""`fvae-lora predict`: a finished run on new images and texts, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import ExifTags, Image
from transformers import pipeline

from fvae_lora_experiments.predict.predictors import ImageClassifier
from fvae_lora_experiments.predict.rows import Wanted, read_rows
from fvae_lora_experiments.predict.trained import load_run
from fvae_lora_experiments.recipe import check_recipe
from fvae_lora_experiments.run.runner import open_data, run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task
from sentences import sentences, write_encoder

Cli = Callable[..., tuple[int, str, str]]
COLOURS = {"red", "green", "blue"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Path:
    """A run of FVAE-LoRA on images."""
    folder = tmp_path_factory.mktemp("runs") / "images"
    run_recipe(make_recipe(method="fvae-lora", train={"learning_rate": 0.01}), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA on pairs of texts."""
    place = tmp_path_factory.mktemp("texts")
    rows = [(label, text) for label in (0, 1) for text in sentences(label, 12, 0)]
    tree = [{"said": text, "of": "a film", "label": ["dull", "fine"][label]} for label, text in rows]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, tree)))
    recipe = {
        "task": "text",
        "method": "lora",
        "model": str(write_encoder(place / "bert")),
        "dataset": str(place / "train.jsonl"),
        "text": {"columns": ["said", "of"], "max_length": 20},
        "train": {"epochs": 1, "batch_size": 8},
        "adapter": {"r": 4},
    }
    run_recipe(check_recipe(recipe, "test"), place / "run", quiet=True)
    return place / "run"


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def say(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))


def test_images_of_a_folder_are_predicted_as_in_the_test_of_the_run(cli: Cli, images: Path, pictures: Path) -> None:
    code, out, err = cli("predict", images, pictures / "test", "--probabilities")
    assert (code, err) == (0, "")
    rows = table(out)
    assert [row["input"] for row in rows] == sorted(str(file) for file in (pictures / "test").glob("*/*"))
    assert all(float(row["probability"]) == max(float(row[f"probability_{c}"]) for c in COLOURS) for row in rows)
    right = np.mean([row["label"] == Path(row["input"]).parent.name for row in rows])
    trained = load_run(images)
    assert right == pytest.approx(trained.record.metrics.test["accuracy"])
    splits = open_data(trained.recipe, trained.record)
    items = trained.task.datasets(splits, trained.model, trained.processor)["test"]
    with torch.no_grad():
        of_test = trained.model(pixel_values=items[3]["pixel_values"][None]).logits.softmax(-1)
    path = Path(splits.test[3]["image"]["path"]).resolve()
    row = next(row for row in rows if Path(row["input"]).resolve() == path)
    found = [float(row[f"probability_{name}"]) for name in trained.classes]
    assert found == pytest.approx(of_test[0].tolist(), abs=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", "-"])
def test_tables_of_images_say_what_the_files_do(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((pictures / "test").glob("*/*"))[:5]
    alone = [row["label"] for row in table(cli("predict", images, *files)[1])]
    (tmp_path / "x").symlink_to(pictures / "test")
    paths = [f"x/{file.relative_to(pictures / 'test')}" for file in files]
    place: Path | str = tmp_path / f"table{suffix}"
    rows = [{"file_name": path, "n": i} for i, path in enumerate(paths)]
    if suffix == "-":
        place = "-"
        say(monkeypatch, "\n".join(map(str, files)))
    elif suffix == ".parquet":
        pq.write_table(pa.table({"image": [{"bytes": f.read_bytes(), "path": f.name} for f in files]}), place)
    elif suffix in (".csv", ".tsv"):
        between = {".csv": ",", ".tsv": "\t"}[suffix]
        lines = [("file_name", "n"), *((path, "1") for path in paths)]
        Path(place).write_text("\n".join(map(between.join, lines)))
    else:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        Path(place).write_text(text)
    code, out, err = cli("predict", images, place)
    assert (code, err) == (0, "")
    found = table(out)
    assert [row["label"] for row in found] == alone
    if suffix == "-":
        assert [row["input"] for row in found] == list(map(str, files))
    else:
        assert [(row["input"], row["row"]) for row in found] == [(str(place), str(n)) for n in range(1, 6)]


def test_texts_are_read_from_the_columns_of_training_or_those_that_are_named(
    cli: Cli, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"said": text, "of": "a film"} for text in sentences(1, 10, 5)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = cli("predict", texts, tmp_path / "new.jsonl", "--probabilities")
    assert (code, err) == (0, "")
    assert {row["label"] for row in table(out)} <= {"dull", "fine"}
    renamed = "\n".join(json.dumps({"a": row["said"], "b": row["of"]}) for row in rows)
    (tmp_path / "renamed.jsonl").write_text(renamed)
    columns = ("--column", "a", "--column", "b")
    code, again, _ = cli("predict", texts, tmp_path / "renamed.jsonl", *columns, "--probabilities", exactly=True)
    assert again == out.replace("new.jsonl", "renamed.jsonl")
    say(monkeypatch, "\n".join(map(json.dumps, rows)))
    assert cli("predict", texts, "-", "--probabilities")[1] == out.replace(str(tmp_path / "new.jsonl"), "-")
    assert cli("predict", texts, tmp_path / "new.jsonl", "--probabilities", "--batch-size", "3")[1] == out
    code, _, err = cli("predict", texts, tmp_path / "new.jsonl", "--column", "said")
    assert (code, err) == (2, "fvae-lora: --column: expected one for each of text, text_pair, got 1\n")


def test_draws_give_an_entropy_and_leave_the_rest_as_it_is(cli: Cli, images: Path, pictures: Path, texts: Path) -> None:
    plain = table(cli("predict", images, pictures / "test")[1])
    drawn = table(cli("predict", images, pictures / "test", "--draws", "3")[1])
    for before, row in zip(plain, drawn, strict=True):
        entropy, part = float(row.pop("entropy")), float(row.pop("mutual_information"))
        assert row == before
        assert 0 < part < entropy < 1.1
    assert table(cli("predict", images, pictures / "test")[1]) == plain
    code, _, err = cli("predict", texts, pictures, "--draws", "3")
    assert (code, err) == (2, "fvae-lora: --draws: method lora has no z1 to draw; of use for FVAE-LoRA only\n")


def test_json_lines_hold_what_the_table_does(cli: Cli, images: Path, pictures: Path, tmp_path: Path) -> None:
    options = ("predict", images, pictures / "test", "--probabilities", "--out")
    assert cli(*options, tmp_path / "o.csv")[1] == f"{tmp_path / 'o.csv'}: 12 rows predicted\n"
    assert cli(*options, tmp_path / "o.jsonl")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    for row, line in zip(table((tmp_path / "o.csv").read_text()), lines, strict=True):
        assert (row["input"], row["label"], float(row["probability"])) == (
            line["input"],
            line["label"],
            line["probability"],
        )
        assert {name: float(row[f"probability_{name}"]) for name in COLOURS} == line["probabilities"]


@pytest.fixture
def stopping() -> Any:
    """Within it Ctrl-C comes after the first batch of images."""

    def stop_after_one(self: ImageClassifier, items: Any) -> Any:
        if hasattr(self, "has_predicted"):
            raise KeyboardInterrupt
        self.has_predicted = True  # type: ignore[attr-defined]
        return classify(self, items)

    classify = ImageClassifier.predict
    return lambda patch: patch.setattr(ImageClassifier, "predict", stop_after_one)


def test_ctrl_c_keeps_what_was_predicted_and_says_how_it_goes_on(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path, stopping: Any
) -> None:
    predict = ("predict", images, pictures / "test", "--batch-size", "5")
    whole = cli(*predict)[1]
    out = tmp_path / "o.csv"
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch)
        code, said, err = cli(*predict, "--out", out)
        assert (code, said) == (130, "")
        assert err == f"fvae-lora: stopped; --resume goes on after the last row of {out}\n"
        assert len(table(out.read_text())) == 5
        assert cli(*predict)[::2] == (130, "fvae-lora: stopped\n")
    assert cli(*predict, "--out", out, "--resume")[1] == f"{out}: 7 rows predicted\n"
    assert out.read_text() == whole


def test_a_disk_that_is_full_is_one_line_and_loses_nothing(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path
) -> None:
    predict = ("predict", images, pictures / "test", "--batch-size", "2")
    whole, out = cli(*predict)[1], tmp_path / "o.csv"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
    try:
        code, _, err = cli(*predict, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, err) == (1, f"fvae-lora: {out}: File too large\n")
    assert cli(*predict, "--out", out, "--resume")[0] == 0
    assert out.read_text() == whole


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_what_was_stopped_goes_on_and_ends_in_the_same_file(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"o.{suffix}"
    assert cli("predict", images, pictures / "test", "--out", out)[0] == 0
    whole = out.read_bytes()
    code, _, err = cli("predict", images, pictures / "test", "--out", out)
    assert (code, err) == (2, f"fvae-lora: --out {out}: exists already; --resume goes on where it ends\n")
    for kept in (0, 10, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:kept])
        code, _, err = cli("predict", images, pictures / "test", "--out", out, "--resume")
        assert (code, err) == (0, "")
        assert out.read_bytes() == whole
    assert "0 rows predicted" in cli("predict", images, pictures / "test", "--out", out, "--resume")[1]
    code, _, err = cli("predict", images, pictures / "train", "--out", out, "--resume")
    assert code == 2
    assert "is not among these inputs" in err
    assert out.read_bytes() == whole
    other = tmp_path / f"other.{suffix}"
    other.write_text("what somebody wrote")
    assert cli("predict", images, pictures / "test", "--out", other, "--resume")[0] == 2
    assert other.read_text() == "what somebody wrote"
    if suffix == "csv":
        code, _, err = cli("predict", images, pictures / "test", "--out", out, "--resume", "--probabilities")
        assert code == 2
        assert "has other columns than" in err


def test_a_row_that_cannot_be_used_is_named_and_ends_it_or_is_left_out(
    cli: Cli, images: Path, texts: Path, pictures: Path, tmp_path: Path
) -> None:
    good = sorted((pictures / "test" / "red").glob("*"))
    for name, file in zip("ac", good, strict=False):
        (tmp_path / f"{name}.png").write_bytes(file.read_bytes())
    (tmp_path / "b.png").write_bytes(good[0].read_bytes()[:80])
    code, out, err = cli("predict", images, tmp_path)
    assert (code, err) == (2, f"fvae-lora: {tmp_path / 'b.png'}: not a readable image\n")
    assert [Path(row["input"]).name for row in table(out)] == ["a.png"]
    code, out, err = cli("predict", images, tmp_path, "--on-error", "skip", "--out", tmp_path / "o.csv")
    assert (code, out) == (0, f"{tmp_path / 'o.csv'}: 2 rows predicted, 1 left out\n")
    assert err == f"fvae-lora: left out: {tmp_path / 'b.png'}: not a readable image\n"
    (tmp_path / "t.csv").write_text("path,n\na.png,1\nb.png,2\nno.png,3\nc.png\n")
    code, out, err = cli("predict", images, tmp_path / "t.csv", "--on-error", "skip")
    assert code == 0
    assert [row["row"] for row in table(out)] == ["1"]
    place = f"fvae-lora: left out: {tmp_path / 't.csv'}, row"
    assert err.splitlines() == [
        f"{place} 2: {tmp_path / 'b.png'}: not a readable image",
        f"{place} 3: {tmp_path / 'no.png'}: not a readable image",
        f"{place} 4: 1 cells; the first line has 2",
    ]
    lines = ['{"said": "good", "of": "a film"}', "{", '{"said": " ", "of": "a film"}', '{"said": "bad"}', "[1]"]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    code, out, err = cli("predict", texts, tmp_path / "t.jsonl", "--on-error", "skip")
    assert code == 0
    assert [row["row"] for row in table(out)] == ["1"]
    place = f"fvae-lora: left out: {tmp_path / 't.jsonl'}, row"
    reasons = ["2: not JSON: ", "3: text is ' '; expected some text", "4: no of; it has said", "5: expected keys and"]
    for line, reason in zip(err.splitlines(), reasons, strict=True):
        assert line.startswith(f"{place} {reason}")


@pytest.mark.parametrize("kind", ["CMYK", "16 bit", "palette", "EXIF"])
def test_an_image_of_any_mode_has_the_pixels_of_training(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path, kind: str
) -> None:
    noise = np.random.default_rng(0)
    file, options = tmp_path / "image.tiff", {}
    image = Image.fromarray(noise.integers(0, 255, (8, 12, 3), dtype="uint8"))
    if kind == "CMYK":
        image = image.convert("CMYK")
    elif kind == "16 bit":
        image = Image.fromarray(noise.integers(0, 65535, (8, 8), dtype="uint16"))
    elif kind == "palette":
        file, options = tmp_path / "image.png", {"transparency": 3}
        image = image.quantize(8)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        file, options = tmp_path / "image.png", {"exif": exif}
    image.save(file, **options)
    trained = load_run(images)
    data = shutil.copytree(pictures, tmp_path / "data")
    place = data / "test" / "red" / file.name
    shutil.copy(file, place)
    task = load_task(trained.recipe.model_copy(update={"dataset": str(data)}))
    splits = task.split(task.open_source())
    number = next(i for i, row in enumerate(splits.test) if Path(row["image"]["path"]).name == file.name)
    of_training = task.datasets(splits, trained.model, trained.processor)["test"][number]["pixel_values"]
    (row,) = read_rows([str(file)], Wanted({"image": ["image"]}, [file.suffix]))
    assert torch.equal(ImageClassifier(trained).prepare(row), of_training)
    one, other = (table(cli("predict", images, path, "--probabilities")[1])[0] for path in (file, place))
    assert one | {"input": ""} == other | {"input": ""}


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("review,stars\ngood,1\n", "t.csv", "no column said; it has review, stars; --column says which it is"),
        ("said\n", "t.csv", "a table without a single row"),
        ("", "t.csv", "empty, so nothing to predict"),
        ("\n\n", "t.jsonl", "empty, so nothing to predict"),
        ("[]", "t.json", "empty, so nothing to predict"),
        ("PAR1", "t.parquet", "cannot be read as parquet"),
        ("good", "t.txt", "not a file that can be predicted from; allowed are .csv, .tsv, .jsonl, .json, .parquet"),
        ("said,of\ngood,\xff", "t.csv", "after row 0: cannot be read as a table"),
    ],
)
def test_a_file_that_is_no_input_is_refused(
    cli: Cli, texts: Path, tmp_path: Path, content: str, name: str, said: str
) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    code, out, err = cli("predict", texts, tmp_path / name)
    assert (code, out) == (2, "")
    assert err.startswith(f"fvae-lora: {tmp_path / name}")
    assert said in err


def test_what_cannot_be_asked_is_refused(cli: Cli, images: Path, pictures: Path, tmp_path: Path) -> None:
    (folder := tmp_path / ".csv" / "a.csv").mkdir(parents=True)
    for arguments, said in (
        ([images, tmp_path], f"{tmp_path}: nothing to predict in it; it has nothing"),
        ([images, "./no.png"], "./no.png: no such file or folder"),
        ([images, ""], "INPUT: an empty name; expected a file, a folder or -"),
        ([images, pictures, "--out", folder], f"--out {folder}: a folder; expected a file"),
        ([tmp_path, pictures], f"{tmp_path}: no finished run"),
        ([images, pictures, "--out", "o.txt"], "--out o.txt: expected a name that ends in .csv or .jsonl"),
        ([images, pictures, "--resume"], "--resume: goes on with a file; give --out FILE"),
        ([images, pictures, "--model", "./no"], "model ./no: no such folder; --model says where it is"),
    ):
        assert cli("predict", *arguments)[::2] == (2, f"fvae-lora: {said}\n")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"state": "running"}, "no finished run; its state is running"),
        ({"state": "failed", "reason": "out of memory"}, "no finished run; its state is failed"),
        ({"purpose": "selection"}, "a point of a grid, which only chooses settings; give a run of the results"),
    ],
)
def test_a_run_that_is_no_result_is_refused(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    record = json.loads((images / "run.json").read_text())
    record["recipe"] |= {"purpose": changed.pop("purpose", "result")}
    (tmp_path / "run.json").write_text(json.dumps(record | changed))
    assert cli("predict", tmp_path, pictures)[::2] == (2, f"fvae-lora: {tmp_path}: {said}\n")


def test_transformers_own_pipelines_take_a_loaded_run(
    cli: Cli, images: Path, texts: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((pictures / "test").glob("*/*"))[:3]
    transformers.logging.set_verbosity_warning()  # as in a program of somebody's own
    trained = load_run(images)
    told = pipeline("image-classification", model=trained.unwrapped, image_processor=trained.processor)
    assert capsys.readouterr().err == ""
    rows = table(cli("predict", images, *files)[1])
    for file, row in zip(files, rows, strict=True):
        best = told(str(file))[0]
        assert best["label"] == row["label"]
        assert best["score"] == pytest.approx(float(row["probability"]), abs=1e-5)
    trained = load_run(texts)
    classify = pipeline("text-classification", model=trained.unwrapped, tokenizer=trained.processor)
    assert classify({"text": "a good film", "text_pair": "the plot"})["label"] in ("dull", "fine")
    assert capsys.readouterr().err == ""


def test_how_far_it_is_can_be_seen_on_a_terminal_alone(
    cli: Cli, images: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("predict", images, pictures / "test")[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "predicting" in cli("predict", images, pictures / "test")[2]


def test_a_table_is_read_row_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["good"] * 1000}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes(b"text\n" + b"good\n" * 100_000 + b"\xff")
    for name in ("t.parquet", "t.csv"):
        rows = read_rows([str(tmp_path / name)], Wanted({"text": ["text"]}))
        assert [next(rows).number for _ in range(3)] == [1, 2, 3]
