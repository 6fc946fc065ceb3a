"""A plain LoRA folder from an adapter: what it holds, what it computes in stock peft, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fvae_lora import FVAELoraConfig
from fvae_lora.config import PEFT_SAVES_BIASES
from fvae_lora.layer import FVAELoraLayer
from fvae_lora.to_lora import ConversionReport, convert_to_lora
from tiny import BUILDERS, TARGETS, adapted_linear, batch_for, evaluated, randomised, tiny_bert, tiny_llama, tiny_vit

LINEAR: dict[str, Any] = {"encoder_hidden_dims": []}
# What vLLM's loader takes: every other key is an error there.
SERVERS_TAKE = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")


def adapted(base: PreTrainedModel, **fields: Any) -> PeftModel:
    fields = {"r": 4, "decoder_hidden_dims": [8], "target_modules": TARGETS[base.config.model_type]} | fields
    model = randomised(get_peft_model(copy.deepcopy(base), FVAELoraConfig(**fields)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "fvae_lora_" not in name:
            nn.init.normal_(parameter, 0.0, 0.3)  # a trained classifier, trained biases
    return model


def with_real_layer_norms(base: PreTrainedModel) -> PreTrainedModel:
    """Scales and shifts as pre-training leaves them; at the start all shifts are zero."""
    for module in base.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.5)
    return base


def batches(base: PreTrainedModel, rows: int = 16, number: int = 5) -> list[dict[str, Tensor]]:
    found = []
    for i in range(number):
        batch = batch_for(base, rows + i, 12)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"] * (1 + i / 10)
        found.append(batch)
    return found


@contextmanager
def seen_inputs(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What each adapted layer reads."""
    layers = {module.name: module for module in model.modules() if isinstance(module, FVAELoraLayer)}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.base_layer.register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0].detach()))
        for name, layer in layers.items()
    ]
    yield found
    for handle in handles:
        handle.remove()


def encoder_by_hand(layer: FVAELoraLayer, x: Tensor) -> Tensor:
    w = {name: value.double() for name, value in layer.fvae_lora_vae["default"].named_parameters()}
    hidden = (x.double() @ w["encoder1_hidden0_weight"].mT + w["encoder1_hidden0_bias"]).relu()
    return (hidden @ w["encoder1_mean_weight"].mT + w["encoder1_mean_bias"]).detach()


def stock_peft(folder: Path) -> dict[str, Tensor]:
    """The logits of every case below a folder, by a process that never imports this package."""
    script = """
import sys, warnings
from pathlib import Path
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
results = {}
for case in sorted(Path(sys.argv[1]).iterdir()):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # Of a layer without bias, and of Conv1D, which stock LoRA sets right by itself.
        warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        base = getattr(transformers, (case / "class").read_text()).from_pretrained(case / "base")
        model = PeftModel.from_pretrained(base, case / "lora").eval()
    assert all(config.peft_type == "LORA" for config in model.peft_config.values())
    with torch.no_grad():
        results[case.name] = model(**load_file(case / "batch.safetensors")).logits
assert "fvae_lora" not in sys.modules
save_file(results, sys.argv[2])
"""
    out = folder.parent / "logits.safetensors"
    done = subprocess.run([sys.executable, "-c", script, folder, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out)


EXACT = {
    "bert": ("bert", {}),
    "vit-classifier": ("vit", {"modules_to_save": ["classifier"]}),
    "gpt2-conv1d": ("gpt2", {"fan_in_fan_out": True}),
    "llama-without-biases": ("llama", {"task_type": "CAUSAL_LM"}),
    "t5": ("t5", {}),
    "ranks-and-alphas": ("bert", {"rank_pattern": {"value": 2}, "alpha_pattern": {"query": 6.0}, "lora_alpha": 3.0}),
    "every-linear-layer": ("llama", {"target_modules": "all-linear"}),
    "regular-expression": ("bert", {"target_modules": r".*layer\.1\..*(query|dense)"}),
    "one-layer": ("bert", {"layers_to_transform": 0}),
    "reference": ("bert", {"objective": "reference", "lora_alpha": 8.0}),
    "token-embeddings": ("bert", {"trainable_token_indices": [3, 5]}),
}
if PEFT_SAVES_BIASES:
    EXACT["trained-biases"] = ("bert", {"bias": "all"})


@pytest.mark.slow
def test_stock_peft_computes_what_the_adapter_does(tmp_path: Path) -> None:
    expected, errors = {}, {}

    def add(case: str, base: PreTrainedModel, model: PeftModel, *args: Any, **kwargs: Any) -> ConversionReport:
        folder = tmp_path / "cases" / case
        base.save_pretrained(folder / "base")
        (folder / "class").write_text(type(base).__name__)
        save_file(batch_for(base), folder / "batch.safetensors")
        report = convert_to_lora(model, folder / "lora", *args, **kwargs)
        errors[case] = max(report.errors.values())
        return report

    for case, (kind, fields) in EXACT.items():
        base = BUILDERS[kind]()
        model = adapted(base, **LINEAR, **fields)
        add(case, base, model)
        expected[case] = evaluated(model, base)

    # Behind a LayerNorm, a bias can be folded into A exactly.
    for kind in ("bert", "vit", "gpt2"):
        base = with_real_layer_norms(BUILDERS[kind]())
        model = adapted(base, **LINEAR)
        add(f"folded-{kind}", base, model, batches(base), bias="fold", max_error=1e-5)
        expected[f"folded-{kind}"] = evaluated(model, base)

    # A fit is held to the linear map that was fitted, computed in this package's own layers.
    for bias in ("keep", "fold"):
        base = with_real_layer_norms(tiny_vit())
        model = adapted(base, modules_to_save=["classifier"])
        kept: dict[str, Tensor] = {}

        def keep(model: PeftModel, base: PreTrainedModel = base, kept: dict[str, Tensor] = kept) -> dict[str, float]:
            kept["logits"] = evaluated(model, base)
            return {}

        add(f"fitted-{bias}", base, model, batches(base), bias=bias, max_error=1.0, evaluate=keep)
        expected[f"fitted-{bias}"] = kept["logits"]
        assert (kept["logits"] - evaluated(model, base)).abs().max() > 1e-2  # the fit is another map

    found = stock_peft(tmp_path / "cases")
    assert found.keys() == expected.keys()
    for case, logits in found.items():
        allowed = (1e-6 if case in EXACT else 1e-5) * expected[case].abs().max()
        assert (logits - expected[case]).abs().max() <= allowed, case
    assert all(errors[case] == 0 for case in EXACT)
    assert all(error > 0.01 for case, error in errors.items() if case.startswith("fitted"))


@pytest.mark.parametrize("bias", ["keep", "fold"])
def test_the_fit_is_that_of_least_squares_on_the_tokens_that_count(tmp_path: Path, bias: str) -> None:
    base = with_real_layer_norms(tiny_bert())
    model = adapted(base, lora_alpha=6.0)
    data = batches(base)
    with seen_inputs(model), torch.no_grad():
        report = convert_to_lora(model, tmp_path / "lora", iter(data), bias=bias, max_error=1.0)
    with seen_inputs(model) as inputs, torch.no_grad():
        for batch in data:
            model.eval()(**batch)
    attended = torch.cat([batch["attention_mask"].flatten() for batch in data]).bool()
    assert not attended.all()
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in {m.name: m for m in model.modules() if isinstance(m, FVAELoraLayer)}.items():
        x = torch.cat([x.flatten(0, -2) for x in inputs[name]])[attended].double()
        z = encoder_by_hand(layer, x)
        design = torch.cat([x, torch.ones(len(x), 1)], 1) if bias == "keep" else x
        solution = torch.linalg.lstsq(design, z, driver="gelsd", rcond=1e-7).solution
        B = layer.fvae_lora_B["default"].weight.double().detach()
        update, fitted = z @ B.mT, design @ solution @ B.mT
        error = (fitted - update).norm() / update.norm()
        assert report.errors[name] == pytest.approx(float(error), rel=1e-4)
        assert report.tokens[name] == int(attended.sum())

        key = f"base_model.model.{name}"
        written = x @ state[f"{key}.lora_A.weight"].double().mT @ state[f"{key}.lora_B.weight"].double().mT
        if bias == "keep":
            written = written + state[f"{key}.lora_B.bias"].double()
        torch.testing.assert_close(written, 6.0 / 4 * fitted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", ["keep", "fold"])
def test_keys_shapes_and_config_are_those_of_a_lora(tmp_path: Path, bias: str) -> None:
    base = with_real_layer_norms(tiny_bert())
    model = adapted(base, **LINEAR, rank_pattern={"value": 2}, alpha_pattern={"value": 5.0})
    convert_to_lora(model, tmp_path / "lora", batches(base), bias=bias)
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    layer = "base_model.model.bert.encoder.layer.{}.attention.self.{}.lora_{}"
    expected = {}
    for i in range(2):
        for part in ("query", "value"):
            expected[layer.format(i, part, "A.weight")] = (4, 16)
            expected[layer.format(i, part, "B.weight")] = (16, 4)
            if bias == "keep":
                expected[layer.format(i, part, "B.bias")] = (16,)
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert all(value.dtype == torch.float32 for value in state.values())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"]) == (4, 4, "none", None)
    assert not any(config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
    assert config["lora_bias"] == (bias == "keep")
    assert set(config["target_modules"]) == {"query", "value"}
    assert all(SERVERS_TAKE.fullmatch(key) for key in state) == (bias == "fold")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_readme_names_errors_and_scores(tmp_path: Path) -> None:
    base = tiny_vit()
    model = adapted(base)
    seen: list[float] = []

    def evaluate(scored: PeftModel) -> dict[str, float]:
        assert scored is model
        assert not torch.is_grad_enabled()
        seen.append(float(evaluated(scored, base).mean()))
        return {"accuracy": seen[-1]}

    report = convert_to_lora(model, tmp_path / "lora", batches(base), max_error=1.0, evaluate=evaluate)
    readme = (tmp_path / "lora" / "README.md").read_text()
    assert readme == str(report)
    assert (report.before, report.after) == ({"accuracy": seen[0]}, {"accuracy": seen[1]})
    assert seen[0] != seen[1]
    assert f"| accuracy | {seen[0]:.6g} | {seen[1]:.6g} | {seen[1] - seen[0]:+.3g} |" in readme
    for name, error in report.errors.items():
        assert f"| `{name}` | {report.tokens[name]} | {error:.2e} |" in readme
    assert len(report.errors) == 4
    without = convert_to_lora(model, tmp_path / "other", batches(base), max_error=1.0)
    assert "not measured" in str(without)
    assert "vLLM" in str(without)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    base = tiny_vit()
    model = adapted(base, modules_to_save=["classifier"]).train()
    model.base_model.model.vit.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    config = copy.deepcopy(model.peft_config["default"])
    for max_error, ends in ((1.0, nullcontext()), (0.0, pytest.raises(ValueError, match="max_error"))):
        with ends:
            folder = tmp_path / str(max_error)
            convert_to_lora(model, folder, batches(base), max_error=max_error, evaluate=lambda model: {})
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
        assert model.peft_config["default"] == config
        torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
        assert all(not layer._forward_pre_hooks for layer in model.modules() if isinstance(layer, FVAELoraLayer))


def test_a_fit_above_the_error_allowed_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = tiny_llama()  # an RMSNorm: no linear function of its output is constant
    model = adapted(base, **LINEAR)
    report = convert_to_lora(model, tmp_path / "lora", batches(base), bias="fold", max_error=1.0)
    worst = max(report.errors.values())
    assert 0.01 < worst < 1
    with pytest.raises(ValueError, match=r"^max_error: the linear fit of model\.layers.* 0\.\d+"):
        convert_to_lora(model, tmp_path / "refused", batches(base), bias="fold", max_error=worst * 0.99)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_half_precision_adapter_is_measured_as_it_is_written(tmp_path: Path) -> None:
    base = with_real_layer_norms(tiny_bert())
    model = adapted(base, **LINEAR).to(torch.bfloat16)
    report = convert_to_lora(model, tmp_path / "lora", batches(base), bias="fold")
    assert 1e-4 < max(report.errors.values()) < 0.1
    state = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


def test_a_named_adapter_among_several_is_converted(tmp_path: Path) -> None:
    base = tiny_bert()
    model = adapted(base)
    model.add_adapter("other", FVAELoraConfig(r=2, target_modules=["key"], decoder_hidden_dims=[8], **LINEAR))
    randomised(model)
    convert_to_lora(model, tmp_path / "lora", adapter_name="other")
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(evaluated(loaded, base), evaluated(model, base))
    with pytest.raises(ValueError, match=r"^adapter_name: make 'default' the only active adapter"):
        convert_to_lora(model, tmp_path / "more", batches(base))


def test_what_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    base = tiny_bert()
    model, linear = adapted(base), adapted(base, **LINEAR)

    def refused(match: str, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            convert_to_lora(model, tmp_path / "lora", *args, **kwargs)
        assert "\n" not in str(caught.value)

    refused("^adapter_name: .*'other'", model, adapter_name="other")
    refused("^adapter_name", model.get_base_model())
    refused("^bias: must be one of keep, fold", model, bias="drop")
    refused("^max_error", model, max_error=float("nan"))
    refused("^calibration: must be given where an encoder has a ReLU", model)
    refused("^calibration: must be given where a bias is folded", linear, bias="fold")
    refused("^calibration: 0 tokens are too few", model, [])
    refused("^calibration: 20 tokens .* 16 features; at least 160", adapted(tiny_vit()), batches(tiny_vit(), 4, 1))
    refused("^sample_at_inference", adapted(base, sample_at_inference=True))
    if PEFT_SAVES_BIASES:
        refused("^bias: .*'all'.* keep", adapted(base, bias="all"), batches(base), bias="fold")
    linear.merge_adapter()
    refused("is merged; call model.unmerge_adapter", linear)
    convolution = FVAELoraConfig(target_modules=["0"], encoder_hidden_dims=[])
    refused("^0 is a convolution", get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), convolution))
    assert not (tmp_path / "lora").exists()

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^folder: .* not empty"):
        convert_to_lora(adapted_linear(encoder_hidden_dims=[]), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
