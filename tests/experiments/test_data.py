"""Where rows come from, how they are split, and what happens to their pixels."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from colours import write_pictures
from fvae_lora_experiments.data import fingerprint, open_images, split
from fvae_lora_experiments.data.image_decoding import image_content
from fvae_lora_experiments.data.image_inputs import random_resized_crop
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import DataSettings, Recipe
from fvae_lora_experiments.tasks.image import ImageTask, load_image_classifier

DEFAULT = DataSettings()


def as_parquet(folder: Path, to: Path, features: Features | None = None) -> None:
    """The pictures of `folder` as parquet files, with names as labels unless `features` say otherwise."""
    to.mkdir()
    for name, rows in open_images(str(folder), DEFAULT).items():
        encoded = [{"bytes": image_content(row, ""), "path": None} for row in rows]
        labels = [rows.features["label"].int2str(row["label"]) for row in rows]
        columns = {"image": encoded, "label": labels}
        Dataset.from_dict(columns, features=features).to_parquet(to / f"{name}-00000-of-00001.parquet")


def test_a_folder_of_pictures(pictures: Path) -> None:
    splits = open_images(str(pictures), DEFAULT)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "test": 12}
    assert splits["train"].features["label"].names == ["blue", "green", "red"]
    for row in splits["train"]:
        assert Path(row["image"]["path"]).parent.name == ["blue", "green", "red"][row["label"]]


def test_one_folder_per_class_without_splits_is_all_train(pictures: Path) -> None:
    assert {name: len(rows) for name, rows in open_images(str(pictures / "train"), DEFAULT).items()} == {"train": 30}


@pytest.mark.parametrize("typed", [True, False])
def test_parquet_holds_the_same_rows_as_the_folder_it_was_made_of(pictures: Path, tmp_path: Path, typed: bool) -> None:
    names = ["red", "green", "blue"]  # another order than the folder's
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)}) if typed else None
    as_parquet(pictures, tmp_path / "p", features)
    folder, parquet = (open_images(str(place), DEFAULT) for place in (pictures, tmp_path / "p"))
    assert parquet["train"].features["label"].names == (names if typed else sorted(names))
    for name in ("train", "test"):
        there, here = (
            {(image_content(row, ""), rows.features["label"].int2str(row["label"])) for row in rows}
            for rows in (folder[name], parquet[name])
        )
        assert there == here
    if not typed:
        assert fingerprint(folder, image_content) == fingerprint(parquet, image_content)


def test_columns_can_be_named(pictures: Path, tmp_path: Path) -> None:
    rows = open_images(str(pictures), DEFAULT)["train"]
    (tmp_path / "p").mkdir()
    rows.rename_columns({"image": "photo", "label": "colour"}).cast_column("colour", Value("int64")).to_parquet(
        tmp_path / "p" / "train.parquet"
    )
    with pytest.raises(UserError, match=r"no label column in split train; set data.label_column to one of"):
        open_images(str(tmp_path / "p"), DEFAULT)
    settings = DataSettings(label_column="colour", image_column="photo")
    opened = open_images(str(tmp_path / "p"), settings)["train"]
    assert opened.features["label"].names == ["0", "1", "2"]
    assert opened["label"][:] == rows["label"][:]


def test_the_fingerprint_is_of_the_content(pictures: Path, tmp_path: Path) -> None:
    def mark(folder: Path) -> str:
        return fingerprint(open_images(str(folder), DEFAULT), image_content)

    copy = tmp_path / "elsewhere"
    shutil.copytree(pictures, copy)
    assert mark(copy) == mark(pictures)
    picture = copy / "train" / "red" / "3.png"
    image = Image.open(picture)
    image.putpixel((0, 0), tuple(255 - channel for channel in image.getpixel((0, 0))))
    image.save(picture)
    changed = mark(copy)
    assert changed != mark(pictures)
    picture.rename(copy / "train" / "blue" / "33.png")
    assert mark(copy) not in (changed, mark(pictures))


def rows_of(part: Dataset) -> set[str]:
    return {row["image"]["path"] for row in part}


def test_clean_takes_validation_from_train_and_leaves_test_whole(pictures: Path) -> None:
    official = open_images(str(pictures), DEFAULT)
    first, second = (split(official, DEFAULT, seed) for seed in (1, 2))
    assert rows_of(first.validation) == rows_of(second.validation), "the split must not depend on the run's seed"
    assert rows_of(first.train) | rows_of(first.validation) == rows_of(official["train"])
    assert not rows_of(first.train) & rows_of(first.validation)
    assert rows_of(first.test) == rows_of(official["test"])
    assert np.bincount(first.validation["label"][:]).tolist() == [1, 1, 1]
    assert first.validation_from.startswith("0.1 of train")
    other = split(official, DataSettings(split_seed=1), 1)
    assert rows_of(other.validation) != rows_of(first.validation)


def test_clean_uses_what_is_there(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "d")
    write_pictures(tmp_path / "d" / "val", 2, seed=3)
    splits = split(open_images(str(tmp_path / "d"), DEFAULT), DEFAULT, 1)
    assert splits.sizes == {"train": 30, "validation": 6, "test": 12}
    assert splits.validation_from == "the official validation split"


def test_clean_takes_a_missing_test_split_from_train(pictures: Path) -> None:
    splits = split(open_images(str(pictures / "train"), DEFAULT), DataSettings(test_share=0.5, validation_share=0.2), 1)
    assert splits.sizes == {"train": 12, "validation": 3, "test": 15}
    assert "of train" in splits.test_from
    assert len(rows_of(splits.train) | rows_of(splits.validation) | rows_of(splits.test)) == 30


def test_the_references_protocol_halves_the_test_split_by_the_runs_seed(pictures: Path) -> None:
    official = open_images(str(pictures), DEFAULT)
    first, second = (split(official, DataSettings(protocol="reference"), seed) for seed in (1, 2))
    assert first.sizes == {"train": 30, "validation": 6, "test": 6}
    assert rows_of(first.validation) | rows_of(first.test) == rows_of(official["test"])
    assert rows_of(first.test) != rows_of(second.test)
    alone = split({"train": official["train"]}, DataSettings(protocol="reference"), 1)
    assert alone.sizes == {"train": 24, "validation": 3, "test": 3}


def test_the_digits_come_with_a_package() -> None:
    splits = open_images("sklearn-digits", DEFAULT)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 1797}
    assert splits["train"].features["label"].names == [str(digit) for digit in range(10)]


def test_training_images_are_augmented_and_no_others(
    make_recipe: Callable[..., Recipe], pictures: Path, vit: Path
) -> None:
    splits = split(open_images(str(pictures), DEFAULT), DEFAULT, 1)
    model, processor = load_image_classifier(str(vit), splits.classes)

    def pixels(augmentation: list[str]) -> dict[str, torch.Tensor]:
        recipe = make_recipe(image={"augmentation": augmentation})
        torch.manual_seed(3)
        rows = ImageTask(recipe).datasets(splits, model, processor)
        return {name: torch.stack([row["pixel_values"] for row in rows[name]]) for name in rows}

    plain = pixels([])
    for name, rows in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        images = [Image.open(io.BytesIO(image_content(row, ""))) for row in rows]
        assert torch.equal(plain[name], processor(images=images, return_tensors="pt")["pixel_values"])

    flipped = pixels(["horizontal_flip"])
    mirrored = plain["train"].flip(-1)
    is_plain, is_mirrored = (
        torch.tensor([torch.allclose(a, b, atol=0.02) for a, b in zip(flipped["train"], of, strict=True)])
        for of in (plain["train"], mirrored)
    )
    assert bool((is_plain | is_mirrored).all())
    assert 5 < int(is_mirrored.sum()) < 22

    cropped = pixels(["random_resized_crop"])
    assert not any(torch.allclose(a, b, atol=0.02) for a, b in zip(cropped["train"], plain["train"], strict=True))
    for augmented in (flipped, cropped):
        assert torch.equal(augmented["validation"], plain["validation"])
        assert torch.equal(augmented["test"], plain["test"])


def test_every_epoch_sees_other_crops(make_recipe: Callable[..., Recipe], pictures: Path, vit: Path) -> None:
    splits = split(open_images(str(pictures), DEFAULT), DEFAULT, 1)
    model, processor = load_image_classifier(str(vit), splits.classes)
    train = ImageTask(make_recipe(image={"augmentation": ["random_resized_crop"]})).datasets(splits, model, processor)[
        "train"
    ]
    assert not torch.equal(train[0]["pixel_values"], train[0]["pixel_values"])


def test_a_crop_is_a_part_of_the_image_in_the_right_place() -> None:
    x, y = np.meshgrid(np.arange(60), np.arange(40))
    ramp = Image.fromarray(np.stack([x * 4, y * 4, x * 0], -1).astype("uint8"))  # a pixel's colour tells where it was
    torch.manual_seed(0)
    areas = []
    for _ in range(50):
        crop = np.asarray(random_resized_crop(ramp, (20, 30), 0.25)).astype(float) / 4
        assert crop.shape == (20, 30, 3)
        assert np.all(np.diff(crop[..., 0], axis=1) >= 0)
        assert np.all(np.diff(crop[..., 1], axis=0) >= 0)
        areas.append((crop[0, -1, 0] - crop[0, 0, 0]) * (crop[-1, 0, 1] - crop[0, 0, 1]) / (60 * 40))
    assert 0.15 < min(areas) < 0.4
    assert max(areas) > 0.7


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_every_kind_of_image_becomes_what_the_model_takes(
    make_recipe: Callable[..., Recipe], tmp_path: Path, vit: Path, mode: str
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new(mode, (9, 7)).save(tmp_path / name / f"{i}.tiff")
    official = open_images(str(tmp_path), DataSettings(test_share=0.5, validation_share=0.5))
    splits = split(official, DataSettings(test_share=0.5, validation_share=0.5), 1)
    model, processor = load_image_classifier(str(vit), splits.classes)
    assert ImageTask(make_recipe()).datasets(splits, model, processor)["train"][0]["pixel_values"].shape == (3, 8, 8)


def test_a_parquet_file_that_is_cut_off_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot be read as parquet") as caught:
        open_images(str(tmp_path), DataSettings())
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_references_protocol_for_svhn_selects_on_the_whole_test_split(pictures: Path) -> None:
    official = open_images(str(pictures), DataSettings())
    settings = DataSettings(protocol="reference-on-test")
    parts = split(official, settings, 1)
    assert parts.validation["image"][:] == parts.test["image"][:] == official["test"]["image"][:]
    assert parts.train["image"][:] == official["train"]["image"][:]
    with pytest.raises(UserError, match="no test split"):
        split({"train": official["train"]}, settings, 1)
