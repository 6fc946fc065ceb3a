"""Tiny encoders with tokenizers, and sentences whose label stands in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

WORDS = ["good", "bad", "film", "the", "a", "is", "was", "plot", "story", "cast", "and", "very"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LENGTH = 40


def write_encoder(folder: Path, kind: str = "bert") -> Path:
    """A pretrained `BertModel` or `RobertaModel` of random weights and its tokenizer, in `folder`."""
    torch.manual_seed(0)
    common = {"vocab_size": len(SPECIAL + WORDS), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    common["initializer_range"] = {"bert": 0.2, "roberta": 0.8}[kind]  # so that they tell sentences apart
    if kind == "bert":
        model = BertModel(BertConfig(**WIDTHS, **common, max_position_embeddings=LENGTH))
    else:
        positions = {"max_position_embeddings": LENGTH + 1, "pad_token_id": 0, "type_vocab_size": 1}
        model = RobertaModel(RobertaConfig(**WIDTHS, **common, **positions))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "bert")
    PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=LENGTH, model_input_names=inputs, **names
    ).save_pretrained(folder)
    return folder


def sentences(label: int, count: int, seed: int) -> list[str]:
    """Sentences of 3 to 12 words; "good" is in those with label 1, "bad" in the others."""
    noise = np.random.default_rng([seed, label])
    drawn = [list(noise.choice(WORDS[2:], noise.integers(2, 12))) for _ in range(count)]
    return [" ".join([*words[:1], ("bad", "good")[label], *words[1:]]) for words in drawn]
