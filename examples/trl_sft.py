"""TRL's SFTTrainer computes the loss itself: `ElboTrainerMixin` in front of it adds the ELBO, weighted by tokens.

Run it with ``python examples/trl_sft.py``. The model, the tokenizer and the data are made on the spot; no network is
needed.
"""

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from fvae_lora import ElboTrainerMixin, FVAELoraConfig, elbo_terms

WORDS = ["<pad>", "<eos>", "<unk>", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class ElboSFTTrainer(ElboTrainerMixin, SFTTrainer):
    """SFTTrainer with the ELBO."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def counting(rows: int) -> Dataset:
    """Sentences that count upwards, of different lengths."""
    numbers = WORDS[3:]
    return Dataset.from_dict({"text": [" ".join(numbers[i % 5 : i % 5 + 3 + i % 3]) for i in range(rows)]})


def main() -> None:
    set_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = ElboSFTTrainer(
            model=base,
            args=SFTConfig(
                output_dir=folder,
                max_steps=6,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=1,
                max_length=16,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=counting(64),
            processing_class=tokenizer(),
            peft_config=FVAELoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        )
        trainer.train()
    for log in trainer.state.log_history:
        if "loss" in log:
            parts = {name: log[name] for name in sorted(log) if name == "task_loss" or name.startswith("elbo/")}
            print(f"step {log['step']}: loss {log['loss']:.4f}", parts)
    for layer, terms in elbo_terms(trainer.model).items():
        print(f"{layer}: " + " ".join(f"{name} {value:.3f}" for name, value in terms.items()))


if __name__ == "__main__":
    main()
