"""An adapter is saved and loaded as LoRA's is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from drop_in import adapted, adapter_modules, config, evaluated, layers_of, samples
from fvae_lora import FVAELoraConfig
from tiny import BUILDERS, adapted_linear, logits, randomised, tiny_bert


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_bert()


AUTO = {
    "bert": AutoPeftModelForSequenceClassification,
    "gpt2": AutoPeftModelForCausalLM,
    "llama": AutoPeftModelForCausalLM,
    "t5": AutoPeftModelForSeq2SeqLM,
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_saved_adapter_loads_into_its_base_model(kind: str, tmp_path: Path) -> None:
    base = BUILDERS[kind]()
    model = randomised(get_peft_model(copy.deepcopy(base), config(kind)))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(logits(loaded, kind), evaluated(model, kind), rtol=0, atol=0)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=0, atol=0)


def test_a_configuration_survives_saving(tmp_path: Path) -> None:
    fields = {"r": 5, "residual_dim": 3, "lora_alpha": 7.0, "lora_dropout": 0.1, "encoder_hidden_dims": [6, 7]}
    fields |= {"encoder_dropout": 0.2, "shared_encoder_trunk": False, "decoder_hidden_dims": [9], "elbo_weight": 0.5}
    fields |= {"decoder_dropout": 0.3, "residual_prior_mean": -1.0, "residual_prior_std": 2.0, "objective": "vae2lat"}
    fields |= {"kl_weight": 3.0, "layer_reduction": "mean", "elbo_token_fraction": 0.25, "target_modules": {"query"}}
    fields |= {"rank_pattern": {"value": 2}, "exclude_modules": {"key"}, "task_weight": 2.0, "init_weights": False}
    adapted_linear().save_pretrained(tmp_path)  # a folder without weights is refused
    FVAELoraConfig(**fields).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is FVAELoraConfig
    assert loaded.peft_type == "FVAE_LORA"
    for name, value in fields.items():
        assert getattr(loaded, name) == value, name


@pytest.mark.parametrize("kind", AUTO)
def test_auto_classes_load_the_base_model_and_the_adapter(kind: str, tmp_path: Path) -> None:
    BUILDERS[kind]().save_pretrained(tmp_path / "base")
    base = type(BUILDERS[kind]()).from_pretrained(tmp_path / "base")
    model = randomised(get_peft_model(base, config(kind)))
    model.save_pretrained(tmp_path / "adapter")
    extra = {"num_labels": 3} if kind == "bert" else {}
    loaded = AUTO[kind].from_pretrained(tmp_path / "adapter", **extra)
    torch.testing.assert_close(evaluated(loaded, kind), evaluated(model, kind))


def test_transformers_auto_classes_load_an_adapter_folder(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomised(get_peft_model(base, config("bert", task_type=None)))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert adapter_modules(loaded)
    torch.testing.assert_close(logits(loaded), evaluated(model))


def test_an_adapter_may_change_its_name_between_saving_and_loading(tmp_path: Path, base: PreTrainedModel) -> None:
    model = randomised(get_peft_model(copy.deepcopy(base), config("bert"), adapter_name="first"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "first" / "README.md").is_file()
    loaded = PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="second")
    assert loaded.active_adapters == ["second"]
    assert adapter_modules(loaded, "second")
    torch.testing.assert_close(evaluated(loaded), evaluated(model))


@pytest.mark.parametrize("name", ["lora", "fvae", "B", "vae", "mean", "my_adapter"])
def test_awkward_adapter_names_survive_saving(tmp_path: Path, base: PreTrainedModel, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of names that occur in the parameters' prefix
        model = randomised(get_peft_model(copy.deepcopy(base), config("bert"), adapter_name=name))
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path / name, adapter_name=name)
    torch.testing.assert_close(evaluated(loaded), evaluated(model), rtol=0, atol=0)


def test_low_cpu_mem_usage_loads_the_same(tmp_path: Path, base: PreTrainedModel) -> None:
    model = randomised(get_peft_model(copy.deepcopy(base), config("bert")))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    torch.testing.assert_close(evaluated(loaded), evaluated(model))


def test_an_empty_adapter_on_meta_can_be_filled(base: PreTrainedModel) -> None:
    model = randomised(get_peft_model(copy.deepcopy(base), config("bert")))
    empty = get_peft_model(base, config("bert"), low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in empty.named_parameters() if "fvae_lora_" in name)
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    torch.testing.assert_close(evaluated(empty), evaluated(model))


def test_load_adapter_adds_a_saved_adapter(tmp_path: Path, base: PreTrainedModel) -> None:
    model = randomised(get_peft_model(copy.deepcopy(base), config("bert")))
    model.save_pretrained(tmp_path)
    other = randomised(get_peft_model(copy.deepcopy(base), config("bert", r=2)))
    other.load_adapter(tmp_path, "loaded")
    other.set_adapter("loaded")
    torch.testing.assert_close(evaluated(other), evaluated(model))


def test_loading_into_an_eval_model_does_not_sample(tmp_path: Path, base: PreTrainedModel) -> None:
    adapted().save_pretrained(tmp_path)
    model = get_peft_model(base, config("bert")).eval()
    model.load_adapter(tmp_path, "loaded", is_trainable=True)
    model.set_adapter("loaded")
    assert not samples(model)


@pytest.mark.parametrize("training", [True, False])
def test_an_added_adapter_with_targets_of_its_own_keeps_the_models_mode(base: PreTrainedModel, training: bool) -> None:
    model = get_peft_model(base.eval(), config("bert", target_modules=["query"])).train(training)
    model.add_adapter("other", config("bert", target_modules=["value"]))
    assert all(layer.training is training for layer in layers_of(model))
