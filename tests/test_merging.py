"""An adapted model is copied, merged and unloaded as one of LoRA's is."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    get_peft_model,
)
from torch import nn
from transformers import PreTrainedModel

from drop_in import adapted, config, evaluated, samples
from fvae_lora import elbo_loss
from tiny import BUILDERS, adapted_linear, batch_for, randomised, tiny_bert


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_bert()


def test_a_deep_copy_is_independent() -> None:
    model = adapted()
    batch = batch_for(tiny_bert())
    model.train()(**batch)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(evaluated(twin), evaluated(model))
    torch.manual_seed(0)
    twin.train()(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert float(elbo_loss(model)) == 0 or not model.training
    torch.manual_seed(0)
    first = model.train()(**batch).loss
    torch.manual_seed(0)
    torch.testing.assert_close(twin(**batch).loss, first)


def test_a_model_can_be_pickled() -> None:
    model = adapted()
    model.train()(**batch_for(tiny_bert()))
    buffer = io.BytesIO(pickle.dumps(model))
    twin = pickle.load(buffer)  # one that this test wrote
    torch.testing.assert_close(evaluated(twin), evaluated(model))
    assert torch.isfinite(twin.train()(**batch_for(tiny_bert())).loss)


def test_unload_gives_the_base_model_back(base: PreTrainedModel) -> None:
    expected = evaluated(copy.deepcopy(base))
    names = {name for name, _ in base.named_parameters()}
    model = randomised(get_peft_model(base, config("bert", task_type=None)))
    plain = model.unload()
    assert {name for name, _ in plain.named_parameters()} == names
    torch.testing.assert_close(evaluated(plain), expected, rtol=0, atol=0)
    batch = batch_for(plain)
    output = plain.train()(**batch)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, batch["labels"]))
    assert samples(randomised(get_peft_model(plain, config("bert"))).train())


LINEAR_BASES = [{"bias": True}, {"bias": False}, {"conv1d": True, "fan_in_fan_out": True}]


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("shared_encoder_trunk", [True, False])
@pytest.mark.parametrize("fields", LINEAR_BASES, ids=["bias", "no bias", "Conv1D"])
def test_a_linear_encoder_merges_exactly(fields: dict[str, bool], shared_encoder_trunk: bool, safe_merge: bool) -> None:
    fields = fields | {"lora_alpha": 6.0, "encoder_hidden_dims": [], "shared_encoder_trunk": shared_encoder_trunk}
    model = adapted_linear(**fields)
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = model.base_model.model[0].base_layer(x)
    expected = model.eval()(x)
    assert not torch.allclose(expected, plain)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.base_model.model[0].base_layer(x), expected, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model[0].base_layer(x), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not [name for name, _ in merged.named_parameters() if "fvae_lora_" in name]
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_linear_encoder_merges_exactly_in_a_whole_model(kind: str) -> None:
    model = adapted(kind, encoder_hidden_dims=[], target_modules="all-linear")
    expected = evaluated(model, kind)
    torch.testing.assert_close(evaluated(model.merge_and_unload(), kind), expected, rtol=1e-4, atol=1e-5)


def test_a_merged_model_can_be_saved_as_a_plain_one(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*bias.*")
        merged = adapted("bert", encoder_hidden_dims=[]).merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(type(merged).from_pretrained(tmp_path)), evaluated(merged))


def test_merging_says_where_it_brings_a_bias_that_the_models_class_would_not_load() -> None:
    """Llama's layers have none, and transformers drops keys that it does not know."""
    with pytest.warns(UserWarning, match=r"merging gives a bias to model.layers.0.self_attn.q_proj"):
        adapted("llama", encoder_hidden_dims=[]).merge_and_unload()


def test_disabling_a_merged_adapter_unmerges_it() -> None:
    model = adapted_linear(encoder_hidden_dims=[]).eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = model.base_model.model[0].base_layer(x)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain, rtol=1e-12, atol=1e-12)


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = adapted_linear(encoder_hidden_dims=[])
    nn.init.constant_(model.base_model.model[0].fvae_lora_B["default"].weight, float("inf"))
    before = model.base_model.model[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model[0].base_layer.weight, before)
