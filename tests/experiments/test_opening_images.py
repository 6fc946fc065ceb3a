"""One rule opens every image: upright, over a background, and with the values of its type."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import ExifTags, Image

from fvae_lora_experiments.data.image_decoding import ImageFacts, inspect_image, inspect_images, open_image
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.schema import ImageSettings, Recipe
from fvae_lora_experiments.tasks import load_task
from fvae_lora_experiments.tasks.image import load_image_classifier

RAMP = np.linspace(0, 1, 16).reshape(1, 16)
EIGHT_BITS = (RAMP * 255).round().astype("uint8")


def row(image: Image.Image, kind: str = "tiff", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"image": {"bytes": buffer.getvalue(), "path": None}}


def opened(image: dict[str, Any], **settings: Any) -> np.ndarray:
    return np.asarray(open_image(image, "here", ImageSettings(**settings)))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_scaled_by_the_range_of_their_type(kind: str) -> None:
    ramp = row(Image.fromarray((RAMP * 65535).round().astype("uint16")), kind)
    assert np.array_equal(opened(ramp), EIGHT_BITS)


def test_the_recipe_s_range_says_which_values_are_black_and_white() -> None:
    ramp = row(Image.fromarray((1000 + RAMP * 3000).round().astype("uint16")))
    assert np.array_equal(opened(ramp, range=[1000, 4000]), EIGHT_BITS)
    assert np.array_equal(opened(ramp, range=[4000, 1000]), 255 - EIGHT_BITS)
    assert opened(ramp).max() < 17
    assert opened(ramp, range=[1000, 2000]).max() == 255


def test_fractions_are_within_0_and_1_unless_the_recipe_says_otherwise() -> None:
    assert np.array_equal(opened(row(Image.fromarray(RAMP.astype("float32")))), EIGHT_BITS)
    wide = row(Image.fromarray((RAMP * 800).astype("float32")))
    with pytest.raises(
        UserError, match=r"^here: its pixels are fractions from 0 to 800, not within 0 to 1; image\.range"
    ):
        opened(wide)
    assert np.array_equal(opened(wide, range=[0, 800]), EIGHT_BITS)
    with pytest.raises(UserError, match="from nan to nan"):
        opened(row(Image.fromarray(np.full((2, 2), np.nan, "float32"))))


def test_32_bits_are_bytes_unless_the_recipe_says_otherwise() -> None:
    assert np.array_equal(opened(row(Image.fromarray(EIGHT_BITS.astype("int32")))), EIGHT_BITS)
    with pytest.raises(UserError, match="32 bit numbers from 0 to 70000, not within 0 to 255"):
        opened(row(Image.fromarray((RAMP * 70000).astype("int32"))))


def test_8_bits_are_left_as_they_are() -> None:
    assert np.array_equal(opened(row(Image.fromarray(EIGHT_BITS)), range=[0, 9]), EIGHT_BITS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int) -> None:
    pixels = np.zeros((8, 16), "uint8")
    pixels[:4, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    found, what = inspect_image(row(Image.fromarray(pixels), "png", exif=exif), "here", ImageSettings())
    bright = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert found.size == ((16, 8) if orientation < 5 else (8, 16))
    y, x = (place * (side - 1) for place, side in zip(bright, reversed(found.size), strict=True))
    assert found.getpixel((x, y)) == 255
    assert what.turned == (orientation > 1)


def logo(mode: str) -> dict[str, Any]:
    """Red on the left, nothing on the right."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 4))
    if mode == "P":
        palette = image.convert("RGB").quantize(2)
        return row(palette, "png", transparency=palette.getpixel((7, 0)))
    return row(image.convert(mode), "png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "behind"), [(None, 255), ("black", 0), ("#808080", 128)])
def test_what_is_transparent_shows_the_background(mode: str, background: str | None, behind: int) -> None:
    image = open_image(logo(mode), "", ImageSettings(**({"background": background} if background else {})))
    assert image.convert("RGB").getpixel((7, 0)) == (behind,) * 3
    assert image.convert("RGB").getpixel((0, 0)) == ((76,) * 3 if mode == "LA" else (255, 0, 0))


def test_an_opaque_image_is_the_same_with_and_without_alpha() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), "uint8")
    plain = Image.fromarray(pixels)
    found, what = inspect_image(row(plain.convert("RGBA"), "png"), "", ImageSettings())
    assert np.array_equal(np.asarray(found.convert("RGB")), pixels)
    assert not what.transparent


def test_what_was_done_is_counted_and_a_range_that_train_hardly_uses_is_a_warning() -> None:
    narrow = row(Image.fromarray((RAMP * 4095).astype("uint16")))["image"]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = row(Image.new("L", (4, 2)), "png", exif=exif)["image"]
    splits = {
        "train": Dataset.from_dict({"image": [narrow, turned, logo("RGBA")["image"]]}),
        "test": Dataset.from_dict({"image": [row(Image.fromarray((RAMP * 65535).astype("uint16")))["image"]]}),
    }
    facts = inspect_images(splits, ImageSettings(), quiet=True)
    assert facts == ImageFacts(4, turned=1, transparent=1, scaled=2, values=(0, 4095), range=(0, 65535))
    assert facts.warnings() == [
        "images of more than 8 bits use 6.2% of their range in train; image.range=[0,4095] uses all of it"
    ]
    assert inspect_images(splits, ImageSettings(range=(0, 4095)), quiet=True).warnings() == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("image.range=[3,3]", "image.range: input should be two different numbers"),
        ("image.range=[0,.inf]", "image.range: input should be two different numbers"),
        ("image.background=whit", "image.background: input should be a colour"),
    ],
)
def test_settings_that_mean_nothing_are_refused(override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe("image/demo", [override])


def test_the_same_rule_holds_in_every_split(make_recipe: Callable[..., Recipe], tmp_path: Path, vit: Path) -> None:
    values = {"a": 10000, "b": 50000}
    for split in ("train", "val", "test"):
        for name, value in values.items():
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(np.full((8, 8), value + i, "uint16"))
                image.save(tmp_path / split / name / f"{i}.png")
    task = load_task(make_recipe(dataset=str(tmp_path), image={"range": [0, 60000]}))
    splits = task.split(task.open_source())
    model, processor = load_image_classifier(str(vit), splits.classes)
    for rows in task.datasets(splits, model, processor).values():
        black = float(processor(images=Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"].max())
        white = float(processor(images=Image.new("RGB", (8, 8), "white"), return_tensors="pt")["pixel_values"].max())
        for item in rows:
            share = (float(item["pixel_values"].mean()) - black) / (white - black)
            assert share == pytest.approx(values["ab"[item["labels"]]] / 60000, abs=0.01)
