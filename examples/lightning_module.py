"""A LightningModule around an adapted model: the model's own loss contains the ELBO already.

Run it with ``python examples/lightning_module.py``. The model and the data are made on the spot; no network is needed.
"""

import lightning as L
import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from fvae_lora import FVAELoraConfig, elbo_loss, elbo_terms


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        base = BertForSequenceClassification(
            BertConfig(
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                num_labels=2,
            )
        )
        config = FVAELoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        self.model = get_peft_model(base, config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss  # task loss and ELBO
        self.log("loss", loss)
        with torch.no_grad():
            self.log("elbo_loss", elbo_loss(self.model))
        for layer, terms in elbo_terms(self.model).items():
            self.log_dict({f"{layer}/{name}": value for name, value in terms.items()})
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self.model(**batch)  # in eval mode there is no ELBO, and nothing is sampled
        self.log("val_loss", output.loss)
        self.log("val_accuracy", (output.logits.argmax(-1) == batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-2)


def texts(rows: int) -> list[dict[str, Tensor]]:
    """Two topics with words of their own."""
    labels = torch.arange(rows) % 2
    words = torch.randint(0, 25, (rows, 8)) + 25 * labels[:, None]
    return [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]


def main() -> None:
    L.seed_everything(0)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=20,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(texts(128), batch_size=16, shuffle=True), DataLoader(texts(64), batch_size=16))
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name} {value:.3f}")


if __name__ == "__main__":
    main()
