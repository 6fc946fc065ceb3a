"""A trained adapter, exported: small, for inference with this package, and as a plain LoRA for software that lacks it.

Run it with ``python examples/export_and_serve.py``. The model and the data are made on the spot; no network is needed.
The plain LoRA is loaded by a process that has peft and not this package, as a server would. vLLM takes the same folder:
``vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules mine=FOLDER``; it needs ``bias="fold"`` and a GPU.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

from fvae_lora import FVAELoraConfig, convert_to_lora, export_for_inference

SERVER = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, adapter, batch, answer = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
assert "fvae_lora" not in sys.modules
with torch.no_grad():
    save_file({"logits": model(**load_file(batch)).logits}, answer)
"""


def counting(rows: int) -> dict[str, Tensor]:
    """Numbers that count upwards, from any start."""
    ids = (torch.randint(0, 30, (rows, 1)) + torch.arange(12)) % 30
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    alike = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    print(f"{what}: largest difference {(found - expected).abs().max().item():.6f}, same next token {alike:.3f}")


def main() -> None:
    set_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        base, batch_file = Path(scratch, "base"), Path(scratch, "batch.safetensors")
        LlamaForCausalLM(
            LlamaConfig(vocab_size=30, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        ).save_pretrained(base)
        targets = ["q_proj", "v_proj", "down_proj"]
        config = FVAELoraConfig(task_type="CAUSAL_LM", r=8, encoder_hidden_dims=[], target_modules=targets)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(60):
            batch = counting(16)
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        batch = counting(32)
        expected = logits(model, batch)
        save_file(batch, batch_file)

        export_for_inference(model, Path(scratch, "small"))  # encoder 1 and B alone
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), Path(scratch, "small"))
        compare("small adapter, this package", logits(loaded, batch), expected)

        # A linear encoder (encoder_hidden_dims=[]) is a LoRA already but for a constant, which peft takes as a bias.
        # Most servers do not: `fold` writes it into the matrices, as a fit on calibration data with a measured error.
        for bias in ("keep", "fold"):
            folder, answer = Path(scratch, f"lora-{bias}"), Path(scratch, f"{bias}.safetensors")
            report = convert_to_lora(model, folder, (counting(64) for _ in range(8)), bias=bias, max_error=0.5)
            subprocess.run([sys.executable, "-c", SERVER, base, folder, batch_file, answer], check=True)
            compare(f"plain LoRA, bias={bias}, stock peft", load_file(answer)["logits"], expected)
            print(f"  relative error of a layer's update, at most {max(report.errors.values()):.6f}")


if __name__ == "__main__":
    main()
