"""Features of peft beyond those in ``test_drop_in.py``: each works as it does with LoRA, or refuses in one line."""

from __future__ import annotations

import copy
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel

from fvae_lora import FVAELoraConfig, add_elbo, elbo_loss
from fvae_lora.layer import FVAELoraConv2d
from tiny import BUILDERS, TARGETS, batch_for, logits, randomised, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

FIELDS: dict[str, object] = {"r": 4, "decoder_hidden_dims": [8]}


def config(kind: str = "bert", **fields: object) -> FVAELoraConfig:
    return FVAELoraConfig(**FIELDS | {"target_modules": TARGETS[kind]} | fields)


# Half precision


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_base_model_in_half_precision(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    base = BUILDERS[kind](dtype)
    model = get_peft_model(base, config(kind), autocast_adapter_dtype=autocast)
    model.add_adapter("other", config(kind, r=2), autocast_adapter_dtype=autocast)
    adapter = {p.dtype for name, p in model.named_parameters() if "fvae_lora_" in name}
    assert adapter == {torch.float32 if autocast else dtype}
    output = model.train()(**batch_for(base))
    assert output.logits.dtype == dtype
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert logits(model.eval(), kind).isfinite().all()


# Several adapters in one batch


@pytest.fixture
def two() -> PeftModel:
    model = get_peft_model(tiny_bert(), config(), adapter_name="a")
    model.add_adapter("b", config(r=2, target_modules=["query", "key"]))
    return randomised(model).eval()


def test_each_row_of_a_batch_may_have_its_own_adapter(two: PeftModel) -> None:
    names = ["a", "__base__", "b", "a"]
    mixed = logits(two, adapter_names=names)
    with two.disable_adapter():
        alone = {"__base__": logits(two)}
    for name in ("a", "b"):
        two.set_adapter(name)
        alone[name] = logits(two)
    assert not torch.allclose(alone["a"], alone["b"])
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_mixed_batch(beams: int) -> None:
    model = get_peft_model(tiny_llama(), config("llama", task_type="CAUSAL_LM"), adapter_name="a")
    model = randomised(model).eval()
    inputs = {"input_ids": torch.randint(1, 60, (1, 4)).expand(2, 4), "max_new_tokens": 6, "do_sample": False}
    inputs |= {"pad_token_id": 0, "eos_token_id": None, "num_beams": beams}
    with model.disable_adapter():
        plain = model.generate(**inputs)
    assert not torch.equal(plain, model.generate(**inputs))
    mixed = model.generate(**inputs, adapter_names=["__base__", "a"])
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], model.generate(**inputs)[1])


def test_a_mixed_batch_that_cannot_be_is_refused(two: PeftModel) -> None:
    with pytest.raises(ValueError, match="there is no adapter c, d"):
        logits(two, adapter_names=["a", "d", "c", "a"])
    with pytest.raises(ValueError, match="adapter_names has 3 entries for a batch of 4"):
        logits(two, adapter_names=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"adapter_names cannot be used in training mode; call model.eval\(\)"):
        logits(two.train(), adapter_names=["a", "a", "b", "b"])


def test_a_mixed_batch_of_merged_adapters_is_refused() -> None:
    model = get_peft_model(tiny_bert(), config(encoder_hidden_dims=[])).eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapter_names cannot be used with merged adapters; call unmerge_adapter"):
        logits(model, adapter_names=["default"] * 4)


# Embeddings and tied weights


def trained(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}


def shake(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 0, 0.3)


@pytest.mark.parametrize("indices", [[0, 3], {"wte": [0, 3]}])
def test_trainable_tokens_of_tied_embeddings_stay_tied(tmp_path: Path, indices: object) -> None:
    base = tiny_gpt2()
    assert base.lm_head.weight is base.transformer.wte.weight
    model = get_peft_model(copy.deepcopy(base), config("gpt2", trainable_token_indices=indices))
    shake(model)
    model.eval()
    ids = torch.tensor([[0, 3, 5]])
    inside = model.base_model.model
    embedded = inside.transformer.wte(ids)
    assert not torch.allclose(embedded[0, :2], base.transformer.wte(ids)[0, :2])
    torch.testing.assert_close(inside.lm_head(embedded), nn.functional.linear(embedded, merged_table(inside)))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path), "gpt2"), logits(model, "gpt2"))


def merged_table(model: nn.Module) -> Tensor:
    return model.transformer.wte(torch.arange(model.config.vocab_size))


def test_saved_embeddings_stay_tied_on_request(tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    fields = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(copy.deepcopy(base), config("llama", **fields))
    inside = model.base_model.model
    table, head = (module.modules_to_save["default"].weight for module in (inside.model.embed_tokens, inside.lm_head))
    assert table is head
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(loaded.eval(), "llama"), logits(model.eval(), "llama"))


def test_saved_embeddings_that_are_tied_are_warned_about() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        get_peft_model(base, config("llama", modules_to_save=["embed_tokens"]))


def test_embeddings_are_no_targets() -> None:
    with pytest.raises(ValueError, match=r"^target_modules: transformer.wte is a Embedding; only Linear"):
        get_peft_model(tiny_gpt2(), config("gpt2", target_modules=["wte"]))


def test_a_layer_that_serves_twice_in_the_base_model_is_adapted_once() -> None:
    """Encoder and decoder of T5 share their embedding; layers may be shared the same way."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = get_peft_model(Shared(), config(target_modules=["first"]))
    x = torch.randn(7, 5)
    add_elbo(model.train()(x).sum(), model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert set(trained(model)) == {name for name in trained(model) if name.startswith("first.")}


# Convolutions


class Convolution(nn.Module):
    def __init__(self, **fields: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 2), **fields)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


CONVOLUTIONS = [
    {},
    {"stride": (2, 1), "padding": (1, 2), "bias": False},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("fields", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_an_adapted_convolution_is_the_layer_on_each_patch(fields: dict[str, object], batched: bool) -> None:
    base = Convolution(**fields).double()
    model = randomised(get_peft_model(copy.deepcopy(base), config(target_modules=["conv"]))).eval()
    layer = model.base_model.model.conv
    assert isinstance(layer, FVAELoraConv2d)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    x = x if batched else x[0]
    # Convolutions with an identity kernel cut the patches out, with the layer's own padding, stride and dilation.
    cut = nn.Conv2d(3, 18, (3, 2), **fields | {"bias": False}).double()
    cut.weight.data = torch.eye(18, dtype=torch.float64).reshape(18, 3, 3, 2)
    patches = cut(x).movedim(-3, -1)
    vae, B = layer.fvae_lora_vae["default"], layer.fvae_lora_B["default"].weight
    expected = base(x) + nn.functional.linear(vae.encode_mean("encoder1", patches), B).movedim(-1, -3)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("fields", CONVOLUTIONS, ids=str)
def test_a_convolution_with_a_linear_encoder_merges_exactly(fields: dict[str, object], tmp_path: Path) -> None:
    if fields.get("padding_mode") is None and fields.get("padding"):
        fields = fields | {"padding": 0}  # see the test below
    base = Convolution(**fields).double()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["conv"], encoder_hidden_dims=[]))
    model = randomised(model).eval()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_convolution_trains_all_its_parameters() -> None:
    model = get_peft_model(Convolution(padding=1), config(target_modules=["conv"])).train()
    output = model(torch.randn(2, 3, 7, 6))
    assert elbo_loss(model).isfinite()
    add_elbo(output.sum(), model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Models that only inject, as diffusers' and sentence-transformers' do

Output = namedtuple("Output", "sample other")


class Denoiser(nn.Module):
    """Neither a config nor a loss; its output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.to_q = nn.Linear(4, 4)
        self.conv_out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: int = 0) -> Output:
        hidden = self.to_q(self.conv_in(x).movedim(1, -1)).movedim(-1, 1)
        return Output(self.conv_out(hidden), timestep)


def test_injecting_into_a_model_that_knows_nothing_of_peft() -> None:
    base = Denoiser()
    fields = {"target_modules": ["to_q", "conv_in"]}
    model = inject_adapter_in_model(config(**fields), copy.deepcopy(base).train(), adapter_name="style")
    x = torch.randn(2, 3, 6, 6)
    loss = (model(x).sample - x).square().mean()
    add_elbo(loss, model).backward()
    own = {name for name, p in model.named_parameters() if p.requires_grad}
    assert own == {name for name, _ in model.named_parameters() if "fvae_lora_" in name}
    assert all(model.get_parameter(name).grad is not None for name in own)

    randomised(model).eval()
    state = get_peft_model_state_dict(model, adapter_name="style")
    again = inject_adapter_in_model(config(**fields), copy.deepcopy(base).eval(), adapter_name="other")
    result = set_peft_model_state_dict(again, state, adapter_name="other")
    assert not result.unexpected_keys
    torch.testing.assert_close(again(x).sample, model(x).sample)
    by_state = inject_adapter_in_model(config(**fields), copy.deepcopy(base).eval(), state_dict=state)
    set_peft_model_state_dict(by_state, state)
    torch.testing.assert_close(by_state(x).sample, model(x).sample)


# What is saved


def test_state_dicts_pass_through_torch_save(tmp_path: Path) -> None:
    model = randomised(get_peft_model(tiny_bert(), config()))
    model.train()(**batch_for(tiny_bert()))  # leaves something recorded
    whole, adapter = tmp_path / "whole.pt", tmp_path / "adapter.pt"
    torch.save(model.state_dict(), whole)
    torch.save(get_peft_model_state_dict(model), adapter)
    twin = get_peft_model(tiny_bert(), config())
    twin.load_state_dict(torch.load(whole, weights_only=True))
    torch.testing.assert_close(logits(twin.eval()), logits(model.eval()))
    base = copy.deepcopy(model).unload()
    other = get_peft_model(base, config())
    set_peft_model_state_dict(other, torch.load(adapter, weights_only=True))
    torch.testing.assert_close(logits(other.eval()), logits(model))


def test_the_model_card_names_base_model_and_library_and_says_how_to_load(tmp_path: Path) -> None:
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    get_peft_model(base, config()).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["library_name"] == "peft"
    assert facts["base_model"] == str(tmp_path / "base")
    assert "import fvae_lora" in card


# What is adapted, and what a model says about it


@pytest.mark.parametrize("architecture", sorted(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING))
def test_target_modules_may_be_left_out_for_the_architectures_that_peft_knows(architecture: str) -> None:
    names = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[architecture]

    class Model(nn.Module):
        config = {"model_type": architecture}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            for name in names if not isinstance(names, str) else ():
                parent = self
                *parts, last = name.split(".")
                for part in parts:
                    if not hasattr(parent, part):
                        parent.add_module(part, nn.Module())
                    parent = getattr(parent, part)
                parent.add_module(last, nn.Linear(4, 4))

    if isinstance(names, str):
        pytest.skip("a pattern over full names")
    model = get_peft_model(Model(), FVAELoraConfig())
    assert set(model.targeted_module_names) == set(names)


def test_layers_and_model_tell_their_status() -> None:
    model = get_peft_model(tiny_bert(), config(), adapter_name="a")
    model.add_adapter("b", config(r=2, target_modules=["key"]))
    layers = get_layer_status(model)
    assert len(layers) == 6
    assert {layer.module_type for layer in layers} == {"fvae_lora.FVAELoraLinear"}
    by_name = {layer.name: layer for layer in layers}
    query = next(layer for name, layer in by_name.items() if name.endswith("layer.0.attention.self.query"))
    assert (query.enabled, query.active_adapters, query.merged_adapters) == (True, ["a"], [])
    assert (query.requires_grad, query.available_adapters) == ({"a": True}, ["a"])
    status = get_model_status(model)
    assert (status.peft_types, status.num_adapter_layers) == ({"a": "FVAE_LORA", "b": "FVAE_LORA"}, 6)
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.disable_adapter_layers()
    assert get_model_status(model).enabled is False


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_fan_in_fan_out_follows_the_layer_not_the_field(fan_in_fan_out: bool) -> None:
    """LoRA warns and corrects; here the layer's type says it, so either value is right."""
    for base, targets in ((tiny_gpt2(), ["c_attn"]), (tiny_bert(), ["query"])):
        fields = {"target_modules": targets, "fan_in_fan_out": fan_in_fan_out, "encoder_hidden_dims": []}
        model = randomised(get_peft_model(base, config(**fields))).eval()
        kind = base.config.model_type
        expected = logits(model, kind)
        torch.testing.assert_close(logits(model.merge_and_unload(), kind), expected, rtol=1e-4, atol=1e-5)


# Gradient checkpointing, with a loss that the loop computes


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama, tiny_t5])
def test_checkpointing_gives_every_parameter_its_gradient(build: type[PreTrainedModel], use_reentrant: bool) -> None:
    base = build()
    kind = base.config.model_type
    model = randomised(get_peft_model(base, config(kind))).train()
    batch = batch_for(base)
    if kind == "t5":
        batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
    del batch["labels"]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        add_elbo(model(**batch)[0].square().sum(), model).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    assert any("encoder2" in name for name in expected)
    assert any("decoder_output" in name for name in expected)
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
