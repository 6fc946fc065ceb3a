"""FVAE-LoRA takes LoRA's place in peft and in transformers: what works there works the same here."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fvae_lora import FVAELoraConfig, elbo_loss
from fvae_lora.config import PEFT_SAVES_BIASES
from fvae_lora.layer import FVAELoraLayer
from tiny import BUILDERS, TARGETS, adapted_linear, batch_for, randomised, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "vit": None}
AUTO = {
    "bert": AutoPeftModelForSequenceClassification,
    "gpt2": AutoPeftModelForCausalLM,
    "llama": AutoPeftModelForCausalLM,
    "t5": AutoPeftModelForSeq2SeqLM,
}


def config(kind: str, **fields: object) -> FVAELoraConfig:
    fields = {"r": 4, "decoder_hidden_dims": [8], "target_modules": TARGETS[kind], "task_type": TASKS[kind]} | fields
    return FVAELoraConfig(**fields)


def adapted(kind: str = "bert", adapter_name: str = "default", **fields: object) -> PeftModel:
    return randomised(get_peft_model(BUILDERS[kind](), config(kind, **fields), adapter_name=adapter_name))


@torch.no_grad()
def outputs(model: nn.Module, kind: str = "bert") -> Tensor:
    """Logits in whatever mode the model is in."""
    return model(**batch_for(BUILDERS[kind]())).logits


def evaluated(model: nn.Module, kind: str = "bert") -> Tensor:
    return outputs(model.eval(), kind)


def samples(model: nn.Module, kind: str = "bert") -> bool:
    batch = batch_for(BUILDERS[kind]())
    return not torch.equal(model(**batch).logits, model(**batch).logits)


def adapter_modules(model: nn.Module, name: str = "default") -> set[str]:
    """Names of the modules that have this adapter."""
    suffix = f".fvae_lora_B.{name}.weight"
    names = [key.removesuffix(suffix) for key, _ in model.named_parameters() if key.endswith(suffix)]
    return {key.removeprefix("base_model.model.") for key in names}


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, FVAELoraLayer))


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


# Save and load


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
    torch.testing.assert_close(outputs(loaded, kind), evaluated(model, kind), rtol=0, atol=0)
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
    torch.testing.assert_close(outputs(loaded), evaluated(model))


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
    torch.testing.assert_close(outputs(clean), expected)
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


# Copies, merging, unloading


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
