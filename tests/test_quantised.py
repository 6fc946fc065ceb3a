"""Quantised base layers: bitsandbytes and torchao as far as they run on a CPU, and layers that can only be run.

Not run on a CPU: HQQ, AQLM, EETQ, GPTQ, AWQ, INC and TransformerEngine, whose packages need other hardware; peft gives
them one interface, for which `_ForwardOnly` stands here. torchao's int8 with dynamic activations passes no gradient to
its input, so no adapter below such a layer can be trained, of whatever method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

import fvae_lora.layer
from by_hand import assert_same, config, gradients, loss_by_hand
from fvae_lora import export_for_inference, summarise_layers
from tiny import batch_for, randomised, tiny_llama

pytestmark = [pytest.mark.usefixtures("without_noise"), pytest.mark.filterwarnings("ignore:MatMul8bitLt")]


def torchao_int8() -> Any:
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig(version=2))


def bitsandbytes(**settings: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


QUANTISATIONS: dict[str, Callable[[], Any]] = {
    "bitsandbytes 8 bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes fp4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao int8": torchao_int8,
}
ERROR_OF_MERGING = {"bitsandbytes fp4": 0.5, "bitsandbytes nf4": 0.5}  # relative to what the adapter changes; else 0.1


@pytest.fixture(params=QUANTISATIONS)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], PreTrainedModel]:
    """Loads one and the same quantised model."""
    quantisation = QUANTISATIONS[request.param]()
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    load = lambda: LlamaForCausalLM.from_pretrained(  # noqa: E731
        tmp_path / "base", quantization_config=quantisation, device_map="cpu"
    ).eval()
    load.tolerance = ERROR_OF_MERGING.get(request.param, 0.1)
    return load


def adapted(base: PreTrainedModel, **fields: Any) -> PeftModel:
    return randomised(get_peft_model(base, config("llama", **fields)), 0.1)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=torch.arange(1, 25).reshape(4, 6)).logits


def test_training(load: Callable[[], PreTrainedModel]) -> None:
    model = adapted(load()).train()
    batch = batch_for(model.get_base_model())
    assert_same(
        gradients(model, lambda: model(**batch).loss), gradients(model, lambda: loss_by_hand(model, [batch])), 1e-4
    )


def test_a_summary_has_the_norm_of_the_quantised_output(load: Callable[[], PreTrainedModel]) -> None:
    model = adapted(load()).eval()
    found = summarise_layers(model, [{"input_ids": torch.arange(1, 25).reshape(4, 6)}])
    outputs: dict[str, Tensor] = {}
    for layer in (module for module in model.modules() if isinstance(module, fvae_lora.layer.FVAELoraLayer)):
        layer.base_layer.register_forward_hook(lambda _, __, y, name=layer.name: outputs.setdefault(name, y.float()))
    logits(model)
    for name, summary in found.items():
        norm = outputs[name].square().sum(-1).mean().sqrt().item()
        assert summary.output_norm == pytest.approx(norm, rel=1e-3)


def test_saving_loading_and_export(load: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = adapted(load())
    expected = logits(model)
    assert not torch.allclose(expected, logits(load()), atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    export_for_inference(model, tmp_path / "small")
    for folder in ("adapter", "small"):
        # Kernels of a CPU may differ in the last bits between the first and later forwards.
        torch.testing.assert_close(
            logits(PeftModel.from_pretrained(load(), tmp_path / folder)), expected, rtol=0, atol=5e-3
        )


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_linear_encoder_merges_up_to_the_quantisation(load: Callable[[], PreTrainedModel], ran_before: bool) -> None:
    """Also where a forward came first, after which bitsandbytes packs 4-bit weights for the CPU."""
    model = adapted(load(), encoder_hidden_dims=[], residual_dim=None)
    other = copy.deepcopy(model) if not ran_before else model
    expected, plain = logits(other), logits(load())
    effect = (expected - plain).norm()
    model.merge_adapter()
    assert (logits(model) - expected).norm() < load.tolerance * effect
    model.unmerge_adapter()
    assert (logits(model) - expected).norm() < load.tolerance * effect
    assert (logits(model.merge_and_unload()) - expected).norm() < load.tolerance * effect


def test_another_encoder_is_refused_and_nothing_changes(load: Callable[[], PreTrainedModel]) -> None:
    model = adapted(load())
    expected = logits(model)
    with pytest.raises(ValueError, match="ReLU"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=5e-3)


class _ForwardOnly(nn.Module):
    """A layer of a library that shows no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.qweight.mT


def test_layers_that_can_only_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = fvae_lora.layer.resolve_quantization_backend

    def resolve(layer: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, _ForwardOnly) else real(layer, **kwargs)

    monkeypatch.setattr(fvae_lora.layer, "resolve_quantization_backend", resolve)
    base = tiny_llama(torch.float64)
    for layer in base.model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = map(
            _ForwardOnly, (layer.self_attn.q_proj, layer.self_attn.v_proj)
        )
    fresh = copy.deepcopy(base)
    model = adapted(base, encoder_hidden_dims=[]).train()
    batch = batch_for(base)
    assert all(gradient.isfinite().all() for gradient in gradients(model, lambda: model(**batch).loss).values())
    with pytest.raises(TypeError, match="not supported for gptq"):
        model.merge_adapter()
    assert all(summary.output_norm > 0 for summary in summarise_layers(model, [batch]).values())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(loaded), logits(model))
