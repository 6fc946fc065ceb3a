"""Padding does not count, in whatever layout its mask is given: what lies in it changes neither ELBO nor gradients.

Where a mask does not fit what a layer reads, that is said, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    DynamicCache,
    LongformerConfig,
    LongformerForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from by_hand import adapted, assert_same, config, gradients
from fvae_lora import add_elbo, elbo_terms
from fvae_lora.masks import TokenMasks
from tiny import batch_for, randomised, tiny_bert, tiny_llama

pytestmark = pytest.mark.usefixtures("without_noise")
DOUBLE = torch.float64
LENGTHS = torch.tensor([4, 6, 1])
KEPT = torch.arange(6) < LENGTHS[:, None]  # (3, 6)
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "intermediate_size": 16}


def ids(seed: int, kept: Tensor = KEPT) -> Tensor:
    """Text of which only the padding depends on the seed."""
    text = torch.randint(1, 60, kept.shape, generator=torch.Generator().manual_seed(0))
    padding = torch.randint(1, 60, kept.shape, generator=torch.Generator().manual_seed(1 + seed))
    return torch.where(kept, text, padding)


def vectors(seed: int, kept: Tensor = KEPT, width: int = 8) -> Tensor:
    """The same of embedded text."""
    text = torch.randn(*kept.shape, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    padding = torch.randn(*kept.shape, width, dtype=DOUBLE, generator=torch.Generator().manual_seed(1 + seed))
    return torch.where(kept[..., None], text, padding)


def assert_padding_does_not_count(model: PeftModel, run: Callable[[int], Tensor], tolerance: float = 1e-10) -> None:
    """`run` takes a seed for the contents of the padding, and gives a loss."""
    terms, found = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "every token counts")
        for seed in (0, 1):
            found.append(gradients(model, lambda seed=seed: run(seed)))
            terms.append(elbo_terms(model))
    assert_same(found[1], found[0], tolerance)
    for layer, of_layer in terms[0].items():
        assert terms[1][layer] == pytest.approx(of_layer, rel=1e-6), layer


# --- Masks of transformers' models ----------------------------------------------------------------------------------


def added(mask: Tensor, least: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=DOUBLE).masked_fill(~mask, least)


CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril() & KEPT[:, None, None, :]  # (3, 1, 6, 6)
LAYOUTS: dict[str, Any] = {
    "bool": KEPT,
    "0 and 1 as floats": KEPT.to(DOUBLE),
    "numbers of packed texts": KEPT.long() * torch.tensor([1, 1, 2, 2, 3, 3]),
    "pairs of bool": CAUSAL,
    "pairs of each head": CAUSAL.expand(-1, 2, -1, -1),
    "pairs, added, the least number": added(CAUSAL, torch.finfo(DOUBLE).min),
    "pairs, added, -10000": added(CAUSAL, -1e4),
    "by kinds of layers": {"full_attention": CAUSAL, "sliding_attention": CAUSAL.triu(-2)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_of_a_causal_model(layout: str) -> None:
    small = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "sliding_window": 3}
    small |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    model = adapted(
        Qwen2ForCausalLM(Qwen2Config(**small, use_sliding_window=True)).to(DOUBLE), target_modules=["q_proj"]
    )
    mask, labels = LAYOUTS[layout], ids(0).masked_fill(~KEPT, -100)
    assert TokenMasks.of(model, {"input_ids": ids(0), "attention_mask": mask}).input.equal(KEPT)
    run = lambda seed: model(input_ids=ids(seed), attention_mask=mask, labels=labels).loss  # noqa: E731
    assert_padding_does_not_count(model, run, 1e-5)  # rounds to fp32 inside


def test_one_mask_of_pairs_for_all_samples() -> None:
    model, kept = adapted("llama"), KEPT[:1].expand(3, -1)
    mask, labels = CAUSAL[:1], ids(0, kept).masked_fill(~kept, -100)
    assert_padding_does_not_count(
        model, lambda seed: model(input_ids=ids(seed, kept), attention_mask=mask, labels=labels).loss, 1e-5
    )


def test_nothing_but_zeros_added_masks_nothing() -> None:
    found = TokenMasks.of(tiny_llama(), {"input_ids": ids(0), "attention_mask": torch.zeros(3, 1, 6, 6)})
    assert found.input.all()


def test_position_biases_among_the_scores_are_no_padding() -> None:
    distances = (torch.arange(2000) - torch.arange(2000)[:, None]).abs()
    mask = added(KEPT[:, None, None, [0] * 1994 + list(range(6))].expand(-1, 1, 2000, -1), -1e9) - distances
    found = TokenMasks.of(tiny_llama(), {"attention_mask": mask})
    assert found.input[:, -6:].equal(KEPT)


def test_a_mask_that_begins_with_what_the_cache_holds() -> None:
    model, before = adapted("llama"), torch.ones(3, 4, dtype=torch.long)

    def run(seed: int) -> Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.eval()(input_ids=before, past_key_values=cache, use_cache=True)
        mask, labels = torch.cat([before, KEPT.long()], -1), ids(0).masked_fill(~KEPT, -100)
        return model.train()(input_ids=ids(seed), attention_mask=mask, past_key_values=cache, labels=labels).loss

    assert_padding_does_not_count(model, run, 1e-5)


def test_several_texts_in_a_sample() -> None:
    model = adapted(BertForMultipleChoice(BertConfig(**SMALL)).to(DOUBLE), target_modules=["query", "dense"])
    kept = torch.stack([KEPT, KEPT.flip(0)], 1)
    assert_padding_does_not_count(
        model, lambda seed: model(ids(seed, kept), kept.long(), labels=torch.tensor([0, 1, 1])).loss
    )


def test_a_model_that_pads_to_a_whole_window() -> None:
    """Longformer, of which attention reads (length, batch, width): 6 tokens become 8."""
    longformer = LongformerConfig(**SMALL, attention_window=4, max_position_embeddings=20, pad_token_id=0)
    model = adapted(
        LongformerForSequenceClassification(longformer).to(DOUBLE), target_modules=["query", "intermediate.dense"]
    )
    mask, labels = KEPT.long(), torch.tensor([0, 1, 1])
    run = lambda seed: model(ids(seed), mask, labels=labels).loss  # noqa: E731
    assert_padding_does_not_count(model, run, 1e-5)
    masks = TokenMasks.of(model.get_base_model(), {"input_ids": ids(0), "attention_mask": mask})
    assert (
        masks.weights("query", torch.zeros(8, 3, 16)).count == masks.weights("dense", torch.zeros(3, 8, 16)).count == 11
    )


def test_packed_texts_have_no_padding() -> None:
    model, packed = adapted("llama"), ids(0, torch.ones(1, 10, dtype=torch.bool))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    masks = TokenMasks.of(model, {"input_ids": packed, "position_ids": positions})
    assert masks.weights("model.layers.0.self_attn.q_proj", torch.zeros(1, 10, 16)).count == 10
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "every token counts")
        model(input_ids=packed, position_ids=positions, labels=packed).loss.backward()


# --- Torch's own transformer, and models of one's own ---------------------------------------------------------------


class Own(nn.Module):
    """A model that a test gives its forward."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)


class OfPadding(Own):
    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.run(self, src, src_key_padding_mask)


class OfMask(Own):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.run(self, x, attention_mask)


def adapted_own(model: nn.Module, *targets: str) -> PeftModel:
    return randomised(get_peft_model(model.to(DOUBLE), config("own", target_modules=list(targets)))).train()


def block(**fields: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, **fields)


@pytest.mark.parametrize("added_to_scores", [True, False])
@pytest.mark.parametrize("samples", [3, 6])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_padding_mask_of_torchs_encoder(batch_first: bool, samples: int, added_to_scores: bool) -> None:
    """True is padding there; and the length comes first, which a batch of as many samples as tokens does not show."""
    kept = KEPT.repeat(samples // 3, 1)
    model = adapted_own(nn.TransformerEncoder(block(batch_first=batch_first), 2), "linear1", "linear2")
    padding = added(kept, float("-inf")) if added_to_scores else ~kept

    def run(seed: int) -> Tensor:
        x = vectors(seed, kept)
        y = model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
        y = y if batch_first else y.transpose(0, 1)
        return add_elbo(y[kept].square().mean(), model)

    assert_padding_does_not_count(model, run)


def test_the_padding_masks_of_torchs_encoder_and_decoder() -> None:
    both = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    model = adapted_own(both, "linear1")
    of_decoder = KEPT.flip(0)

    def run(seed: int) -> Tensor:
        y = model(
            vectors(seed),
            vectors(seed, of_decoder),
            src_key_padding_mask=~KEPT,
            tgt_key_padding_mask=~of_decoder,
            memory_key_padding_mask=~KEPT,
        )
        return add_elbo(y[of_decoder].square().mean(), model)

    assert_padding_does_not_count(model, run)


def linear_after(change: Callable[[Tensor, Tensor], Tensor]) -> PeftModel:
    """A model that reads its input in another layout."""
    return adapted_own(OfMask(lambda m, x, mask: m.linear(change(x, mask)), linear=nn.Linear(8, 8)), "linear")


LAYERS_INPUTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "length first": lambda x, mask: x.transpose(0, 1),
    "flattened": lambda x, mask: x.flatten(0, 1),
    "windows": lambda x, mask: x.unflatten(1, (3, 2)),
    "windows beside each other": lambda x, mask: x.unflatten(1, (3, 2)).flatten(0, 1),
    "heads behind": lambda x, mask: x[:, :, None].expand(-1, -1, 4, -1),
    "heads before": lambda x, mask: x[:, None].expand(-1, 4, -1, -1),
    "padding taken out": lambda x, mask: x[mask],
}


@pytest.mark.parametrize("layout", LAYERS_INPUTS)
def test_what_a_layer_reads(layout: str) -> None:
    model, zero = linear_after(LAYERS_INPUTS[layout]), torch.zeros((), dtype=DOUBLE, requires_grad=True)

    def run(seed: int) -> Tensor:
        model(vectors(seed), attention_mask=KEPT)
        return add_elbo(zero, model)

    assert_padding_does_not_count(model, run)


def test_one_vector_for_each_sample_is_no_padding() -> None:
    model = linear_after(lambda x, mask: x[:, 0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "every token counts")
        model(vectors(0), attention_mask=KEPT)


# --- Where a mask does not fit --------------------------------------------------------------------------------------


def said(model: nn.Module, forwards: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            forwards()
    return [str(warning.message) for warning in found if "every token counts" in str(warning.message)]


def test_latents_are_said_to_count_once_and_by_name() -> None:
    """A Perceiver's latents are not the tokens that the mask is of."""
    model = linear_after(lambda x, mask: x.mean(1, keepdim=True).expand(-1, 5, -1))
    (message,) = said(model, lambda: model(vectors(0), attention_mask=KEPT))
    assert "linear" in message


def test_nothing_is_said_where_there_is_no_padding() -> None:
    model = linear_after(lambda x, mask: x.mean(1, keepdim=True).expand(-1, 5, -1))
    assert not said(model, lambda: model(vectors(0), attention_mask=torch.ones_like(KEPT)))
    assert not said(model, lambda: model(vectors(0)))


def test_experts_that_read_some_tokens_are_named() -> None:
    small = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "num_experts": 2}
    small |= {"num_sparse_encoder_layers": 1, "num_decoder_layers": 0, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    model = adapted(
        SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**small)), target_modules=["wi"]
    )
    (message,) = said(model, lambda: model(**batch_for(tiny_bert()) | {"labels": ids(0)[:1].repeat(4, 1)}))
    assert "expert_0.wi" in message


def test_inference_says_nothing() -> None:
    model = linear_after(lambda x, mask: x[:, :5]).eval()
    assert not said(model, lambda: model(vectors(0), attention_mask=KEPT))
