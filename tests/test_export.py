"""The adapter for inference: small, loaded by stock peft, and the same outputs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, PreTrainedModel

from fvae_lora import FVAELoraConfig, export_for_inference, load_reference_adapter
from tiny import BUILDERS, TARGETS, adapted_linear, batch_for, evaluated, randomised, tiny_bert, tiny_llama

TRAINING_ONLY = ("encoder2", "fvae_lora_vae.decoder_", "log_tau", "logvar")


def adapted(base: PreTrainedModel, **fields: object) -> PeftModel:
    fields = {"r": 4, "decoder_hidden_dims": [8], "target_modules": TARGETS[base.config.model_type]} | fields
    return randomised(get_peft_model(copy.deepcopy(base), FVAELoraConfig(**fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shared_encoder_trunk": False, "encoder_hidden_dims": [6, 5]},
        {"encoder_hidden_dims": []},
        {"residual_dim": 2, "lora_alpha": 8.0},
        {"elbo_weight": 0.0},
        {"objective": "vae2lat", "lora_dropout": 0.1},
        {"rank_pattern": {r"layer\.1\..*value": 2}},
    ],
    ids=["default", "deep", "linear", "other sizes", "no ELBO", "dropout", "ranks"],
)
def test_the_exported_adapter_has_the_same_outputs(tmp_path: Path, fields: dict[str, object]) -> None:
    base = tiny_bert()
    model = adapted(base, **fields)
    export_for_inference(model, tmp_path / "small")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    torch.testing.assert_close(evaluated(loaded, base), evaluated(model, base), rtol=0, atol=0)


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_architecture_can_be_exported(tmp_path: Path, kind: str) -> None:
    base = BUILDERS[kind]()
    model = adapted(base)
    export_for_inference(model, tmp_path / "small")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    torch.testing.assert_close(evaluated(loaded, base), evaluated(model, base), rtol=0, atol=0)


def test_it_holds_encoder_1s_mean_and_b_alone(tmp_path: Path) -> None:
    model = adapted(tiny_bert(), modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "full")
    export_for_inference(model, tmp_path / "small")
    full = load_file(tmp_path / "full" / "adapter_model.safetensors")
    small = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert set(small) < set(full)
    assert not [key for key in small if any(part in key for part in TRAINING_ONLY)]
    assert set(full) - set(small) == {key for key in full if any(part in key for part in TRAINING_ONLY)}
    assert [key for key in small if "classifier" in key]
    per_layer = (4 * 16 + 4) + (4 * 4 + 4) + 16 * 4
    assert sum(value.numel() for value in small.values()) == 4 * per_layer + 3 * 16 + 3


def test_the_exporting_model_is_left_as_it_was(tmp_path: Path) -> None:
    base = tiny_bert()
    model = adapted(base).train()
    config = copy.deepcopy(model.peft_config["default"])
    export_for_inference(model, tmp_path / "small")
    assert model.training
    assert model.peft_config["default"] == config
    assert torch.isfinite(model(**batch_for(base)).loss)
    assert any(p.requires_grad for p in model.parameters())


def test_the_loaded_adapter_is_frozen_and_cannot_train(tmp_path: Path) -> None:
    base = tiny_bert()
    export_for_inference(adapted(base), tmp_path / "small")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    assert loaded.peft_config["default"].inference_only
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(RuntimeError, match="inference_only"):
        loaded.train()(**batch_for(base))
    with pytest.raises(ValueError, match="inference_only"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small", is_trainable=True)
    with pytest.raises(ValueError, match="inference_only"):
        get_peft_model(copy.deepcopy(base), FVAELoraConfig(inference_only=True, target_modules=["query"]))


def test_it_can_be_saved_again_and_merged_where_the_encoder_is_linear(tmp_path: Path) -> None:
    base = tiny_bert()
    model = adapted(base, encoder_hidden_dims=[])
    export_for_inference(model, tmp_path / "small")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    torch.testing.assert_close(evaluated(again, base), evaluated(model, base), rtol=0, atol=0)
    merged = again.merge_and_unload()
    torch.testing.assert_close(evaluated(merged, base), evaluated(model, base))


def test_auto_classes_find_the_base_model(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    for task_type in ("CAUSAL_LM", None):
        model = adapted(base, task_type=task_type)
        export_for_inference(model, tmp_path / f"small-{task_type}")
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"small-{task_type}")
        torch.testing.assert_close(evaluated(loaded, base), evaluated(model, base))


def test_a_named_adapter_among_several_is_exported(tmp_path: Path) -> None:
    base = tiny_bert()
    model = adapted(base)
    model.add_adapter("other", FVAELoraConfig(r=2, target_modules=["key"], decoder_hidden_dims=[8]))
    randomised(model)
    export_for_inference(model, tmp_path / "small", adapter_name="other")
    model.set_adapter("other")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    torch.testing.assert_close(evaluated(loaded, base), evaluated(model, base))


def test_a_reference_adapter_can_be_exported(tmp_path: Path, golden: Path) -> None:
    case = golden / "tiny_bert"
    base = BertForSequenceClassification.from_pretrained(case / "base_model")
    model = load_reference_adapter(copy.deepcopy(base), case / "adapter")
    export_for_inference(model, tmp_path / "small")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    torch.testing.assert_close(evaluated(loaded, base), evaluated(model, base), rtol=0, atol=0)


def test_the_folder_says_how_to_load_it(tmp_path: Path) -> None:
    export_for_inference(adapted(tiny_bert()), tmp_path / "small")
    assert "import fvae_lora" in (tmp_path / "small" / "README.md").read_text()
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["peft_type"] == "FVAE_LORA"


def test_an_unfinished_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(FVAELoraConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        export_for_inference(adapted(tiny_bert()), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prepare", [Path.mkdir, lambda path: path.parent.joinpath("elsewhere").mkdir()])
def test_an_empty_or_missing_folder_will_do(tmp_path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(tmp_path / "small")
    export_for_inference(adapted(tiny_bert()), tmp_path / "small")
    assert (tmp_path / "small" / "adapter_model.safetensors").is_file()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"^folder: "):
            export_for_inference(adapted(tiny_bert()), target)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = adapted(tiny_bert())
    with pytest.raises(ValueError, match=r"adapter_name: .*'other'"):
        export_for_inference(model, tmp_path / "small", adapter_name="other")
    with pytest.raises(ValueError, match="adapter_name"):
        export_for_inference(model.get_base_model(), tmp_path / "small")
    with pytest.raises(ValueError, match=r"^sample_at_inference"):
        export_for_inference(adapted_linear(sample_at_inference=True), tmp_path / "small")
    assert not (tmp_path / "small").exists()
