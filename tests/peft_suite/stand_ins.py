"""Tiny models in the places of those that peft's test-suite loads from the hub: no network, no pretrained weights.

They have the architecture that the model's name says and random weights, and lie in a cache of the hub's own layout.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64}
LLAMA = SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 128, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": 64, "word_embed_proj_dim": 16}
OPT_125M = OPT | {"hidden_size": 768, "word_embed_proj_dim": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {"vocab_size": 128, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 4}
BART |= {"decoder_ffn_dim": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
GEMMA3 = LLAMA | {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
CLIP_TEXT = SMALL | {"projection_dim": 16}
RESNET = {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3}

MODELS = {
    "bert-base-uncased": ("BertForSequenceClassification", "bert", SMALL),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "gemma3_text", GEMMA3),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "mistral", LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "opt", OPT_125M),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModelWithProjection", "clip_text_model", CLIP_TEXT),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "qwen2", LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "bart", BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", "bert", SMALL),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "bert", SMALL),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "bloom",
        {"vocab_size": 128, "hidden_size": 32, "n_layer": 5, "n_head": 4},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "deberta", SMALL),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "deberta-v2", SMALL),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "gpt2", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "gptj", GPT2 | {"rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXForCausalLM", "gpt_neox", SMALL),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "opt", OPT),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "resnet",
        RESNET,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "roberta",
        SMALL,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "roberta", SMALL),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", "t5", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", "t5", T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "t5", T5),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "llama",
        LLAMA | {"num_labels": 1},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "llama", LLAMA),
}
COMMIT = "0" * 40


def build(cache: Path) -> None:
    """Write the models that the cache lacks.

    Args:
        cache: What HF_HUB_CACHE will name.
    """
    for name, (class_name, model_type, fields) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        if (repository / "refs" / "main").exists():
            continue
        torch.manual_seed(0)
        model_class: type[PreTrainedModel] = getattr(transformers, class_name)
        model = model_class(AutoConfig.for_model(model_type, **fields))
        with torch.no_grad():  # more than the usual 0.02, or no adapter would change what a model says
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.3 if model_type == "bart" else 0.1)
        model.save_pretrained(repository / "snapshots" / COMMIT)
        if model_type == "resnet":
            processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 64}}
            (repository / "snapshots" / COMMIT / "preprocessor_config.json").write_text(json.dumps(processor))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)
