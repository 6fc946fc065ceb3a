"""What the autoencoders say about an input: how sure a prediction is, and whether the input is like those of training.

Run it with ``python examples/uncertainty.py``. The model and the data are made on the spot; no network is needed.
Numbers on real images are in benchmarks/README.md: a detector is worth having if it beats simpler ones on your data.
"""

import tempfile

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, set_seed

from fvae_lora import ForeignInputDetector, FVAELoraConfig, predict_with_uncertainty, score_inputs


def bright_or_dark(images: int) -> dict[str, Tensor]:
    labels = torch.arange(images) % 2
    return {"pixel_values": torch.randn(images, 3, 16, 16) + labels[:, None, None, None] - 0.5, "labels": labels}


def striped(images: int) -> dict[str, Tensor]:
    """Unlike anything in training."""
    stripes = 3.0 * (torch.arange(16) % 2 * 2 - 1)
    return {"pixel_values": torch.randn(images, 3, 16, 16) + stripes}


def main() -> None:
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=2, **sizes))
    config = FVAELoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    training = [bright_or_dark(16) for _ in range(16)]
    for _ in range(4):
        for batch in training:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    images = {"images like those of training": bright_or_dark(64)["pixel_values"]}
    images["stripes"] = striped(64)["pixel_values"]
    for name, pixels in images.items():
        sure = predict_with_uncertainty(model, pixel_values=pixels, draws=16)
        layer, scores = next(iter(score_inputs(model, pixel_values=pixels).items()))
        print(
            f"{name}: entropy {sure.entropy.mean():.3f} nats, of which draws of z1 {sure.mutual_information.mean():.4f}"
        )
        print(f"  log-likelihood in {layer}: {scores.log_likelihood.mean():.1f} nats")

    fitted_on = [{"pixel_values": batch["pixel_values"]} for batch in training]
    held_out = [{"pixel_values": bright_or_dark(16)["pixel_values"]} for _ in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        ForeignInputDetector.fit(model, fitted_on, held_out).save(folder)
        detector = ForeignInputDetector.load(folder, model)
    for name, pixels in images.items():
        flagged = (detector.score(pixel_values=pixels).p_value <= 0.05).float().mean()
        print(f"{name}: p-value of at most 0.05 for {flagged:.3f} of them")


if __name__ == "__main__":
    main()
