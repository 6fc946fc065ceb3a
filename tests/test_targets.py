"""Which layers are adapted: what LoRA refuses is refused, and what stays untrained is said, once and by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from fvae_lora import FVAELoraConfig, idle
from tiny import batch_for, randomised, tiny_bert, tiny_llama, tiny_mixtral, tiny_t5

COMMON = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
LANGUAGE = COMMON | {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
LANGUAGE |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32, "num_experts_per_tok": 1}
STATE = COMMON | {"state_size": 4}
BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": tiny_mixtral,
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**LANGUAGE, num_experts=3, moe_intermediate_size=8, head_dim=8)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**LANGUAGE, num_local_experts=3, head_dim=8)),
    "deepseek-v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **LANGUAGE,
            n_routed_experts=4,
            moe_intermediate_size=8,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
        )
    ),
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **LANGUAGE,
            num_experts=2,
            mamba_dt_rank=4,
            mamba_d_state=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
        )
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**STATE, time_step_rank=4)),
    "falcon-mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**STATE, time_step_rank=4)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**STATE, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**COMMON, attention_hidden_size=16, context_length=32)),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=60,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            num_experts=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            decoder_start_token_id=0,
        )
    ),
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "t5": tiny_t5,
    "whisper": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            vocab_size=60,
            num_mel_bins=4,
            max_source_positions=10,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ),
}
OF_EXPERTS = {
    "mixtral": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"),
    "qwen3-moe": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"),
    "gpt-oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight"),
    "deepseek-v3": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"),
    "jamba": ("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", "feed_forward.router.weight"),
}
STAYS, IDLE = "are not adapted", "did not run"


def ours(targets: Any, **fields: Any) -> FVAELoraConfig:
    return FVAELoraConfig(r=4, target_modules=targets, decoder_hidden_dims=[8], **fields)


def text() -> dict[str, Tensor]:
    ids = batch_for(tiny_bert())["input_ids"]
    return {"input_ids": ids, "labels": ids}


def warned(run: Callable[[], Any], about: str) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = run()
    return result, [str(warning.message) for warning in found if about in str(warning.message)]


def adapt(base: nn.Module, config: PeftConfig) -> set[str] | str:
    """The modules that are adapted, or why they are not."""
    try:
        return set(get_peft_model(base, config).targeted_module_names)
    except ValueError as error:
        return str(error)


# --- What LoRA adapts, and what it refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BUILDERS)
def test_all_linear_adapts_or_refuses_what_lora_does(kind: str) -> None:
    """But for the layers that LoRA takes for experts by their names."""
    base = BUILDERS[kind]()
    lora, found = (
        adapt(copy.deepcopy(base), config) for config in (LoraConfig(target_modules="all-linear"), ours("all-linear"))
    )
    if isinstance(lora, str):
        assert isinstance(found, str)
        assert lora.endswith(found.removeprefix("target_modules: ").partition("Incompatible modules")[2])
        assert "'out_proj' is incompatible" in found
    else:
        assert found == lora or (kind == "deepseek-v3" and found > lora)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon-mamba"])
def test_a_layer_that_lora_refuses_is_refused_and_nothing_is_changed(kind: str) -> None:
    base = BUILDERS[kind]()
    names = [name for name, _ in base.named_modules()]
    for targets in (["in_proj", "out_proj"], "all-linear", r".*\.out_proj"):
        with pytest.raises(ValueError, match=r"^target_modules: Module 'out_proj' is incompatible") as error:
            get_peft_model(base, ours(targets))
        assert "\n" not in str(error.value)
        assert [name for name, _ in base.named_modules()] == names


def test_all_linear_may_be_written_in_capitals() -> None:
    assert adapt(tiny_llama(), ours("All-Linear")) == adapt(tiny_llama(), LoraConfig(target_modules="All-Linear"))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["experts"], "is a MixtralExperts"),
        (["gate"], "is a MixtralTopKRouter"),
        (r".*\.experts", "is a MixtralExperts"),
        (["w1", "w2"], r"'w1' matches no module .*experts\.gate_up_proj"),
        (["q_proj", "down_proj"], r"'down_proj' matches no module .*experts\.down_proj"),
    ],
)
def test_experts_that_are_named_are_refused_with_the_reason(targets: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        get_peft_model(BUILDERS["mixtral"](), ours(targets))
    assert "\n" not in str(error.value)


def test_parameters_as_targets_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="target_parameters"):
        FVAELoraConfig(target_parameters=["experts.gate_up_proj"])


def test_an_attention_of_torch_is_refused_with_its_type() -> None:
    with pytest.raises(ValueError, match="attention is a MultiheadAttention"):
        get_peft_model(Attention(), ours(["attention"]))


# --- Experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OF_EXPERTS)
def test_experts_that_stay_as_they_are_are_named_once(kind: str) -> None:
    if kind == "jamba" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("in transformers 5.17 its experts are linear layers")
    base = BUILDERS[kind]()
    model, (message,) = warned(lambda: get_peft_model(base, ours("all-linear")), STAYS)
    assert all(name in message for name in OF_EXPERTS[kind])
    assert "layers.*" in message
    _, messages = warned(lambda: [model(**text()).loss.backward() for _ in range(2)], STAYS)
    assert not messages


def test_experts_are_named_where_their_names_are_also_those_of_layers() -> None:
    """DeepSeek's first layer has no experts."""
    _, (message,) = warned(lambda: get_peft_model(BUILDERS["deepseek-v3"](), ours(["gate_proj", "down_proj"])), STAYS)
    assert "experts.gate_up_proj" in message
    assert "gate.weight" not in message
    _, (message,) = warned(lambda: get_peft_model(BUILDERS["deepseek-v3"](), ours(r".*\.down_proj")), STAYS)
    assert "experts.down_proj" in message


@pytest.mark.parametrize("kind", ["mixtral", "tied", "switch", "rwkv", "t5", "clip"])
def test_nothing_is_said_of_experts_that_were_not_asked_for(kind: str) -> None:
    targets = ["q_proj", "v_proj"] if kind == "mixtral" else "all-linear"
    _, messages = warned(lambda: get_peft_model(BUILDERS[kind](), ours(targets)), STAYS)
    assert not messages


def test_loading_for_inference_says_nothing_again(tmp_path: Any) -> None:
    base = BUILDERS["deepseek-v3"]()
    get_peft_model(copy.deepcopy(base), ours(["down_proj"])).save_pretrained(tmp_path)
    _, messages = warned(lambda: PeftModel.from_pretrained(base, tmp_path), STAYS)
    assert not messages


# --- Layers that never run -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Torch's attention reads the weight of its `out_proj` and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.attention(x, x, x)[0]


def trained(base: nn.Module, targets: Any, forwards: int = 3, batch: Any = None, **fields: Any) -> list[str]:
    """What is said of layers that do not run while a model is trained."""
    model = get_peft_model(base, ours(targets, **fields))
    batch = batch or text()
    return warned(lambda: [model(**batch) for _ in range(forwards)], IDLE)[1]


@pytest.mark.parametrize("elbo_weight", [1e-3, 0.0])
@pytest.mark.parametrize("kind", ["mamba", "falcon-mamba", "jamba"])
def test_a_layer_whose_weight_alone_is_read_is_named_once(kind: str, elbo_weight: float) -> None:
    (message,) = trained(BUILDERS[kind](), ["dt_proj", "in_proj"], elbo_weight=elbo_weight)
    assert "dt_proj" in message
    assert "in_proj" not in message


def test_it_is_also_named_where_no_other_layer_is_adapted() -> None:
    (message,) = trained(BUILDERS["mamba"](), ["dt_proj"])
    assert "backbone.layers.0.mixer.dt_proj" in message


def test_the_projection_of_torchs_attention_is_named() -> None:
    (message,) = trained(Attention(), "all-linear", batch={"x": torch.randn(2, 3, 8)})
    assert "attention.out_proj" in message


@pytest.mark.parametrize("kind", ["tied", "rwkv", "t5", "mixtral"])
def test_nothing_is_said_where_every_layer_runs(kind: str) -> None:
    assert not trained(BUILDERS[kind](), "all-linear")


class Mixture(nn.Module):
    """Three experts, one for each forward; the last one waits for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        return self.experts[self.turn % 2](x)


def test_an_expert_without_a_token_is_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "WATCHED_FORWARDS", 5)
    batch = {"x": torch.randn(2, 4)}
    assert not trained(Mixture(), "all-linear", 4, batch)
    (message,) = trained(Mixture(), "all-linear", 12, batch)
    assert "in 5 training forwards of Mixture are not trained by it: experts.2;" in message


def test_inference_and_what_has_no_gradient_say_nothing() -> None:
    model = get_peft_model(Attention(), ours("all-linear"))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert not warned(lambda: model(x), IDLE)[1]
    assert not warned(lambda: model.eval()(x), IDLE)[1]
    model.train()
    with model.disable_adapter():
        assert not warned(lambda: model(x), IDLE)[1]
    assert warned(lambda: model(x), IDLE)[1]


def test_an_adapter_that_is_not_active_is_not_waited_for() -> None:
    model = get_peft_model(Attention(), ours(["linear"]), adapter_name="first")
    model.add_adapter("second", ours(["out_proj"]))
    x = torch.randn(2, 3, 8)
    assert not warned(lambda: model(x), IDLE)[1]


def test_an_adapter_that_is_added_later_is_looked_at_too() -> None:
    model = get_peft_model(Attention(), ours(["linear"]), adapter_name="first")
    x = torch.randn(2, 3, 8)
    assert not warned(lambda: model(x), IDLE)[1]
    model.add_adapter("second", ours(["out_proj"]))
    model.set_adapter("second")
    assert warned(lambda: model(x), IDLE)[1]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_that_checkpointing_runs_have_run(use_reentrant: bool) -> None:
    model = randomised(get_peft_model(tiny_llama(), ours("all-linear")))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert not warned(lambda: model(**text()).loss.backward(), IDLE)[1]


@pytest.mark.parametrize("elbo_weight", [1e-3, 0.0])
def test_layers_that_are_compiled_have_run(elbo_weight: float) -> None:
    torch.compiler.reset()
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ours(["0", "1"], elbo_weight=elbo_weight))
    compiled = torch.compile(model, backend="eager")
    assert not warned(lambda: [compiled(torch.randn(2, 4)) for _ in range(2)], IDLE)[1]
