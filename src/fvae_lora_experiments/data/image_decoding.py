"""The one rule by which every image is opened, in training, evaluation and prediction.

An image is turned upright as its EXIF says, laid over a background where it is transparent, and scaled to 8 bits where
it has more.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps, features
from tqdm.auto import tqdm

from fvae_lora_experiments.data.encoded import encoded_bytes
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.schema import ImageSettings

DEFAULTS = ImageSettings()
HIGH_BIT_DEPTH_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits."""

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Suffixes of image files, in lower case."""


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """Those of `SUFFIXES` that Pillow can read here."""
    known = Image.registered_extensions()
    return tuple(s for s in SUFFIXES if known.get(s) in Image.OPEN and (s != ".avif" or features.check("avif")))


@dataclass(frozen=True)
class Opened:
    """What was done to an image when it was opened."""

    turned: bool
    transparent: bool
    values: tuple[float, float] | None = None
    """The least and the greatest value of an image with more than 8 bits, before scaling."""
    range: tuple[float, float] | None = None
    """The values of black and white in its scaling."""


def open_image(row: dict[str, Any], where: str, settings: ImageSettings = DEFAULTS) -> Image.Image:
    """Decodes a row's image, see `inspect_image`."""
    return inspect_image(row, where, settings)[0]


def inspect_image(row: dict[str, Any], where: str, settings: ImageSettings) -> tuple[Image.Image, Opened]:
    """A row's image, opened, and what was done to it.

    Args:
        row: has the `image`.
        where: the row, for messages about images without a file name.
        settings: `range` and `background`.

    Raises:
        UserError: if it is not an image or is truncated, or if it is unknown which of its values are black and white.
    """
    with _named(row, where):
        found: Image.Image = Image.open(io.BytesIO(encoded_bytes(row["image"])))
        found.load()
        turned = found.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        image = ImageOps.exif_transpose(found) if turned else found
        transparent = _is_transparent(image)
        if transparent:
            below = Image.new("RGBA", image.size, settings.background)
            below.alpha_composite(image.convert("RGBA"))
            image = below.convert("RGB")
        if image.mode not in HIGH_BIT_DEPTH_MODES:
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
    """Whether any pixel is transparent."""
    may_be = image.getbands()[-1] in ("A", "a") or "transparency" in image.info
    of_palette = image.palette is not None and image.palette.mode.endswith("A")
    if image.mode in HIGH_BIT_DEPTH_MODES or not (may_be or of_palette):
        return False
    return int(np.asarray(image.convert("RGBA"))[..., 3].min()) < 255


def _range_of(image: Image.Image, low: float, high: float) -> tuple[float, float]:
    """The values of black and white, from the type of an image.

    Raises:
        ValueError: the type does not say, and the values are outside the usual range.
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
    """What opening every image of a data set has shown."""

    count: int = 0
    turned: int = 0
    """Turned upright by their EXIF."""
    transparent: int = 0
    """Laid over the background."""
    scaled: int = 0
    """Scaled from more than 8 bits."""
    values: tuple[float, float] | None = None
    """The least and the greatest value in train's images of more than 8 bits."""
    range: tuple[float, float] | None = None
    """The values of black and white in their scaling, if they are the same for all."""

    def in_words(self) -> str:
        """For the summary."""
        done = {"turned upright": self.turned, "over the background": self.transparent, "scaled to 8 bits": self.scaled}
        said = ", ".join(f"{count:,} {what}" for what, count in done.items() if count)
        return f"{self.count:,} decoded; {said or 'none turned, transparent or scaled'}"

    def warnings(self) -> list[str]:
        """Images that use little of their range look black, or all alike."""
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


def inspect_images(splits: dict[str, Dataset], settings: ImageSettings, quiet: bool) -> ImageFacts:
    """Opens every image once, on all cores.

    Raises:
        UserError: for the first that cannot be used.
    """

    def one(place: tuple[str, int]) -> tuple[str, Opened]:
        split, index = place
        return split, inspect_image(splits[split][index], f"split {split}, row {index + 1}", settings)[1]

    places = [(split, index) for split, rows in splits.items() for index in range(len(rows))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            decoded = pool.map(one, places)
            found = list(tqdm(decoded, total=len(places), desc="decoding images", disable=quiet or None, leave=False))
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
    """A row's image, still encoded, after a check that costs far less than decoding.

    Raises:
        UserError: if it is not an image; a truncated one may pass.
    """
    with _named(row, where):
        encoded = encoded_bytes(row["image"])
        Image.open(io.BytesIO(encoded)).verify()
    return encoded


@contextlib.contextmanager
def _named(row: dict[str, Any], where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        named = row["image"] and row["image"]["path"]
        raise UserError(f"{named or where}: not a readable image") from error
