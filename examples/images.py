"""Images in a folder for each class: an adapter is trained, scored, saved and loaded again.

``python examples/images.py FOLDER`` does so for images of your own. It needs ``datasets`` and ``pillow`` beside the
package, downloads the pretrained model (``--model``, 330 MB for the default) and wants a GPU: on two cores a step of 32
images takes some ten seconds. ``--tiny`` makes a small model and its images on the spot instead, without a network.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from fvae_lora import FVAELoraConfig, FVAELoraTrainer

COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def make_images(folder: Path, side: int = 16) -> Path:
    """Noisy patches, a folder for each colour."""
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(noise.normal(colour, 60, (side, side, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def make_model(folder: Path, side: int = 16) -> Path:
    """A small ViT that was never trained."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(image_size=side, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def train(images: str, model_name: str, out: Path, arguments: dict[str, Any]) -> None:
    parts = load_dataset("imagefolder", data_dir=images, split="train", cache_dir=str(out / "cache"))
    parts = parts.train_test_split(0.2, stratify_by_column="label", seed=0)
    classes = parts["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(model_name)

    def base() -> Any:
        set_seed(0)  # the head is new: the same one each time
        return AutoModelForImageClassification.from_pretrained(
            model_name, num_labels=len(classes), ignore_mismatched_sizes=True
        )

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor(images=[row["image"].convert("RGB") for row in rows], return_tensors="pt")
        return {**pixels, "labels": torch.tensor([row["label"] for row in rows])}

    config = FVAELoraConfig(r=16, target_modules=["q_proj", "k_proj"], modules_to_save=["classifier"])
    model = get_peft_model(base(), config)
    settings = {"remove_unused_columns": False, "report_to": "none", "label_names": ["labels"], "logging_steps": 10}
    trainer = FVAELoraTrainer(
        model,
        TrainingArguments(str(out / "checkpoints"), save_strategy="no", **settings, **arguments),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=collate,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    print(f"accuracy on {len(parts['test'])} images left out: {trainer.evaluate()['eval_accuracy']:.3f}")

    model.save_pretrained(out / "adapter")
    loaded = PeftModel.from_pretrained(base(), out / "adapter").eval()
    batch = {name: value.to(model.device) for name, value in collate([parts["test"][0]]).items()}
    with torch.no_grad():
        difference = (loaded.to(model.device)(**batch).logits - model.eval()(**batch).logits).abs().max().item()
    print(f"largest difference of the loaded adapter's logits: {difference:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="images, in a folder for each class")
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="a ViT: name on the hub or folder")
    parser.add_argument("--out", type=Path, default=Path("runs/example-images"))
    parser.add_argument("--tiny", action="store_true", help="a small model and images made on the spot")
    given = parser.parse_args()
    if given.tiny:
        tiny = {"num_train_epochs": 10, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": True}
        with tempfile.TemporaryDirectory() as scratch:
            set_seed(0)
            images, model = make_images(Path(scratch, "images")), make_model(Path(scratch, "model"))
            train(str(images), str(model), Path(scratch), tiny)
    elif given.folder is None:
        parser.error("expected FOLDER, or --tiny")
    else:
        usual = {"num_train_epochs": 30, "per_device_train_batch_size": 32, "learning_rate": 5e-3}
        train(given.folder, given.model, given.out, usual)


if __name__ == "__main__":
    main()
