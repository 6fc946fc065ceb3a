"""Draws of z1: against draws made one by one, and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from by_hand import adapted, collated, config, rows_for
from fvae_lora import export_for_inference, predict_with_uncertainty
from fvae_lora.layer import FVAELoraLayer
from tiny import adapted_linear, tiny_bert

DOUBLE = torch.float64


def close(found: Tensor | None, expected: Tensor, rtol: float = 1e-9) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


def drawn_by_hand(model: PeftModel, batch: dict[str, Any], draws: int, seed: int) -> Tensor:
    """Logits of forwards one behind the other, (draws, ...)."""
    model.eval()
    model.peft_config["default"].sample_at_inference = True
    torch.manual_seed(seed)
    with torch.no_grad():
        logits = torch.stack([model(**batch).logits for _ in range(draws)])
    model.peft_config["default"].sample_at_inference = False
    return logits


def test_the_entropies_of_draws() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6, 1]))
    nn.init.normal_(model.get_base_model().classifier.weight, 0.0, 3.0)
    p = drawn_by_hand(model, batch, 5, seed=7).softmax(-1)
    found = predict_with_uncertainty(model, **batch, draws=5, seed=7, draws_at_once=1)
    of_mean = torch.distributions.Categorical(p.mean(0)).entropy()
    of_draws = torch.distributions.Categorical(p).entropy().mean(0)
    close(found.mean, p.mean(0))
    close(found.variance, (p - p.mean(0)).square().mean(0))
    close(found.entropy, of_mean)
    close(found.expected_entropy, of_draws)
    close(found.mutual_information, of_mean - of_draws)
    assert (of_mean - of_draws).max() > 1e-4


def test_values_have_the_variance_of_the_posterior() -> None:
    """One linear layer: y = W x + b + c B z1, whose mean and variance over z1 are known."""
    model, x = adapted_linear(), torch.randn(4, 6, dtype=DOUBLE)
    (layer,) = (module for module in model.modules() if isinstance(module, FVAELoraLayer))
    found = predict_with_uncertainty(model, x, draws=20_000, regression=True)
    _, logvar = layer.fvae_lora_vae["default"].encode("encoder1", x)
    variance = logvar.exp() @ (layer.scaling["default"] * layer.B("default")).square().mT
    torch.testing.assert_close(found.variance, variance, rtol=0.05, atol=0)
    torch.testing.assert_close(found.mean, model.eval()(x), rtol=0.05, atol=0.02)
    assert found.entropy is None
    assert found.mutual_information is None


def test_a_regression_is_known_by_the_models_configuration() -> None:
    model, batch = adapted(tiny_bert(DOUBLE, num_labels=1)), collated(rows_for("bert", [3, 6]))
    del batch["labels"]
    assert predict_with_uncertainty(model, **batch, draws=2).entropy is None
    assert predict_with_uncertainty(model, **batch, draws=2, regression=False).entropy is not None


def test_one_pass_and_several_draw_from_the_same_posterior() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6, 1]))
    found = [predict_with_uncertainty(model, **batch, draws=600, draws_at_once=n).mean for n in (600, 7)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.05)


@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_as_many_forwards_as_are_needed(at_once: int | None) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    found = predict_with_uncertainty(model, **batch, draws=5, draws_at_once=at_once)
    assert sizes == {None: [10], 1: [2] * 5, 3: [6, 4]}[at_once]
    assert found.mean.shape == (2, 3)


def test_less_memory_takes_more_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    expected = predict_with_uncertainty(model, **batch, draws=8, draws_at_once=2)

    def limited(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(limited, with_kwargs=True)
    close(predict_with_uncertainty(model, **batch, draws=8).mean, expected.mean)
    with pytest.raises(torch.OutOfMemoryError):
        predict_with_uncertainty(model, **collated(rows_for("bert", [3] * 5)), draws=8)


def test_a_seed_decides_and_nothing_else() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    first = predict_with_uncertainty(model, **batch, seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, other = (predict_with_uncertainty(model, **batch, seed=seed) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)


def test_inputs_without_rows_are_run_draw_by_draw() -> None:
    """As positions that are one for all rows, or a length that comes first."""
    model, batch = adapted("bert"), collated(rows_for("bert", [6, 6, 6]))
    batch["position_ids"] = torch.arange(6)[None]
    p = drawn_by_hand(model, batch, 3, seed=2).softmax(-1)
    close(predict_with_uncertainty(model, **batch, draws=3, seed=2).mean, p.mean(0))


def test_tuples_tensors_and_outputs_at_every_token() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    expected = predict_with_uncertainty(model, **batch, draws=3)
    assert torch.equal(predict_with_uncertainty(model, **batch, draws=3, return_dict=False).mean, expected.mean)
    assert predict_with_uncertainty(adapted_linear(), torch.randn(4, 6, dtype=DOUBLE)).entropy.shape == (4,)
    text = adapted("gpt2")
    assert isinstance(text.get_base_model(), GPT2LMHeadModel)
    found = predict_with_uncertainty(text, **collated(rows_for("gpt2", [3, 6])), draws=3)
    assert found.mean.shape == (2, 6, 60)
    assert found.mutual_information.shape == (2, 6)


def test_an_encoder_and_a_decoder_draw_at_every_token_of_the_latter() -> None:
    model, batch = adapted("t5"), collated(rows_for("t5", [3, 6]))
    p = drawn_by_hand(model, batch, 3, seed=2).softmax(-1)
    found = predict_with_uncertainty(model, **batch, draws=3, seed=2, draws_at_once=1)
    close(found.mean, p.mean(0))


def test_all_active_adapters_draw() -> None:
    model, x = adapted_linear(), torch.randn(4, 6, dtype=DOUBLE)
    alone = predict_with_uncertainty(model, x, draws=2000, regression=True).variance
    assert alone is not None
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    for layer in (module for module in model.modules() if isinstance(module, FVAELoraLayer)):
        layer.fvae_lora_vae["other"].load_state_dict(layer.fvae_lora_vae["default"].state_dict())
        layer.fvae_lora_B["other"].load_state_dict(layer.fvae_lora_B["default"].state_dict())
    both = predict_with_uncertainty(model, x, draws=2000, regression=True).variance
    torch.testing.assert_close(both, 2 * alone, rtol=0.3, atol=0)


def test_half_precision_and_a_compiled_model() -> None:
    model, batch = adapted("bert", torch.float32), collated(rows_for("bert", [3, 6]))
    expected = predict_with_uncertainty(model, **batch, draws=3)
    close(predict_with_uncertainty(torch.compile(model), **batch, draws=3).mean, expected.mean)
    assert predict_with_uncertainty(model.to(torch.bfloat16), **batch, draws=3).mean.dtype == torch.float32


def test_certain_classes_have_no_entropy_and_no_nan() -> None:
    model, x = adapted_linear(), torch.randn(4, 6, dtype=DOUBLE)
    with torch.no_grad():
        model.base_model.model[0].base_layer.bias[0] = 1e4
    found = predict_with_uncertainty(model, x, draws=3)
    assert found.entropy.tolist() == found.mutual_information.tolist() == [0.0] * 4


@pytest.mark.parametrize("sampled_before", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_switch_is_put_back(fails: bool, sampled_before: bool) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    model.peft_config["default"].sample_at_inference = sampled_before
    state = torch.get_rng_state()
    if fails:
        with pytest.raises(IndexError):
            predict_with_uncertainty(model, **batch | {"input_ids": batch["input_ids"] + 1000})
    else:
        predict_with_uncertainty(model, **batch)
    assert model.peft_config["default"].sample_at_inference is sampled_before
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arguments", [{"draws": 0}, {"draws": -1}, {"draws_at_once": 0}])
def test_no_draws_are_refused(arguments: dict[str, int]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be an integer, at least 1, not {arguments[name]}"):
        predict_with_uncertainty(adapted("bert"), **collated(rows_for("bert", [3])), **arguments)


def test_what_cannot_be_drawn_from_is_refused(tmp_path: Any) -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6]))
    export_for_inference(model, tmp_path / "small")
    small = PeftModel.from_pretrained(tiny_bert(DOUBLE), tmp_path / "small")
    with pytest.raises(ValueError, match="'default' is inference_only: it has only z1's mean"):
        predict_with_uncertainty(small, **batch)
    with pytest.raises(ValueError, match="has no FVAE-LoRA adapter"):
        predict_with_uncertainty(tiny_bert(), **batch)
    several = adapted(tiny_bert(DOUBLE, problem_type="multi_label_classification"))
    with pytest.raises(ValueError, match="problem_type must not be multi_label_classification"):
        predict_with_uncertainty(several, **batch)


def test_an_adapter_without_an_elbo_has_draws_too() -> None:
    model = adapted("bert", elbo_weight=0.0)
    assert predict_with_uncertainty(model, **collated(rows_for("bert", [3])), draws=2).variance.sum() > 0
    assert config("bert").sample_at_inference is False
