"""From decoded images to the tensors that a model takes; augmentation for the training split alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageOps

from fvae_lora_experiments.data.image_decoding import DEFAULTS, open_image
from fvae_lora_experiments.schema import ImageSettings

Transform = Callable[[Image.Image], Image.Image]


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """A split as a model takes it: `pixel_values` (channels, height, width) and `labels`.

    Args:
        rows: the split, images not decoded.
        split: its name, for messages.
        processor: the model's image processor, which resizes and normalises.
        mode: Pillow's colour mode, "RGB" or "L".
        settings: how images are opened.
        augment: changes an image before the processor gets it; None for validation and test.
    """

    def __init__(
        self,
        rows: Dataset,
        split: str,
        processor: Any,
        mode: str,
        settings: ImageSettings = DEFAULTS,
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


def augmentation(settings: ImageSettings, size: tuple[int, int]) -> Transform | None:
    """The recipe's augmentations, one after the other; `size` is the model's (height, width)."""
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
    return ImageOps.mirror(image) if torch.rand(()).item() < 0.5 else image
