"""The reference's quick start, with only its import line changed, on models of today's transformers."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fvae_lora import FVAELoraConfig, FVAEPEFTConfig
from fvae_lora.module_names import current_name
from tiny import BUILDERS, batch_for, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

RENAMED = "has other names for these"


def quick_start(model: PreTrainedModel, target_modules: list[str]) -> nn.Module:
    config = FVAEPEFTConfig(
        peft_type="FVAE_PEFT",
        latent_dim=16,
        latent_fusion="concat",
        enc_num_of_layer=1,
        enc_hidden_layer=16,
        enc_dropout=0.1,
        encoder_use_common_hidden_layer=True,
        dec_num_of_layer=3,
        dec_hidden_layer=128,
        z2_latent_mean=1.5,
        z2_latent_std=1,
        z1z2_orthogonal_reg=0,
        lambda_downstream=1000,
        lambda_reconstruction=1,
        lambda_z2_l2=1,
        lambda_z1_l2=1,
        lambda_kl_z1=1,
        target_modules=target_modules,
        modules_to_save=["classifier"],
    )
    return get_peft_model(model, config)


def names_said(model: PreTrainedModel, targets: list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quick_start(model, targets)
    return [str(warning.message) for warning in caught if RENAMED in str(warning.message)]


@pytest.mark.filterwarnings(f"ignore:.*{RENAMED}")
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_it_runs_and_learns(kind: str) -> None:
    base = BUILDERS[kind]()
    model = quick_start(base, ["query", "value"])
    batch = batch_for(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.eval()
    first = model(**batch).loss.item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    assert model.eval()(**batch).loss.item() < first
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_its_fields_give_the_references_profile() -> None:
    config = quick_start(tiny_bert(), ["query", "value"]).peft_config["default"]
    expected = {"r": 16, "residual_dim": None, "lora_alpha": 8, "objective": "reference", "layer_reduction": "mean"}
    expected |= {"encoder_hidden_dims": [16], "decoder_hidden_dims": [128] * 3, "encoder_dropout": 0.1}
    expected |= {"decoder_dropout": 0.1, "task_weight": 1000, "elbo_weight": 1.0, "kl_weight": 1}
    expected |= {"factorization_weight_z1": 1, "factorization_weight_z2": 1, "modules_to_save": ["classifier"]}
    for name, value in expected.items():
        assert getattr(config, name) == value, name


def test_the_classes_own_defaults_are_the_references() -> None:
    config = FVAEPEFTConfig()
    assert (config.r, config.encoder_hidden_dims, config.decoder_hidden_dims) == (128, [1024] * 3, [1024] * 3)
    assert (config.task_weight, config.decoder_dropout, config.encoder_dropout, config.lora_alpha) == (1, 0.1, 0.0, 8)


def test_what_the_reference_ignores_is_ignored() -> None:
    config = FVAEPEFTConfig(r=99, lora_dropout=0.5, latent_dim=4, init_lora_weights=True)
    assert config.r == 4
    assert config.lora_dropout == 0


def test_bert_keeps_the_names_and_nothing_is_said() -> None:
    assert names_said(tiny_bert(), ["query", "value"]) == []


def test_vit_has_other_names_and_that_is_said_once() -> None:
    model = tiny_vit()
    (said,) = names_said(model, ["query", "value"])
    assert "query -> q_proj" in said
    assert "value -> v_proj" in said
    assert "ViTForImageClassification" in said


def test_todays_names_need_no_words() -> None:
    assert names_said(tiny_vit(), ["q_proj", "v_proj"]) == []


@pytest.mark.filterwarnings(f"ignore:.*{RENAMED}")
@pytest.mark.parametrize("targets", [["query", "value"], ["q_proj", "v_proj"]])
def test_both_ways_to_name_vits_modules_adapt_the_same(targets: list[str]) -> None:
    model = quick_start(tiny_vit(), targets)
    expected = {f"vit.layers.{i}.attention.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")}
    assert set(model.targeted_module_names) == expected


@pytest.mark.filterwarnings(f"ignore:.*{RENAMED}")
@pytest.mark.parametrize(
    ("model", "targets", "adapted"),
    [
        (tiny_llama, ["query", "key"], {"q_proj", "k_proj"}),
        (tiny_t5, ["q_proj", "v_proj", "o_proj"], {"q", "v", "o"}),
        (tiny_bert, ["q_proj", "k_proj"], {"query", "key"}),
        (tiny_vit, ["vit.encoder.layer.1.attention.attention.query"], {"q_proj"}),
    ],
)
def test_names_of_other_architectures_are_resolved(model: object, targets: list[str], adapted: set[str]) -> None:
    names = get_peft_model(model(), FVAELoraConfig(target_modules=targets)).targeted_module_names
    assert {name.rpartition(".")[2] for name in names} == adapted


@pytest.mark.filterwarnings(f"ignore:.*{RENAMED}")
def test_an_old_full_name_adapts_that_one_layer() -> None:
    old = "vit.encoder.layer.1.attention.attention.query"
    model = get_peft_model(tiny_vit(), FVAELoraConfig(target_modules=[old]))
    assert model.targeted_module_names == ["vit.layers.1.attention.q_proj"]


def test_a_name_that_the_model_has_is_never_changed() -> None:
    model = tiny_vit()
    for name, _ in model.named_modules():
        assert current_name(model, name) == name


@pytest.mark.parametrize(
    ("build", "targets", "could_be"),
    [
        (tiny_bert, ["attention_of_mine"], ["query", "key", "value", "dense"]),
        (tiny_vit, ["query", "nonsense"], ["q_proj", "k_proj", "v_proj", "o_proj", "fc1"]),
        (tiny_vit, r".*\.query", ["q_proj", "k_proj", "v_proj"]),
        (tiny_bert, "query", ["query", "key", "value"]),  # a string is a regular expression for the whole name
        (tiny_gpt2, ["q_proj"], ["c_attn", "c_proj", "c_fc"]),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_what_could_be_meant(
    build: object, targets: list[str] | str, could_be: list[str]
) -> None:
    model = build()
    with pytest.raises(ValueError, match="target_modules") as error:
        get_peft_model(model, FVAELoraConfig(target_modules=targets))
    message = str(error.value)
    assert all(name in message for name in could_be)
    assert "\n" not in message
    assert not any("fvae_lora" in name for name, _ in model.named_parameters())


def test_without_targets_for_an_unknown_architecture_the_error_names_the_field() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), FVAELoraConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_of_z_sampled", 2),
        ("use_dora", True),
        ("encoder_nn_type", "conv"),
        ("force_classical_vae", True),
        ("z1z2_orthogonal_reg", 0.5),
        ("z2_latent_std", 0),
        ("rank_pattern", {"query": 2}),
        ("latent_fusion", "sum"),
        ("bias", "some"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        FVAEPEFTConfig(**{field: value})


def test_a_field_that_the_reference_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="latent_dims"):
        FVAEPEFTConfig(latent_dims=4)
