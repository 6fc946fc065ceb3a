"""A loop of one's own with accelerate: gradient accumulation, a loss from the logits, and the ELBO added to it.

Run it with ``python examples/accelerate_loop.py``, or with ``accelerate launch`` on several devices. The model and the
data are made on the spot; no network is needed.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from fvae_lora import FVAELoraConfig, add_elbo, elbo_terms


def bright_or_dark(images: int) -> TensorDataset:
    labels = torch.arange(images) % 2
    return TensorDataset(torch.randn(images, 3, 16, 16) + labels[:, None, None, None] - 0.5, labels)


def main() -> None:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.accelerator.is_available())
    base = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            num_labels=2,
        )
    )
    config = FVAELoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batches = DataLoader(bright_or_dark(128), batch_size=8, shuffle=True)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    for epoch in range(2):
        model.train()
        for pixel_values, labels in batches:
            with accelerator.accumulate(model):
                # Without labels the model computes no loss; `add_elbo` then adds what its layers recorded.
                task_loss = F.cross_entropy(model(pixel_values=pixel_values).logits, labels, label_smoothing=0.1)
                accelerator.backward(add_elbo(task_loss, model))
                optimizer.step()
                optimizer.zero_grad()
        layer, terms = next(iter(elbo_terms(model).items()))
        shown = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        accelerator.print(f"epoch {epoch}: task loss {task_loss.item():.3f}; {layer}: {shown}")

    model.eval()
    with torch.no_grad():
        right = sum((model(pixel_values=x).logits.argmax(-1) == y).sum().item() for x, y in batches)
    accelerator.print(f"accuracy on the training images {right / 128:.3f}")


if __name__ == "__main__":
    main()
