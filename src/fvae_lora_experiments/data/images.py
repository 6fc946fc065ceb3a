"""From encoded images to the tensors that a model takes; augmentation for the training split alone.

One rule opens every image, in training, evaluation and prediction: upright as its EXIF says, over a background where it
is transparent, and with 8 bits, to which more are scaled.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps, features
from tqdm.auto import tqdm

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import ImageSettings

if TYPE_CHECKING:
    import torch

Transform = Callable[[Image.Image], Image.Image]

AS_THEY_ARE = ImageSettings()
WIDE = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits."""

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of images, in lower case."""


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """Those of `SUFFIXES` that Pillow can read here."""
    known = Image.registered_extensions()
    return tuple(s for s in SUFFIXES if known.get(s) in Image.OPEN and (s != ".avif" or features.check("avif")))


@dataclass(frozen=True)
class Opened:
    """What was done to an image so that it can be used."""

    turned: bool
    transparent: bool
    values: tuple[float, float] | None = None
    """The least and the greatest value of one with more than 8 bits, before these were scaled."""
    range: tuple[float, float] | None = None
    """The values of black and white that these were scaled by."""


class Images:
    """A split as a model takes it: `pixel_values` (channels, height, width) and `labels`.

    Args:
        rows: the split, images not decoded.
        split: its name, for messages.
        processor: the model's image processor, which resizes and normalises.
        mode: Pillow's colour mode, "RGB" or "L".
        settings: say how images are opened.
        augment: what happens to an image before the processor sees it; None for validation and test.
    """

    def __init__(
        self,
        rows: Dataset,
        split: str,
        processor: Any,
        mode: str,
        settings: ImageSettings = AS_THEY_ARE,
        augment: Transform | None = None,
    ):
        self.rows, self.split, self.processor, self.mode = rows, split, processor, mode
        self.settings, self.augment = settings, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = open_image(row, f"the run's {self.split} split, row {index + 1}", self.settings).convert(self.mode)
        if self.augment is not None:
            image = self.augment(image)
        return {"pixel_values": process(self.processor, image), "labels": row["label"]}


def process(processor: Any, image: Image.Image) -> torch.Tensor:
    """`image` resized and normalised by the model's own processor: (channels, height, width)."""
    pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def open_image(row: dict[str, Any], where: str, settings: ImageSettings = AS_THEY_ARE) -> Image.Image:
    """Decodes a row's image, see `look_at`."""
    return look_at(row, where, settings)[0]


def look_at(row: dict[str, Any], where: str, settings: ImageSettings) -> tuple[Image.Image, Opened]:
    """A row's image as it is used, and what was done to it.

    Args:
        row: has the `image`.
        where: it is, for messages; a file's name is better, if it has one.
        settings: `range` and `background`.

    Raises:
        UserError: if it is no image or is cut off, or has values of which nobody says what is black and white.
    """
    with _named(row, where):
        found: Image.Image = Image.open(io.BytesIO(_encoded(row)))
        found.load()
        turned = found.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        image = ImageOps.exif_transpose(found) if turned else found
        transparent = _is_transparent(image)
        if transparent:
            below = Image.new("RGBA", image.size, settings.background)
            below.alpha_composite(image.convert("RGBA"))
            image = below.convert("RGB")
        if image.mode not in WIDE:
            return image, Opened(turned, transparent)
        pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    try:
        black, white = settings.range or _range_of(found, low, high)
    except ValueError as error:
        named = row["image"]["path"] or where
        raise UserError(f"{named}: {error}; image.range=[BLACK,WHITE] says which values these are") from error
    scaled = np.clip((pixels.astype(np.float64) - black) / (white - black), 0, 1)
    opened = Opened(turned, transparent, (low, high), (black, white))
    return Image.fromarray((scaled * 255).round().astype(np.uint8)), opened


def _is_transparent(image: Image.Image) -> bool:
    """Whether something can be seen through some pixel."""
    may_be = image.getbands()[-1] in ("A", "a") or "transparency" in image.info
    of_palette = image.palette is not None and image.palette.mode.endswith("A")
    if image.mode in WIDE or not (may_be or of_palette):
        return False
    return int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255


def _range_of(image: Image.Image, low: float, high: float) -> tuple[float, float]:
    """The values of black and white that an image's type says.

    Raises:
        ValueError: the type does not say, and the values are not of the usual range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return 0, 2**16 - 1
    usual = 1 if image.mode == "F" else 255  # NaN is not within
    if not (low >= 0 and high <= usual):
        kind = "fractions" if image.mode == "F" else "32 bit numbers"
        raise ValueError(f"its pixels are {kind} from {low:g} to {high:g}, not within 0 to {usual}")
    return 0, usual


@dataclass(frozen=True)
class ImageFacts:
    """What a look at every image of a data set found."""

    count: int = 0
    turned: int = 0
    """Those that their EXIF turns."""
    transparent: int = 0
    """Those that show the background."""
    scaled: int = 0
    """Those of more than 8 bits."""
    values: tuple[float, float] | None = None
    """The least and the greatest value in train's images of more than 8 bits."""
    range: tuple[float, float] | None = None
    """The values of black and white that these are scaled by, where they are the same for all."""

    def in_words(self) -> str:
        """For the summary."""
        done = {"turned upright": self.turned, "over the background": self.transparent, "scaled to 8 bits": self.scaled}
        said = ", ".join(f"{count:,} {what}" for what, count in done.items() if count)
        return f"{self.count:,} decoded; {said or 'none turned, transparent or scaled'}"

    def warnings(self) -> list[str]:
        """Images that use little of their range look black, or all the same."""
        if self.values is None or self.range is None:
            return []
        used = abs((self.values[1] - self.values[0]) / (self.range[1] - self.range[0]))
        if used >= 1 / 8:
            return []
        low, high = (f"{value:g}" for value in self.values)
        return [
            f"images of more than 8 bits use {100 * used:.2g}% of their range in train; "
            f"image.range=[{low},{high}] uses all of it"
        ]


def look_at_all(splits: dict[str, Dataset], settings: ImageSettings, quiet: bool) -> ImageFacts:
    """Decodes every image once, with all cores.

    Raises:
        UserError: the first that cannot be used.
    """

    def one(place: tuple[str, int]) -> tuple[str, Opened]:
        split, index = place
        return split, look_at(splits[split][index], f"split {split}, row {index + 1}", settings)[1]

    places = [(split, index) for split, rows in splits.items() for index in range(len(rows))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            decoded = pool.map(one, places)
            found = list(tqdm(decoded, total=len(places), desc="decoding images", disable=quiet, leave=False))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    wide = [opened for split, opened in found if split == "train" and opened.values]
    ranges = {opened.range for opened in wide}
    values = [value for opened in wide for value in opened.values or ()]
    return ImageFacts(
        count=len(found),
        turned=sum(opened.turned for _, opened in found),
        transparent=sum(opened.transparent for _, opened in found),
        scaled=sum(opened.values is not None for _, opened in found),
        values=(min(values), max(values)) if values else None,
        range=ranges.pop() if len(ranges) == 1 else None,
    )


def image_content(row: dict[str, Any], where: str) -> bytes:
    """A row's image, encoded, after a look at it that costs far less than decoding.

    Raises:
        UserError: if it is no image; what is cut off may pass.
    """
    with _named(row, where):
        encoded = _encoded(row)
        Image.open(io.BytesIO(encoded)).verify()
    return encoded


def _encoded(row: dict[str, Any]) -> bytes:
    image = row["image"]
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


@contextlib.contextmanager
def _named(row: dict[str, Any], where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        named = row["image"] and row["image"]["path"]
        raise UserError(f"{named or where}: not a readable image") from error


def augmentation(settings: ImageSettings, size: tuple[int, int]) -> Transform | None:
    """The recipe's augmentations, one after the other; `size` is (height, width) of what the model takes."""
    steps: dict[str, Transform] = {
        "random_resized_crop": lambda image: random_resized_crop(image, size, settings.min_crop),
        "horizontal_flip": random_flip,
    }
    chosen = [steps[name] for name in settings.augmentation]
    if not chosen:
        return None

    def augment(image: Image.Image) -> Image.Image:
        for step in chosen:
            image = step(image)
        return image

    return augment


def random_resized_crop(image: Image.Image, size: tuple[int, int], min_share: float) -> Image.Image:
    """A random box of `min_share` to all of the area and of aspect ratio 3/4 to 4/3, resized to `size`.

    A box that does not fit is drawn again, ten times at most; then the whole image is taken. Randomness comes from
    torch's global generator, which checkpoints save and data workers seed.
    """
    import torch

    box = (0.0, 0.0, float(image.width), float(image.height))
    for _ in range(10):
        share, ratio, x, y = torch.rand(4, dtype=torch.float64).tolist()
        area = image.width * image.height * (min_share + (1 - min_share) * share)
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= image.width and height <= image.height:
            left, top = x * (image.width - width), y * (image.height - height)
            box = (left, top, left + width, top + height)
            break
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)


def random_flip(image: Image.Image) -> Image.Image:
    """The image, mirrored left to right half of the time."""
    import torch

    return ImageOps.mirror(image) if torch.rand(()).item() < 0.5 else image
