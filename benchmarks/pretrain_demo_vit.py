"""Pre-train the small vision transformer that `fvae-lora demo` adapts.

The data are the 70,000 real 28x28 images of Fashion-MNIST (Zalando SE, MIT licence). On Debian or Ubuntu:

    apt-get download dataset-fashion-mnist
    dpkg -x dataset-fashion-mnist_*_all.deb fashion-mnist
    python benchmarks/pretrain_demo_vit.py --data fashion-mnist/usr/share/datasets/fashion-mnist

Anywhere else, DIR is a folder with the data set's four `*-ubyte.gz` files. After every epoch that is the
best so far on a validation split of the training images, the model is written in fp16 to `--out`, so that
an interrupted run leaves its best model behind. The 10,000 test images are looked at once, at the end.
"""

import argparse
import copy
import gzip
import math
import struct
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    get_cosine_schedule_with_warmup,
)

ASSET = Path(__file__).parents[1] / "src/fvae_lora_experiments/assets/vit-fashion-mnist"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
SIDE = 28
VALIDATION = 5_000  # images cut from the training set


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of unsigned bytes as a uint8 tensor of the shape that its header states."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    zero, kind, dims = struct.unpack_from(">HBB", data)
    if (zero, kind) != (0, 8):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{dims}I", data, 4)
    return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * dims).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return the images (N, 28, 28) in uint8 and the labels (N,) in int64 of `split`, "train" or "test"."""
    images, labels = (read_idx(folder / name) for name in FILES[split])
    return images, labels.long()


def build_model() -> ViTForImageClassification:
    """Return an untrained transformer: three input channels, so that ordinary RGB images fit."""
    config = ViTConfig(
        image_size=SIDE,
        patch_size=7,
        num_channels=3,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        initializer_range=0.06,  # the usual 0.02 is made for wider models and delays the start of learning
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    return ViTForImageClassification(config)


def to_pixels(images: Tensor) -> Tensor:
    """Do to grey uint8 images (N, 28, 28) what the image processor does: (N, 3, 28, 28) in [-1, 1]."""
    return (images.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def mirror(images: Tensor) -> Tensor:
    """Mirror a random half of the images (N, 28, 28)."""
    return torch.where(torch.rand(len(images), 1, 1) < 0.5, images.flip(-1), images)


@torch.inference_mode()
def accuracy(model: ViTForImageClassification, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of `pixels` (N, 3, 28, 28) that `model` gives their label (N,)."""
    model.eval()
    guesses = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in pixels.split(500)])
    return (guesses == labels).float().mean().item()


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Write the model in fp16 and its image processor to `folder`, each file replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy.deepcopy(model).half().save_pretrained(scratch)
        ViTImageProcessor(size={"height": SIDE, "width": SIDE}, do_convert_rgb=True).save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            file.replace(folder / file.name)


def train(
    model: ViTForImageClassification, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> ViTForImageClassification:
    """Train `model`, save the best epoch so far to `args.out`, and return the best epoch's copy in fp32.

    `images` (N, 28, 28) and `labels` (N,) are the training set, from which the validation split is cut.
    """
    order = torch.randperm(len(images))
    held_out, order = order[:VALIDATION], order[VALIDATION:]
    held_out_pixels = to_pixels(images[held_out])

    steps_per_epoch = math.ceil(len(order) / args.batch_size)
    steps = args.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)

    best_score, best, step, start = 0.0, model, 0, time.monotonic()
    for epoch in range(1, args.epochs + 1):
        model.train()
        for batch in order[torch.randperm(len(order))].split(args.batch_size):
            logits = model(pixel_values=to_pixels(mirror(images[batch]))).logits
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % 200 == 0:
                spent = time.monotonic() - start
                left = spent / step * (steps - step)
                times = f"{spent:.0f} s, {left:.0f} s left"
                print(f"step {step}/{steps}  loss {loss.item():.3f}  {times}", flush=True)
        score = accuracy(model, held_out_pixels, labels[held_out])
        print(f"epoch {epoch}/{args.epochs}  validation accuracy {score:.4f}", flush=True)
        if score > best_score:
            best_score, best = score, copy.deepcopy(model)
            save(best, args.out)
    spent = time.monotonic() - start
    print(f"{step} steps in {spent:.0f} s, best validation accuracy {best_score:.4f}")
    return best


def report_test(best: ViTForImageClassification, images: Tensor, labels: Tensor, folder: Path) -> None:
    """Print the test accuracy of the trained fp32 model and of what a user loads from `folder`.

    `images` (N, 28, 28) take a user's way, through the saved image processor.
    """
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image.numpy()) for image in images]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    saved = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    size = (folder / "model.safetensors").stat().st_size
    print(f"test accuracy: {accuracy(best, pixels, labels):.4f} in fp32 as trained")
    print(f"test accuracy: {accuracy(saved, pixels, labels):.4f} from the fp16 file")
    print(f"{saved.num_parameters():,} parameters, model.safetensors {size:,} bytes")


def main() -> None:
    """Parse the command line, train, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the data set's folder")
    parser.add_argument("--out", type=Path, default=ASSET, help="folder to write the model to")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    try:
        training, test = (load_split(args.data, split) for split in FILES)
    except (OSError, EOFError, ValueError) as error:
        parser.error(f"--data {args.data}: {error}; needed are the data set's four *-ubyte.gz files")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    best = train(build_model(), *training, args)
    report_test(best, *test, args.out)


if __name__ == "__main__":
    main()
