"""Data as they come: which files and folders are data, of which split, and what is left out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from colours import write_pictures
from fvae_lora_experiments.data import fingerprint, open_images, split
from fvae_lora_experiments.data.files import Notes, split_of_folder, splits_of_file
from fvae_lora_experiments.data.hub import usual_splits
from fvae_lora_experiments.data.image_decoding import image_content
from fvae_lora_experiments.data.timit import open_timit
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import DataSettings
from layouts import DEFAULT, TASKS, lay_out, open_as_text, png, texts, write
from timit_corpus import hum, write_corpus


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def sizes(splits: Mapping[str, Dataset]) -> dict[str, int]:
    return {name: len(rows) for name, rows in splits.items()}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"train_data": 6, "test_data": 4}, {"train": 6, "test": 4}),
        ({"Train": 6, "Test": 4}, {"train": 6, "test": 4}),
        ({"my.train.v2": 6, "my.TEST.v2": 4}, {"train": 6, "test": 4}),
        ({"Train/part": 6, "TEST/part": 4}, {"train": 6, "test": 4}),
        ({"training_set/a": 2, "training_set/b": 4, "test_set/a": 4}, {"train": 6, "test": 4}),
        ({"train": 6, "eval/part": 4}, {"train": 6, "validation": 4}),
        ({"train": 6, "dev": 2, "test": 4}, {"train": 6, "validation": 2, "test": 4}),
        ({"train-00000-of-00002": 2, "train-00001-of-00002": 4, "test-00000-of-00001": 4}, {"train": 6, "test": 4}),
        ({"data/train": 6, "data/test": 4}, {"train": 6, "test": 4}),
        ({"everything": 6}, {"train": 6}),
        ({"part-1": 2, "part-2": 4}, {"train": 6}),
        ({"train": 6, ".ipynb_checkpoints/train-checkpoint": 6, "__MACOSX/._train": 2, "._test": 2}, {"train": 6}),
    ],
    ids=lambda value: ",".join(value),
)
def test_names_say_the_split(task: str, tmp_path: Path, files: dict[str, int], found: dict[str, int]) -> None:
    assert sizes(TASKS[task][2](str(lay_out(tmp_path, task, files)))) == found


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"a": 6, "b": 4}, ["a.", "b.", "which is train, validation or test?"]),
        ({"train": 6, "val/x": 4, "valid/x": 4}, ["val/ and valid/ are both validation"]),
        ({"Train/x": 6, "train/x": 4}, ["Train/ and train/ are both train"]),
        ({"train_test": 6, "dev": 4}, ["gives several splits (test, train)"]),
    ],
    ids=lambda value: ",".join(value),
)
def test_what_could_be_two_things_is_refused(task: str, tmp_path: Path, files: dict[str, int], says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TASKS[task][2](str(lay_out(tmp_path, task, files)))
    for part in [str(tmp_path), *says]:
        assert part in str(caught.value)


def test_files_that_are_not_used_are_noted(task: str, tmp_path: Path) -> None:
    notes = Notes()
    lay_out(tmp_path, task, {"Train": 6, "test": 4, ".hidden": 2})
    (tmp_path / "notes.docx").write_text("")
    TASKS[task][2](str(tmp_path), notes=notes)
    suffix = TASKS[task][0]
    assert notes.left_out["not a table"] == {".docx": 1}
    assert notes.left_out["hidden or system files"] == {f".hidden{suffix}": 1}
    assert notes.sources == {"train": f"Train{suffix}", "test": f"test{suffix}"}


@pytest.mark.parametrize("task", ["image", "text", "transcription"])
@pytest.mark.parametrize(
    ("files", "found", "left_out"),
    [
        (
            {"train": 6, "test": 4, "old/train/part": 2, "extra": 2},
            {"train": 6, "test": 4},
            {"not in a split's folder": ["old/train/part"], "not of a split": ["extra"]},
        ),
        ({"all": 6, "below/more": 2}, {"train": 6}, {"not in a split's folder": ["below/more"]}),
    ],
)
def test_tables_are_those_of_the_topmost_folder(
    tmp_path: Path, task: str, files: dict[str, int], found: dict[str, int], left_out: dict[str, list[str]]
) -> None:
    notes = Notes()
    assert sizes(TASKS[task][2](str(lay_out(tmp_path, task, files)), notes=notes)) == found
    assert {why: [name.partition(".")[0] for name in what] for why, what in notes.left_out.items()} == left_out


@pytest.mark.parametrize("task", ["image", "text", "transcription"])
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train": 6, "test": 4, "test_clean": 4}, "test_clean"),
        ({"en/train": 6, "de/train": 6}, "tables in each of de/ and en/; name one of these folders"),
    ],
)
def test_two_tables_for_one_split_are_refused(tmp_path: Path, task: str, files: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        TASKS[task][2](str(lay_out(tmp_path, task, files)))


def test_train_and_test_of_timit_in_two_folders_each_and_hidden_copies(tmp_path: Path) -> None:
    write_corpus(tmp_path, hum)
    whole = sizes(open_timit(str(tmp_path)))
    sound = next(file for file in sorted(tmp_path.rglob("*")) if file.suffix.lower() == ".wav")
    shutil.copy(sound, sound.with_name(f"._{sound.name}"))
    notes = Notes()
    assert sizes(open_timit(str(tmp_path), notes)) == whole
    assert notes.left_out["hidden or system files"] == {"._*": 1}
    train = next(p for p in tmp_path.iterdir() if p.name.upper() == "TRAIN")
    (tmp_path / ("train" if train.name != "train" else "Train")).mkdir()
    with pytest.raises(UserError, match="are both TRAIN"):
        open_timit(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("Train", "train", {"train"}),
        ("trainset", "train", {"train"}),
        ("test_images", "test", {"test"}),
        ("val2017", "validation", {"validation"}),
        ("Evaluation", "validation", {"validation"}),
        ("train station", None, {"train"}),
        ("contest", None, set()),
        ("latest_data", None, set()),
        ("train_test", None, {"train", "test"}),
    ],
)
def test_a_folder_is_a_split_by_its_whole_name_and_a_file_by_a_word(name: str, folder: str, file: set[str]) -> None:
    assert split_of_folder(name) == folder
    assert splits_of_file(f"{name}.csv") == file


def test_of_several_splits_on_the_hub_for_one_the_most_usual_is_used() -> None:
    assert usual_splits(["train", "eval", "validation", "test", "extra"]) == {
        "train": "train",
        "validation": "validation",
        "test": "test",
    }
    assert usual_splits(["Train", "eval"]) == {"Train": "train", "eval": "validation"}


# Single files, and tables of several formats.


@pytest.mark.parametrize("name", ["all.csv", "all.CSV", "all.tsv", "all.json", "all.jsonl", "all.parquet", "test.csv"])
def test_a_file_alone_is_the_data_set(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, texts(6))
    (opened,) = open_as_text(str(tmp_path / name)).items()
    assert (opened[0], len(opened[1])) == ("train", 6)
    assert opened[1].features["label"].names == ["dull", "fine"]


def test_a_file_of_another_format_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "all.xlsx").write_text("")
    with pytest.raises(UserError, match=r"all\.xlsx: not a table that can be read; allowed are \.parquet, \.jsonl"):
        open_as_text(str(tmp_path / "all.xlsx"))


@pytest.mark.parametrize("other", ["test.parquet", "test.jsonl", "Test.TSV", "test/0.json"])
def test_splits_may_have_different_formats(tmp_path: Path, other: str) -> None:
    write(tmp_path / "train.csv", texts(6))
    write(tmp_path / other, texts(4))
    assert sizes(open_as_text(str(tmp_path))) == {"train": 6, "test": 4}


def test_a_split_in_two_formats_is_read_from_one_and_that_is_noted(tmp_path: Path) -> None:
    for name in ("train.csv", "train.parquet", "test.csv"):
        write(tmp_path / name, texts(6))
    notes = Notes()
    assert sizes(open_as_text(str(tmp_path), notes=notes)) == {"train": 6, "test": 6}
    assert notes.left_out == {"train is read from .parquet": {"train.csv": 1}}


def test_two_folders_for_a_split_are_refused_whatever_their_formats(tmp_path: Path) -> None:
    for name in ("train.csv", "val/a.csv", "valid/a.parquet"):
        write(tmp_path / name, texts(6))
    with pytest.raises(UserError, match="val/ and valid/ are both validation"):
        open_as_text(str(tmp_path))


def test_a_json_file_that_is_no_list_of_rows_is_named_by_line_or_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a", "label": "b"},\n {"text"]')
    with pytest.raises(UserError, match=r"a\.json, line 2: not JSON"):
        open_as_text(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text('[{"text": "a", "label": "b"}, 3]')
    with pytest.raises(UserError, match=r"a\.json, row 2: expected keys and values, got 3"):
        open_as_text(str(tmp_path / "a.json"))


# Folders of images.


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "data" / "train", 4)
    write_pictures(tmp_path / "data" / "test", 2, seed=1)
    return tmp_path / "data"


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "testing"), ("train_images", "test_images")])
def test_split_folders_in_any_case(data: Path, train: str, test: str) -> None:
    before = fingerprint(open_images(str(data), DEFAULT), image_content)
    (data / "train").rename(data / train)
    (data / "test").rename(data / test)
    notes = Notes()
    opened = open_images(str(data), DEFAULT, notes)
    assert sizes(opened) == {"train": 12, "test": 6}
    assert fingerprint(opened, image_content) == before
    assert notes.sources == {"train": f"{train}/", "test": f"{test}/"}


def test_what_is_no_data_is_left_out_of_folders_of_images_and_noted(data: Path) -> None:
    before = fingerprint(open_images(str(data), DEFAULT), image_content)
    shutil.copytree(data / "train" / "red", data / "train" / ".ipynb_checkpoints")
    shutil.copytree(data / "train" / "red", data / "__MACOSX" / "train" / "red")
    shutil.copy(data / "train" / "red" / "0.png", data / "train" / "red" / "._0.png")
    shutil.copytree(data / "train", data / "old")
    shutil.copy(data / "train" / "red" / "0.png", data / "train" / "stray.png")
    (data / "train" / "red" / "about.txt").write_text("")
    (data / "train" / "red" / "raw.cr2").write_text("")
    (data / "train" / "purple").mkdir()
    notes = Notes()
    assert fingerprint(open_images(str(data), DEFAULT, notes), image_content) == before
    assert notes.left_out == {
        "hidden or system files": {"__MACOSX": 1, ".ipynb_checkpoints": 2, "._*": 2},
        "not in a split's folder": {"old/": 12},
        "not in a class's folder": {".png": 1},
        "not an image that can be read": {".txt": 1, ".cr2": 1},
    }
    assert notes.warnings == ["purple: no images in this folder, so it is not a class"]


def test_eval_is_validation_and_two_folders_for_it_are_refused(data: Path) -> None:
    write_pictures(data / "eval", 2, seed=2)
    assert sizes(open_images(str(data), DEFAULT)) == {"train": 12, "validation": 6, "test": 6}
    write_pictures(data / "val", 2, seed=2)
    with pytest.raises(UserError, match="eval/ and val/ are both validation; keep one"):
        open_images(str(data), DEFAULT)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_pictures(tmp_path, 4)
    (tmp_path / "red").rename(tmp_path / "train")
    opened = open_images(str(tmp_path), DEFAULT)
    assert opened["train"].features["label"].names == ["blue", "green", "train"]
    shutil.copytree(tmp_path, tmp_path / "inside" / "train")
    opened = open_images(str(tmp_path / "inside"), DEFAULT)
    assert opened["train"].features["label"].names == ["blue", "green", "train"]


def test_a_folder_around_the_data_is_looked_through(data: Path) -> None:
    notes = Notes()
    data.rename(data.with_name("inner"))
    data.mkdir()
    data.with_name("inner").rename(data / "inner")
    assert sizes(open_images(str(data), DEFAULT, notes)) == {"train": 12, "test": 6}
    assert notes.sources["train"] == "inner/train/"


@pytest.mark.parametrize("suffix", ["jfif", "avif", "JPE", "ppm"])
def test_images_that_pillow_can_read_are_read(data: Path, suffix: str) -> None:
    kind = {"jfif": "jpeg", "JPE": "jpeg", "avif": "avif", "ppm": "ppm"}[suffix]
    Image.new("RGB", (8, 8), "red").save(data / "train" / "red" / f"more.{suffix}", kind)
    assert sizes(open_images(str(data), DEFAULT)) == {"train": 13, "test": 6}


def test_images_that_pillow_cannot_read_are_counted(data: Path) -> None:
    (data / "train" / "red" / "more.heic").write_bytes(b"")
    notes = Notes()
    if ".heic" in Image.registered_extensions():
        pytest.skip("Pillow reads HEIC here")
    assert sizes(open_images(str(data), DEFAULT, notes)) == {"train": 12, "test": 6}
    assert notes.left_out["not an image that can be read"] == {".heic": 1}


def test_images_in_one_flat_folder_are_refused_with_what_is_understood(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png())
    with pytest.raises(UserError, match="3 images, but neither folders nor a table give their classes; readable"):
        open_images(str(tmp_path), DEFAULT)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / "0.png").rename(tmp_path / part / "0.png")
        (tmp_path / "1.png").rename(tmp_path / "0.png") if part == "train" else None
    with pytest.raises(UserError, match="neither folders nor a table give their classes"):
        open_images(str(tmp_path), DEFAULT)


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "labels.tsv", "metadata.parquet"])
@pytest.mark.parametrize("column", ["file_name", "image", "path"])
def test_a_table_of_paths_and_labels(tmp_path: Path, table: str, column: str) -> None:
    rows = [{column: f"files/{i}.png", "label": "ab"[i % 2]} for i in range(6)]
    (tmp_path / "files").mkdir()
    for i in range(6):
        (tmp_path / "files" / f"{i}.png").write_bytes(png(i))
    write(tmp_path / table, rows)
    for place in (tmp_path, tmp_path / table):
        opened = open_images(str(place), DEFAULT)["train"]
        assert [row["image"]["path"] for row in opened] == [str(tmp_path / row[column]) for row in rows]
        assert opened.features["label"].names == ["a", "b"]
    (tmp_path / "files" / "4.png").unlink()
    with pytest.raises(UserError, match=rf"{table}, row 5: no image files/4\.png"):
        open_images(str(tmp_path), DEFAULT)


def test_a_lone_table_whose_paths_lie_in_folders_of_splits_is_these_splits(tmp_path: Path) -> None:
    rows = [{"image": f"{part}/{i}.png", "label": "ab"[i % 2]} for part in ("train", "Test") for i in range(4)]
    for i, row in enumerate(rows):
        (tmp_path / row["image"]).parent.mkdir(exist_ok=True)
        (tmp_path / row["image"]).write_bytes(png(i))
    write(tmp_path / "labels.csv", rows)
    for place in (tmp_path, tmp_path / "labels.csv"):
        opened = open_images(str(place), DEFAULT)
        assert sizes(opened) == {"train": 4, "test": 4}
        assert {Path(row["image"]["path"]).parent.name for row in opened["test"]} == {"Test"}
    (tmp_path / "9.png").write_bytes(png())
    write(tmp_path / "labels.csv", [*rows, {"image": "9.png", "label": "a"}])
    with pytest.raises(UserError, match="row 9: its image is not in a split's folder, but others are"):
        open_images(str(tmp_path), DEFAULT)


def test_metadata_beside_the_images_of_each_split(tmp_path: Path) -> None:
    """The hub's convention for folders of images."""
    for part, count in (("train", 6), ("test", 4)):
        write(tmp_path / part / "metadata.csv", [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(count)])
        for i in range(count):
            (tmp_path / part / f"{i}.png").write_bytes(png(i))
    ours = open_images(str(tmp_path), DEFAULT)
    assert sizes(ours) == {"train": 6, "test": 4}
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path))
    for part in ours:
        rows = theirs[part].cast_column("image", datasets.Image(decode=False))
        assert {row["image"]["path"]: row["label"] for row in rows} == {
            row["image"]["path"]: "ab"[row["label"]] for row in ours[part]
        }


# Labels.


@pytest.mark.parametrize(
    ("train", "test", "names", "numbers"),
    [
        (["neg", "neg ", " pos"], ["pos", "neg"], ["neg", "pos"], [1, 0]),
        ([0.0, 1.0], [0, 1], ["0.0", "1.0"], [0, 1]),
        ([0, 1], [0.0, 1.0], ["0", "1"], [0, 1]),
        (["0", "1"], [1, 0], ["0", "1"], [1, 0]),
        ([0, 1], ["0", "1"], ["0", "1"], [0, 1]),
        ([-1, 1], [1, -1], ["-1", "1"], [1, 0]),
        (["-1", "+1"], [1, -1], ["+1", "-1"], [0, 1]),
        (["a", "b", "c"], ["a", "b"], ["a", "b", "c"], [0, 1]),
        ([True, False], [False, True], ["False", "True"], [0, 1]),
        (["01", "1"], ["1", "01"], ["01", "1"], [1, 0]),
    ],
)
def test_labels_are_compared_as_values(
    tmp_path: Path, train: list[Any], test: list[Any], names: list[str], numbers: list[int]
) -> None:
    write(tmp_path / "train.jsonl", texts(6, train))
    write(tmp_path / "test.jsonl", texts(2, test))
    opened = open_as_text(str(tmp_path))
    assert opened["train"].features["label"].names == opened["test"].features["label"].names == names
    assert opened["test"]["label"][:] == numbers


def test_the_types_that_csv_reads_into_labels_may_differ(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,1.0\nb,-1.0\nc,1.0\n")
    (tmp_path / "test.csv").write_text("text,label\na,-1\nb,+1\n")
    opened = open_as_text(str(tmp_path))
    assert opened["train"].features["label"].names == ["-1.0", "1.0"]
    assert opened["test"]["label"][:] == [0, 1]


@pytest.mark.parametrize("text", ["NaN", "nan", "NA", "N/A", "null", " NaN "])
def test_a_text_that_says_missing_is_no_label(tmp_path: Path, text: str) -> None:
    rows = texts(6)
    rows[3]["label"] = text
    write(tmp_path / "train.csv", rows)
    with pytest.raises(UserError, match=r"train\.csv, row 4: no label: .* stands for a missing value"):
        open_as_text(str(tmp_path))


def test_a_class_that_is_named_in_the_recipe_may_be_called_anything(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", texts(6, ["NA", "EU"]))
    opened = open_as_text(str(tmp_path), DataSettings(classes=["NA", "EU"]))
    assert opened["train"]["label"][:] == [0, 1, 0, 1, 0, 1]


def test_minus_one_among_other_numbers_is_no_label(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", texts(6, [0, 1, -1]))
    with pytest.raises(UserError, match=r"train\.csv, row 3: no label"):
        open_as_text(str(tmp_path))


def test_a_split_without_known_labels_is_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", texts(6))
    write(tmp_path / "test.csv", texts(4, [-1]))
    notes = Notes()
    assert sizes(open_as_text(str(tmp_path), notes=notes)) == {"train": 6}
    assert notes.left_out == {"no label is known": {"split test": 4}}


def test_continuous_labels_are_refused_with_the_setting_for_numbers(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [{"text": f"text {i}", "label": i / 7} for i in range(1, 9)])
    with pytest.raises(UserError, match=r"8 labels such as .* not classes; text\.metrics=\[pearson\] is for numbers"):
        open_as_text(str(tmp_path))


def test_stars_in_halves_are_classes(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", texts(12, [0.5, 1.0, 1.5]))
    assert open_as_text(str(tmp_path))["train"].features["label"].names == ["0.5", "1.0", "1.5"]


def test_a_class_folder_that_test_lacks_and_one_that_train_lacks(data: Path) -> None:
    shutil.rmtree(data / "test" / "red")
    opened = open_images(str(data), DEFAULT)
    assert opened["test"].features["label"].names == ["blue", "green", "red"]
    assert set(opened["test"]["label"]) == {0, 1}
    (data / "test" / "green").rename(data / "test" / "lime")
    with pytest.raises(UserError, match="split test and split train differ in their labels: green, lime"):
        open_images(str(data), DEFAULT)


def test_a_class_of_one_row_is_named_where_a_split_is_drawn(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", [*texts(20), {"text": "alone", "label": "odd"}])
    opened = open_as_text(str(tmp_path))
    with pytest.raises(UserError) as caught:
        split(opened, DEFAULT, 1)
    assert str(caught.value) == (
        "dataset: no test split, and none can be taken from train: class odd has 1 row; "
        "each needs 2, or 3 where validation and test are both drawn"
    )


def test_declared_classes_keep_their_numbers_in_splits_that_declare_fewer(tmp_path: Path) -> None:
    for part, names in (("train", ["b", "a", "c"]), ("test", ["a", "b"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / f"{part}.parquet")
    opened = open_as_text(str(tmp_path))
    assert opened["test"].features["label"].names == ["b", "a", "c"]
    assert opened["test"]["label"][:] == [1, 0]


# What is not there.


def test_a_name_that_is_neither_a_folder_nor_in_the_cache(task: str) -> None:
    with pytest.raises(UserError, match="dataset data/pets: no such folder, and no such name in the cache"):
        TASKS[task][2]("data/pets")


def test_a_cache_that_cannot_be_used_is_to_blame_and_not_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "datasets")
    write(tmp_path / "train.csv", texts(6))
    for open_it in (partial(open_as_text, str(tmp_path)), partial(open_as_text, "owner/name")):
        with pytest.raises(UserError, match=rf"^cache folder {tmp_path}/home/datasets: .*; HF_HOME sets where"):
            open_it()
