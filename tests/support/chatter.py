"""A tiny Llama with a tokenizer of its own, made on the spot, and a small folder of questions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REAL = Path(__file__).parent.parent / "data" / "commonsense"
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<bot>"


def rows_of(file: str) -> list[dict[str, Any]]:
    """The rows of one of the real files."""
    content = (REAL / file).read_bytes()
    text = (gzip.decompress(content) if file.endswith(".gz") else content).decode()
    rows: list[dict[str, Any]] = (
        json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    )
    return rows


def make_tokenizer(folder: Path, **special: str) -> PreTrainedTokenizerFast:
    """Cuts text into 400 pieces that occur in the real questions; begins a text with <s>, and has no padding."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = rows_of("ARC-Easy.test.jsonl")
    core.train_from_iterator([row["instruction"] + row["output"] for row in rows], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{"bos_token": "<s>", "eos_token": "</s>"} | special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llama(folder: Path, **fields: Any) -> LlamaForCausalLM:
    """Two layers with grouped queries, sixteen dimensions."""
    torch.manual_seed(0)
    config = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    model = LlamaForCausalLM(LlamaConfig(**config | {"initializer_range": 0.3} | fields))
    model.save_pretrained(folder)
    return model


def write_questions(folder: Path) -> None:
    """Train rows and three test sets, in the three layouts that a folder may have."""
    folder.mkdir(parents=True)
    train = rows_of("ARC-Easy.train.jsonl.gz")[:16] + rows_of("openbookqa.train.jsonl.gz")[:16]
    (folder / "commonsense_170k.json").write_text(json.dumps(train))
    lines = [json.dumps(row) for row in rows_of("ARC-Easy.test.jsonl")[:5]]
    (folder / "ARC-Easy.test.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("hellaswag", "boolq"):
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(rows_of(f"{name}/test.json")))
