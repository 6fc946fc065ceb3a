"""FVAE-LoRA takes LoRA's place in peft and in transformers: what works there works the same here."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn
from transformers import PreTrainedModel

from drop_in import TASKS, adapted, adapter_modules, config, evaluated, layers_of, samples
from fvae_lora import elbo_loss
from fvae_lora.config import PEFT_SAVES_BIASES
from fvae_lora.layer import FVAELoraLayer
from tiny import BUILDERS, batch_for, logits, randomised, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_bert()


# Training, and what is trained


@pytest.mark.parametrize("kind", BUILDERS)
def test_it_trains_on_the_models_own_loss(kind: str) -> None:
    model = get_peft_model(BUILDERS[kind](), config(kind, elbo_weight=1e-5))
    batch = batch_for(model.get_base_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.eval()
    first = model(**batch).loss.item()
    for _ in range(30):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    assert model.eval()(**batch).loss.item() < first
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("fvae_lora_" in name or "modules_to_save" in name for name in changed)


def test_print_trainable_parameters_counts_the_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    model.print_trainable_parameters()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_layer = 2 * (16 * 4 + 4 + 2 * (4 * 4 + 4)) + (8 * 8 + 8 + 8 * 16 + 16) + 16 + 16 * 4
    assert trainable == 4 * in_layer + (16 * 3 + 3)
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


saves_biases = pytest.mark.skipif(not PEFT_SAVES_BIASES, reason="peft before 0.21 does not save trained biases")


@saves_biases
@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", set()), ("all", {"attention.self.query", "intermediate"}), ("fvae_lora_only", {"attention.self.query"})],
)
def test_bias_settings_train_those_biases(bias: str, trained: set[str]) -> None:
    model = adapted(bias=bias, target_modules=["query"])
    biases = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    biases = {name for name in biases if "fvae_lora_" not in name and "classifier" not in name}
    assert all(any(part in name for name in biases) for part in trained)
    if bias != "all":
        assert len(biases) == 2 * len(trained)


@saves_biases
def test_trained_biases_are_saved_and_loaded(tmp_path: Path, base: PreTrainedModel) -> None:
    model = get_peft_model(copy.deepcopy(base), config("bert", bias="all", task_type=None))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(PeftModel.from_pretrained(base, tmp_path)), evaluated(model))


def test_modules_to_save_are_trained_and_saved(tmp_path: Path, base: PreTrainedModel) -> None:
    fields = {"task_type": None, "modules_to_save": ["classifier"]}
    model = randomised(get_peft_model(copy.deepcopy(base), config("bert", **fields)))
    assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(PeftModel.from_pretrained(base, tmp_path)), evaluated(model))


def test_trainable_token_indices_are_trained_and_saved(tmp_path: Path, base: PreTrainedModel) -> None:
    model = get_peft_model(copy.deepcopy(base), config("bert", trainable_token_indices={"word_embeddings": [1, 2]}))
    deltas = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    assert len(deltas) == 1
    assert deltas[0].requires_grad
    nn.init.normal_(deltas[0])
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(evaluated(PeftModel.from_pretrained(base, tmp_path)), evaluated(model))


# Which modules


def test_rank_and_alpha_patterns() -> None:
    model = adapted(rank_pattern={"layer.1.attention.self.value": 2}, alpha_pattern={"query": 6.0})
    layers = model.base_model.model.bert.encoder.layer
    query, value = layers[1].attention.self.query, layers[1].attention.self.value
    assert (query.r["default"], query.scaling["default"]) == (4, 1.5)
    assert (value.r["default"], value.scaling["default"]) == (2, 1.0)
    assert value.fvae_lora_B["default"].weight.shape == (16, 2)
    assert layers[0].attention.self.value.r["default"] == 4
    assert torch.isfinite(model.train()(**batch_for(tiny_bert())).loss)


@pytest.mark.parametrize("layers", [0, [0], 1, [0, 1], None])
def test_layers_to_transform(layers: int | list[int] | None) -> None:
    adapted_layers = [0, 1] if layers is None else [layers] if isinstance(layers, int) else layers
    model = adapted(layers_to_transform=layers, target_modules=["query"])
    names = {f"bert.encoder.layer.{i}.attention.self.query" for i in adapted_layers}
    assert adapter_modules(model) == names


def test_layers_pattern() -> None:
    model = adapted(layers_to_transform=[1], layers_pattern="layer", target_modules=["query"])
    assert adapter_modules(model) == {"bert.encoder.layer.1.attention.self.query"}


@pytest.mark.parametrize("exclude", [["value"], r".*\.value", {"value"}])
def test_exclude_modules(exclude: object) -> None:
    names = adapter_modules(adapted(exclude_modules=exclude))
    assert names == {f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)}


def test_target_modules_may_be_a_regular_expression() -> None:
    names = adapter_modules(adapted(target_modules=r".*layer\.0.*\.(query|key)"))
    assert names == {f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key")}


@pytest.mark.parametrize("kind", BUILDERS)
def test_all_linear_adapts_what_lora_adapts(kind: str) -> None:
    model = adapted(kind, target_modules="all-linear")
    lora = get_peft_model(BUILDERS[kind](), LoraConfig(target_modules="all-linear", task_type=TASKS[kind]))
    assert len(adapter_modules(model)) > 4
    assert model.targeted_module_names == lora.targeted_module_names
    assert torch.isfinite(model.train()(**batch_for(BUILDERS[kind]())).loss)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])  # peft has no default for ViT
def test_target_modules_default_to_loras_for_the_architecture(kind: str) -> None:
    lora = get_peft_model(BUILDERS[kind](), LoraConfig(task_type=TASKS[kind]))
    assert adapted(kind, target_modules=None).targeted_module_names == lora.targeted_module_names


# Inference


@pytest.mark.parametrize("kind", BUILDERS)
def test_inference_is_deterministic_and_runs_neither_second_encoder_nor_decoder(kind: str) -> None:
    model = adapted(kind).eval()
    batch = batch_for(model.get_base_model())
    expected = model(**batch)
    for layer in layers_of(model):
        for name, parameter in layer.named_parameters():
            if any(part in name for part in ("encoder2", "decoder_", "log_tau", "encoder1_logvar")):
                nn.init.constant_(parameter, float("nan"))
    state = torch.get_rng_state()
    again = model(**batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.logits, expected.logits)
    assert torch.equal(again.loss, expected.loss)
    assert float(elbo_loss(model)) == 0
    assert not elbo_loss(model).requires_grad


def test_training_samples_and_sample_at_inference_samples_too() -> None:
    assert samples(adapted().train())
    assert not samples(adapted().eval())
    assert samples(adapted(sample_at_inference=True).eval())


def test_without_elbo_the_second_encoder_and_the_decoder_do_not_exist() -> None:
    model = adapted(elbo_weight=0.0)
    assert not [n for n, _ in model.named_parameters() if any(p in n for p in ("encoder2", ".decoder_", "log_tau"))]
    assert samples(model.train())
    assert float(elbo_loss(model)) == 0
    batch = batch_for(tiny_bert())
    output = model(**batch)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, batch["labels"]))
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_with_a_cache_gives_what_generation_without_one_gives(kind: str) -> None:
    model = adapted(kind).eval()
    ids = batch_for(BUILDERS[kind](), rows=1)["input_ids"]
    cached, plain = (
        model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert cached.shape[1] > ids.shape[1]
    assert torch.equal(cached, plain)


# Several adapters


@pytest.fixture
def two() -> PeftModel:
    """One adapter on query and value, another of a different rank on query, key and the feed-forward layers."""
    model = adapted()
    model.add_adapter("other", config("bert", r=2, target_modules=["query", "key", "intermediate.dense"]))
    return randomised(model)


def test_a_second_adapter_has_its_own_targets_and_rank(two: PeftModel) -> None:
    assert len(adapter_modules(two)) == 4
    assert len(adapter_modules(two, "other")) == 6
    query = two.base_model.model.bert.encoder.layer[0].attention.self.query
    assert query.r == {"default": 4, "other": 2}


def test_set_adapter_switches_outputs_and_gradients(two: PeftModel) -> None:
    first = evaluated(two)
    two.set_adapter("other")
    second = evaluated(two)
    assert not torch.allclose(first, second)
    two.train()(**batch_for(tiny_bert())).loss.backward()
    trained = {name for name, p in two.named_parameters() if p.grad is not None and "fvae_lora_" in name}
    assert trained
    assert all(".other" in name for name in trained)
    two.set_adapter("default")
    torch.testing.assert_close(evaluated(two), first)


def test_a_second_adapter_leaves_the_first_as_it_was(base: PreTrainedModel) -> None:
    model = randomised(get_peft_model(base, config("bert")))
    expected = evaluated(model)
    model.add_adapter("other", config("bert", r=2))
    torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=0)


def test_two_active_adapters_add_up(two: PeftModel) -> None:
    layer = two.base_model.model.bert.encoder.layer[0].attention.self.query.eval()
    x = torch.randn(3, 16)
    base = layer.base_layer(x)
    layer.set_adapter(["default"])
    first = layer(x) - base
    layer.set_adapter(["other"])
    second = layer(x) - base
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base + first + second)


def test_disable_adapter_gives_the_base_model_and_no_elbo(base: PreTrainedModel) -> None:
    expected = evaluated(copy.deepcopy(base))
    model = randomised(get_peft_model(base, config("bert", task_type=None)))
    batch = batch_for(base)
    with model.disable_adapter():
        torch.testing.assert_close(evaluated(model), expected, rtol=0, atol=0)
        output = model.train()(**batch)
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, batch["labels"]))
        assert float(elbo_loss(model)) == 0
    assert not torch.allclose(evaluated(model), expected)


def test_delete_adapter_leaves_the_other(two: PeftModel) -> None:
    two.set_adapter("other")
    expected = evaluated(two)
    two.delete_adapter("default")
    assert not [name for name, _ in two.named_parameters() if ".default" in name]
    torch.testing.assert_close(evaluated(two), expected)
    assert torch.isfinite(two.train()(**batch_for(tiny_bert())).loss)


# Injection and transformers' own way


def test_inject_adapter_in_model(base: PreTrainedModel) -> None:
    model = inject_adapter_in_model(config("bert"), base.train())
    assert model is base
    assert len(adapter_modules(model)) == 4
    assert samples(model)


@pytest.mark.parametrize("training", [True, False])
def test_injecting_keeps_the_models_mode(base: PreTrainedModel, training: bool) -> None:
    model = randomised(inject_adapter_in_model(config("bert"), base.train(training)))
    assert samples(model) is training


@pytest.mark.parametrize("training", [True, False])
def test_transformers_add_adapter_keeps_the_models_mode(base: PreTrainedModel, training: bool) -> None:
    base.train(training)
    base.add_adapter(config("bert"))
    assert samples(randomised(base)) is training


def test_get_peft_model_trains_even_over_an_eval_base(base: PreTrainedModel) -> None:
    """As stock peft does."""
    model = randomised(get_peft_model(base.eval(), config("bert")))
    assert all(layer.training for layer in model.modules() if isinstance(layer, FVAELoraLayer))


def test_transformers_adds_saves_loads_switches_and_deletes_adapters(tmp_path: Path, base: PreTrainedModel) -> None:
    plain = evaluated(copy.deepcopy(base))
    clean = copy.deepcopy(base)
    base.add_adapter(config("bert"), adapter_name="first")
    expected = evaluated(randomised(base))
    assert not torch.allclose(plain, expected)
    base.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    base.disable_adapters()
    torch.testing.assert_close(evaluated(base), plain)
    base.enable_adapters()
    torch.testing.assert_close(evaluated(base), expected)

    clean.load_adapter(str(tmp_path), adapter_name="second")
    assert not clean.training
    torch.testing.assert_close(logits(clean), expected)
    clean.add_adapter(config("bert", r=2), adapter_name="third")
    clean.set_adapter("second")
    torch.testing.assert_close(evaluated(clean), expected)
    clean.delete_adapter("second")
    assert not adapter_modules(clean, "second")
    assert adapter_modules(clean, "third")


def test_loading_through_transformers_into_an_eval_model_does_not_sample(tmp_path: Path, base: PreTrainedModel) -> None:
    adapted().save_pretrained(tmp_path)
    base.eval()
    base.load_adapter(str(tmp_path))
    assert not samples(base)


# What the layer is


def test_conv1d_of_gpt2_is_adapted() -> None:
    model = adapted("gpt2", target_modules=["c_attn", "c_proj", "c_fc"])
    assert len(list(layers_of(model))) == 8
    for layer in layers_of(model):
        x = torch.randn(3, layer.in_features)
        assert layer.eval()(x).shape == (3, layer.out_features)


def test_parameters_have_the_promised_names() -> None:
    names = {name.rpartition("fvae_lora_")[2] for name, _ in adapted().named_parameters() if "fvae_lora_" in name}
    for part in ("encoder1", "encoder2", "decoder", "mean", "logvar", "log_tau", "B"):
        assert any(part in name for name in names), part


def test_the_model_tells_its_status() -> None:
    status = adapted("vit").get_model_status()
    assert status.adapter_model_type == "FVAELoraModel"
    assert status.active_adapters == ["default"]
    assert status.num_adapter_layers == 4
    assert status.requires_grad == {"default": True}


def test_gradient_checkpointing_can_be_switched_on() -> None:
    model = get_peft_model(tiny_llama(), config("llama"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()(**batch_for(tiny_llama())).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_vit_trains_without_a_task_type() -> None:
    model = get_peft_model(tiny_vit(), config("vit"))
    model.train()(**batch_for(tiny_vit())).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gpt2_is_adapted_whatever_fan_in_fan_out_says() -> None:
    torch.manual_seed(0)
    base = tiny_gpt2()
    results = []
    for fan_in_fan_out in (True, False):
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config("gpt2", fan_in_fan_out=fan_in_fan_out))
        results.append(evaluated(randomised(model), "gpt2"))
    torch.testing.assert_close(*results)
