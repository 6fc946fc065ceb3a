"""Pictures that a tiny model can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
SIDE = 8


def write_pictures(folder: Path, per_class: int, seed: int = 0) -> None:
    """Noisy patches of one colour per class, each picture different, in one folder per class."""
    noise = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.clip(noise.normal(colour, 60, (SIDE + i % 3, SIDE + 2, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
