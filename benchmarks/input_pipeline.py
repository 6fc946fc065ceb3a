"""Images per second of the input pipeline, alone and in training, and where an image's time goes.

    python benchmarks/input_pipeline.py [--workers 0,1,2] [--side 256] [--device-speed 1000]

The images are made here (smooth noise, JPEG, square); they are read, decoded, augmented as `image/default` does,
resized and normalised by ViT's image processor, and collated into batches of 32, as in a run. Training is that of a
small adapted ViT on one thread, and on a stand-in for an accelerator, which takes its time for a batch and leaves the
processor idle.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from peft import get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, default_data_collator

from fvae_lora import FVAELoraConfig
from fvae_lora_experiments.data.image_decoding import open_image
from fvae_lora_experiments.data.image_inputs import Images, augmentation, process
from fvae_lora_experiments.schema import ImageSettings

BATCH = 32
AUGMENTED = ImageSettings(augmentation=["random_resized_crop", "horizontal_flip"])


def jpegs(rows: int, side: int) -> Dataset:
    """`rows` labelled JPEGs of `side` x `side` pixels, smooth at the scale of 16 pixels as photographs are."""
    noise = np.random.default_rng(0)
    encoded = []
    for _ in range(rows):
        coarse = Image.fromarray(noise.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "jpeg", quality=90)
        encoded.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": encoded, "label": [i % 2 for i in range(rows)]}, features=features)


def per_image_ms(step: Callable[[Any], Any], inputs: list[Any]) -> float:
    """Mean time of `step`, in milliseconds."""
    began = time.perf_counter()
    for value in inputs:
        step(value)
    return 1e3 * (time.perf_counter() - began) / len(inputs)


def small_vit() -> Callable[[dict[str, Any]], None]:
    """Training steps of an adapted ViT of two narrow layers and large patches."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, patch_size=32, num_labels=2))
    adapted = get_peft_model(model, FVAELoraConfig(target_modules=["q_proj", "v_proj"])).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], fused=True)

    def step(batch: dict[str, Any]) -> None:
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()

    return step


def images_per_second(images: Images, workers: int, step: Callable[[dict[str, Any]], None]) -> float:
    """Through a loader as the Trainer has it, with a step for each batch; the workers' start is not counted."""
    options = {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(images, BATCH, collate_fn=default_data_collator, **options)
    for _ in loader:
        pass
    began = time.perf_counter()
    for batch in loader:
        step(batch)
    return len(images) / (time.perf_counter() - began)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", default="0,1,2", help="numbers of worker processes, separated by commas")
    parser.add_argument("--side", type=int, default=256, help="height and width of the JPEGs")
    parser.add_argument("--rows", type=int, default=512, help="how many images")
    parser.add_argument("--device-speed", type=float, default=1000, help="images that the stand-in trains in a second")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows, processor = jpegs(chosen.rows, chosen.side), ViTImageProcessor()
    augment = augmentation(AUGMENTED, (224, 224))
    assert augment is not None
    encoded = [rows[i] for i in range(len(rows))]
    decoded = [open_image(row, "") for row in encoded]
    cropped = [augment(image) for image in decoded]
    print("| step | ms per image |\n|---|---:|")
    for name, step, inputs in (
        ("read a row", rows.__getitem__, list(range(len(rows)))),
        ("decode the JPEG", lambda row: open_image(row, "").convert("RGB"), encoded),
        ("crop and flip", augment, decoded),
        ("resize and normalise", lambda image: process(processor, image), cropped),
    ):
        print(f"| {name} | {per_image_ms(step, inputs):.2f} |")
    images = Images(rows, "train", processor, "RGB", augment=augment)
    steps: dict[str, Callable[[dict[str, Any]], None]] = {
        "the pipeline alone": lambda batch: None,
        "a small ViT on the processor": small_vit(),
        f"a device that trains {chosen.device_speed:g} a second": lambda batch: time.sleep(BATCH / chosen.device_speed),
    }
    print(f"\n| images per second, by worker processes | {' | '.join(steps)} |\n|---:|" + "---:|" * len(steps))
    for workers in map(int, chosen.workers.split(",")):
        speeds = [images_per_second(images, workers, step) for step in steps.values()]
        print(f"| {workers} | {' | '.join(f'{speed:.0f}' for speed in speeds)} |")


if __name__ == "__main__":
    main()
