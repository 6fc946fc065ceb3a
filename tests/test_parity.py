"""With the reference implementation's parameters and noises this package computes the reference's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, ViTForImageClassification

from fvae_lora import FVAEPEFTConfig, elbo_loss, elbo_terms, load_reference_adapter
from fvae_lora.reference import TAU_OFFSET, convert_state_dict, our_name

TOLERANCE = 1e-5
LAYERS = ["average_fusion", "deep_separate_encoder", "default", "shifted_prior"]
MODELS = {"tiny_bert": BertForSequenceClassification, "tiny_vit": ViTForImageClassification}
Noises = Callable[[list[Tensor]], list[Tensor]]


def assert_same(ours: Tensor, reference: Tensor, what: str = "") -> None:
    """The norm of the difference over the norm, per tensor."""
    assert ours.numel() == reference.numel(), what
    error = (ours.detach().reshape(reference.shape) - reference).norm() / reference.norm().clamp(min=1e-30)
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e}"


class Layer(NamedTuple):
    """One adapted layer of a stored case."""

    numbers: dict[str, Tensor]
    model: PeftModel
    parameters: dict[str, nn.Parameter]

    def parameter(self, reference_name: str) -> nn.Parameter:
        """Ours, by the reference's name."""
        name = reference_name.replace(".default", "")
        if name.startswith("base_layer"):
            return self.parameters[name]
        vae, _, rest = our_name(name).partition(".")
        return self.parameters[f"{vae}.default" + (f".{rest}" if rest else "")]


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, golden: Path) -> Layer:
    case = json.loads((golden / "layers.json").read_text())[request.param]
    of_all = load_file(golden / "layers.safetensors")
    of_case = f"{request.param}."
    numbers = {key.removeprefix(of_case): value for key, value in of_all.items() if key.startswith(of_case)}
    model = nn.Sequential(nn.Linear(case["in_features"], case["out_features"]))
    model = get_peft_model(model, FVAEPEFTConfig(**case["config"], target_modules=["0"]))
    adapted = Layer(numbers, model, dict(model.base_model.model[0].named_parameters()))
    for name in [key.removeprefix("param.") for key in numbers if key.startswith("param.")]:
        if name.startswith(("lora_E", "ranknum")):
            continue
        value = numbers[f"param.{name}"]
        value = torch.log(value + TAU_OFFSET) if name.endswith("scale_tril") else value
        adapted.parameter(name).data.copy_(value)
    adapted.parameters["base_layer.bias"].requires_grad_()
    return adapted


def test_a_layers_output_in_eval_mode_is_the_references(layer: Layer) -> None:
    assert_same(layer.model.eval()(layer.numbers["x"]), layer.numbers["eval_output"])


def test_a_layers_output_in_train_mode_is_the_references(layer: Layer, with_noises: Noises) -> None:
    left = with_noises([layer.numbers["noise.z1"], layer.numbers["noise.z2"]])
    assert_same(layer.model(layer.numbers["x"]), layer.numbers["train_output"])
    assert not left


def test_each_term_and_the_negative_elbo_are_the_references(layer: Layer, with_noises: Noises) -> None:
    with_noises([layer.numbers["noise.z1"], layer.numbers["noise.z2"]])
    layer.model(layer.numbers["x"])
    (terms,) = elbo_terms(layer.model).values()
    assert_same(elbo_loss(layer.model), layer.numbers["minus_elbo"])
    assert_same(torch.tensor(-terms["reconstruction"]), layer.numbers["term.minus_log_likelihood"])
    for term in ("kl_z1", "z1_l2", "z2_l2"):
        assert_same(torch.tensor(terms[term]), layer.numbers[f"term.{term}"], term)


def test_every_gradient_of_a_layer_is_the_references(layer: Layer, with_noises: Noises) -> None:
    with_noises([layer.numbers["noise.z1"], layer.numbers["noise.z2"]])
    x = layer.numbers["x"].clone().requires_grad_()
    output = layer.model(x)
    loss = (output * layer.numbers["out_weight"]).sum() + elbo_loss(layer.model)
    loss.backward()
    gradients = {key.removeprefix("grad."): value for key, value in layer.numbers.items() if key.startswith("grad.")}
    assert_same(x.grad, gradients.pop("x"), "x")
    assert len(gradients) == sum(parameter.grad is not None for parameter in layer.parameters.values())
    for name, expected in gradients.items():
        ours = layer.parameter(name).grad
        if name.endswith("scale_tril"):  # ours is the gradient by log(tau + offset)
            ours = ours / (layer.numbers[f"param.{name}"] + TAU_OFFSET)
        assert_same(ours, expected, name)


class Run(NamedTuple):
    """A model with the reference's adapter, its inputs, and what the reference computed from them."""

    folder: Path
    model: PeftModel
    numbers: dict[str, Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        named = {key.removeprefix("input."): value for key, value in self.numbers.items() if key.startswith("input.")}
        return named | {"labels": self.numbers["labels"]}

    @property
    def noises(self) -> list[Tensor]:
        return [self.numbers[f"noise.{i}"] for i in range(sum(key.startswith("noise.") for key in self.numbers))]


def loaded(folder: Path, is_trainable: bool) -> Run:
    base = MODELS[folder.name].from_pretrained(folder / "base_model")
    model = load_reference_adapter(base, folder / "adapter", is_trainable=is_trainable)
    return Run(folder, model, load_file(folder / "expected.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_adapters_logits_and_loss_in_eval_mode_are_the_references(golden: Path, name: str) -> None:
    run = loaded(golden / name, is_trainable=False)
    assert not run.model.training
    output = run.model(**run.inputs)
    assert_same(output.logits, run.numbers["eval_logits"])
    assert_same(output.loss, run.numbers["eval_loss"])


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_adapters_loss_and_gradients_in_training_are_the_references(
    golden: Path, name: str, with_noises: Noises
) -> None:
    run = loaded(golden / name, is_trainable=True)
    left = with_noises(run.noises)
    output = run.model.train()(**run.inputs)
    assert not left
    assert_same(output.logits, run.numbers["train_logits"], "logits")
    assert_same(output.loss, run.numbers["train_loss"], "loss")
    output.loss.backward()

    expected = {key.removeprefix("grad."): value for key, value in run.numbers.items() if key.startswith("grad.")}
    ours = {
        parameter_name.replace(".default", ""): parameter.grad
        for parameter_name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    }
    compared = set()
    for key, value in expected.items():
        reference_name = key.replace(".default", "")
        (our_key,) = convert_state_dict({reference_name: torch.ones(())}, run.model.get_base_model())
        our_key = our_key if our_key in ours else our_key.replace(".classifier.", ".classifier.modules_to_save.")
        if key.endswith("scale_tril"):
            tau = load_file(run.folder / "adapter" / "adapter_model.safetensors")[reference_name] + TAU_OFFSET
            value = value * tau  # by log tau, as ours
        assert_same(ours[our_key], value, key)
        compared.add(our_key)
    assert compared == set(ours)


@pytest.mark.parametrize("name", MODELS)
def test_the_task_loss_alone_is_the_references(golden: Path, name: str, with_noises: Noises) -> None:
    run = loaded(golden / name, is_trainable=True)
    with_noises(run.noises)
    logits = run.model.train()(**run.inputs).logits
    assert_same(nn.functional.cross_entropy(logits, run.numbers["labels"]), run.numbers["train_task_loss"])


def test_an_adapter_with_todays_module_names_loads_as_well(golden: Path, tmp_path: Path) -> None:
    old = golden / "tiny_vit" / "adapter"
    renamed = {
        key.replace("vit.encoder.layer", "vit.layers")
        .replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.value", "attention.v_proj"): value
        for key, value in load_file(old / "adapter_model.safetensors").items()
    }
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    fields = json.loads((old / "adapter_config.json").read_text()) | {"target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    base = ViTForImageClassification.from_pretrained(golden / "tiny_vit" / "base_model")
    expected = load_file(golden / "tiny_vit" / "expected.safetensors")
    model = load_reference_adapter(base, tmp_path)
    assert_same(model(pixel_values=expected["input.pixel_values"]).logits, expected["eval_logits"])


def test_a_loaded_reference_adapter_is_saved_and_loaded_as_ours(golden: Path, tmp_path: Path) -> None:
    run = loaded(golden / "tiny_bert", is_trainable=False)
    run.model.save_pretrained(tmp_path)
    base = BertForSequenceClassification.from_pretrained(golden / "tiny_bert" / "base_model")
    again = PeftModel.from_pretrained(base, tmp_path)
    assert_same(again(**run.inputs).logits, run.numbers["eval_logits"])
