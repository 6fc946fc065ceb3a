"""Tiny models of today's transformers, from their configurations, and batches for them. Nothing is downloaded.

No dropout: what two runs differ in is then the method's noise alone.
"""

from __future__ import annotations

import itertools

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from fvae_lora import FVAELoraConfig

VOCABULARY = 60
CLASSES = 3
TARGETS = {
    "bert": ["query", "value"],
    "vit": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}


def tiny_bert(dtype: torch.dtype = torch.float32, **fields: object) -> BertForSequenceClassification:
    """A classifier of sequences; adapt ``query`` and ``value``."""
    config = {"num_labels": CLASSES, "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**config | fields)).to(dtype)


def tiny_vit(dtype: torch.dtype = torch.float32, **fields: object) -> ViTForImageClassification:
    """A classifier of 8 x 8 images; adapt ``q_proj`` and ``v_proj``."""
    config = {"num_labels": CLASSES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "image_size": 8, "patch_size": 4}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**config | fields)).to(dtype)


def tiny_gpt2(dtype: torch.dtype = torch.float32, **fields: object) -> GPT2LMHeadModel:
    """A causal language model whose layers are ``Conv1D``; adapt ``c_attn``."""
    config = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**config | fields)).to(dtype)


def tiny_llama(dtype: torch.dtype = torch.float32, **fields: object) -> LlamaForCausalLM:
    """A causal language model without biases; adapt ``q_proj`` and ``v_proj``."""
    config = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**config | fields)).to(dtype)


def tiny_mixtral(dtype: torch.dtype = torch.float32, **fields: object) -> MixtralForCausalLM:
    """A causal language model of which each layer has three experts, stacked in two parameters."""
    config = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return MixtralForCausalLM(MixtralConfig(**config | {"num_local_experts": 3} | fields)).to(dtype)


def tiny_t5(dtype: torch.dtype = torch.float32, **fields: object) -> T5ForConditionalGeneration:
    """An encoder and a decoder; adapt ``q`` and ``v``."""
    config = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**config | fields)).to(dtype)


BUILDERS = {"bert": tiny_bert, "vit": tiny_vit, "gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}


def batch_for(model: PreTrainedModel, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Arguments of a model's forward, with labels; rows of text differ in length and are padded at the end.

    The same for the same shape, whatever was drawn before.
    """
    generator = torch.Generator().manual_seed(rows * 1000 + length)
    if model.config.model_type == "vit":
        pixels = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64).to(model.dtype)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % CLASSES}
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    lengths = length - torch.arange(rows) % max(1, length - 2)
    mask = (torch.arange(length) < lengths[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if model.config.model_type == "bert":
        return batch | {"labels": torch.arange(rows) % CLASSES}
    if model.config.model_type == "t5":
        ids, mask = ids[:, : length - 2].flip(1), mask[:, 1:-1]
    return batch | {"labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def logits(model: nn.Module, kind: str = "bert", **kwargs: object) -> Tensor:
    """What a model of that kind makes of its batch, in whatever mode it is in."""
    return model(**batch_for(BUILDERS[kind]()), **kwargs).logits


@torch.no_grad()
def evaluated(model: nn.Module, base: PreTrainedModel) -> Tensor:
    """The logits of an adapted `base` in eval mode."""
    return model.eval()(**batch_for(base)).logits


def adapted_linear(
    in_features: int = 6,
    out_features: int = 5,
    *,
    bias: bool = True,
    conv1d: bool = False,
    layers: int = 1,
    dtype: torch.dtype = torch.float64,
    **config: object,
) -> PeftModel:
    """Linear layers in a row, each adapted, with parameters that are neither zero nor symmetric."""
    widths = [in_features] * layers + [out_features]
    bases = [Conv1D(n, m) if conv1d else nn.Linear(m, n, bias=bias) for m, n in itertools.pairwise(widths)]
    config = {"r": 3, "decoder_hidden_dims": [7], "kl_weight": 1.0, "elbo_weight": 1.0} | config
    targets = [str(i) for i in range(layers)]
    model = get_peft_model(nn.Sequential(*bases).to(dtype), FVAELoraConfig(target_modules=targets, **config))
    return randomised(model)


def randomised(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Draw all the method's parameters anew: at the start the encoders' heads are zero."""
    for name, parameter in model.named_parameters():
        if "fvae_lora_" in name:
            nn.init.normal_(parameter, 0.0, std)
    return model
