"""Generation with an adapted decoder: the cache changes nothing, and each row of a batch may have its own adapter."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from by_hand import adapted, config
from tiny import randomised

PROMPTS = torch.tensor([[0, 0, 5, 9], [7, 3, 11, 2], [0, 21, 4, 8]])  # padded on the left
SEARCHES = {"greedy": {}, "beams": {"num_beams": 3}, "sampled": {"do_sample": True, "top_k": 5}}


def generated(model: PeftModel, rows: Tensor = PROMPTS, **options: object) -> Tensor:
    torch.manual_seed(0)
    inputs = {"input_ids": rows, "attention_mask": (rows != 0).long(), "pad_token_id": 0, "eos_token_id": 59}
    return model.generate(**inputs, min_new_tokens=6, max_new_tokens=6, **options)[:, rows.shape[1] :]


@pytest.fixture
def model() -> PeftModel:
    return adapted("llama", torch.float32, task_type="CAUSAL_LM").eval()


@pytest.mark.parametrize("search", SEARCHES)
def test_the_cache_changes_no_token(model: PeftModel, search: str) -> None:
    options = SEARCHES[search]
    cached = generated(model, use_cache=True, **options)
    assert torch.equal(cached, generated(model, use_cache=False, **options))
    with model.disable_adapter():
        assert not torch.equal(cached, generated(model, **options))


def test_a_cache_of_fixed_size(model: PeftModel) -> None:
    assert torch.equal(generated(model, cache_implementation="static"), generated(model, use_cache=False))


@pytest.mark.parametrize("search", ["greedy", "beams"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_with_an_adapter_of_its_own(model: PeftModel, search: str, use_cache: bool) -> None:
    options = SEARCHES[search] | {"use_cache": use_cache}
    model.add_adapter("other", config("llama", task_type="CAUSAL_LM"))
    randomised(model).eval()
    expected = []
    for row, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        expected.append(generated(model, **options)[row])
    with model.disable_adapter():
        expected.append(generated(model, **options)[2])
    model.set_adapter("default")
    mixed = generated(model, adapter_names=["default", "other", "__base__"], **options)
    assert torch.equal(mixed, torch.stack(expected))
    assert torch.equal(generated(model, **options)[0], expected[0])
