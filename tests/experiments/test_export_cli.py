"""`export` and `import-reference`: adapters that leave a run, and those that come from the reference."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from fvae_lora import FVAELoraConfig, export_for_inference, load_reference_adapter
from fvae_lora_experiments.recipe import check_recipe
from fvae_lora_experiments.run.runner import run_recipe
from tiny import randomised

Cli = Callable[..., tuple[int, str, str]]
PIXELS = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small patches, so that few pictures have many tokens."""
    folder = tmp_path_factory.mktemp("models") / "fine-vit"
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**config, image_size=8, patch_size=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(vit: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the method."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = {"model": str(vit), "dataset": str(pictures), "method": "fvae-lora", "adapter": {"r": 4}}
    train = {"epochs": 1, "batch_size": 9, "learning_rate": 0.05}
    run_recipe(
        check_recipe(recipe | {"train": train, "fvae": {"decoder_hidden_dims": [8]}}, "test"), folder, quiet=True
    )
    return folder


@torch.no_grad()
def logits(vit: Path, adapter: Path) -> torch.Tensor:
    base = AutoModelForImageClassification.from_pretrained(vit, num_labels=3, ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(base, adapter).eval()(PIXELS).logits


def test_a_run_is_exported_for_inference(cli: Cli, finished: Path, vit: Path, tmp_path: Path) -> None:
    code, out, err = cli("export", finished, "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert str(tmp_path / "small") in out.replace("\n", "")
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["inference_only"]
    sizes = [(d / "adapter_model.safetensors").stat().st_size for d in (tmp_path / "small", finished / "adapter")]
    assert sizes[0] < sizes[1]
    torch.testing.assert_close(logits(vit, tmp_path / "small"), logits(vit, finished / "adapter"), rtol=0, atol=0)

    # The adapter's own folder will do, with the place of its base model.
    alone = shutil.copytree(finished / "adapter", tmp_path / "alone")
    assert cli("export", alone, "--out", tmp_path / "again", "--model", vit)[0] == 0
    torch.testing.assert_close(logits(vit, tmp_path / "again"), logits(vit, alone), rtol=0, atol=0)


def test_a_run_becomes_a_lora_and_says_what_that_costs(cli: Cli, finished: Path, vit: Path, tmp_path: Path) -> None:
    arguments = ("export", finished, "--format", "lora", "--bias", "fold")
    code, out, err = cli(*arguments, "--max-error", "10", "--out", tmp_path / "lora")
    assert (code, err) == (0, "")
    validation = json.loads((finished / "run.json").read_text())["metrics"]["validation"]
    readme = (tmp_path / "lora" / "README.md").read_text()
    assert out.startswith(readme)
    for name, key in (("validation_accuracy", "accuracy"), ("validation_loss", "loss")):
        assert f"| {name} | {validation[key]:.6g} |" in readme
    assert len(re.findall(r"\| `vit.*_proj` \| 459 \| ", readme)) == 2
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert logits(vit, tmp_path / "lora").isfinite().all()

    for more, match in ((("--rows", "3"), "--rows: 51 tokens are too few"), ((), "--max-error: the linear fit")):
        code, out, err = cli(*arguments, *more, "--max-error", "0", "--out", tmp_path / "refused")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"fvae-lora: {match}")
    assert not (tmp_path / "refused").exists()


def test_a_linear_encoder_becomes_a_lora_without_data(cli: Cli, vit: Path, tmp_path: Path) -> None:
    base = ViTForImageClassification.from_pretrained(vit, num_labels=3, ignore_mismatched_sizes=True)
    config = FVAELoraConfig(r=4, target_modules=["q_proj"], encoder_hidden_dims=[], modules_to_save=["classifier"])
    randomised(get_peft_model(base, config)).save_pretrained(tmp_path / "adapter")
    code, out, err = cli("export", tmp_path / "adapter", "--format", "lora", "--out", tmp_path / "lora")
    assert (code, err) == (0, "")
    assert "up to rounding" in out
    torch.testing.assert_close(logits(vit, tmp_path / "lora"), logits(vit, tmp_path / "adapter"), rtol=0, atol=1e-6)


def test_what_is_no_adapter_is_refused_in_one_line(cli: Cli, finished: Path, vit: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    lora = get_peft_model(ViTForImageClassification.from_pretrained(vit), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    shutil.copytree(finished / "adapter", tmp_path / "alone")

    def refused(match: str, *arguments: Any) -> None:
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(f"fvae-lora: {match}.*\n", err), err

    refused(".*/empty: neither a run", "export", tmp_path / "empty", "--out", tmp_path / "x")
    refused(".*/lora: an adapter of type LORA", "export", tmp_path / "lora", "--out", tmp_path / "x")
    refused("--out: .*/full exists", "export", finished, "--out", tmp_path / "full")
    refused("model .*/nowhere: no such", "export", finished, "--out", tmp_path / "x", "--model", tmp_path / "nowhere")
    alone = ("export", tmp_path / "alone", "--out", tmp_path / "x", "--model", vit, "--format", "lora")
    refused(".*/alone: only an adapter; its encoders must be fitted", *alone)
    refused("", "export", finished, "--out", tmp_path / "x", "--format", "onnx")
    assert not (tmp_path / "x").exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_bert"])
def test_a_reference_adapter_is_imported(cli: Cli, golden: Path, tmp_path: Path, kind: str) -> None:
    case = golden / kind
    code, out, err = cli("import-reference", case / "adapter", "--model", case / "base_model", "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "The adapter is in" in out
    base_class = {"tiny_vit": "ViTForImageClassification", "tiny_bert": "BertForSequenceClassification"}[kind]
    base = getattr(__import__("transformers"), base_class)
    expected = load_reference_adapter(base.from_pretrained(case / "base_model"), case / "adapter")
    found = PeftModel.from_pretrained(base.from_pretrained(case / "base_model"), tmp_path / "a")
    assert found.peft_config["default"].peft_type == "FVAE_LORA"
    for key, value in get_peft_model_state_dict(expected).items():
        torch.testing.assert_close(get_peft_model_state_dict(found)[key], value, rtol=0, atol=0)
    assert found.peft_config["default"].task_weight == 1000


def test_reference_adapters_that_are_not_supported_are_refused(cli: Cli, golden: Path, tmp_path: Path) -> None:
    case = golden / "tiny_vit"
    fields = json.loads((case / "adapter" / "adapter_config.json").read_text())

    def refused(match: str, **changes: Any) -> None:
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case / "adapter", folder)
        (folder / "adapter_config.json").write_text(json.dumps(fields | changes))
        code, out, err = cli("import-reference", folder, "--model", case / "base_model", "--out", tmp_path / "out")
        assert (code, out) == (2, "")
        assert re.fullmatch(f"fvae-lora: .*{match}.*\n", err), err
        assert not (tmp_path / "out").exists()

    for mode in ("force_classical_ae", "force_classical_vae", "force_minhyp", "force_test_vae"):
        refused(f"{mode} must be False", **{mode: True})
    refused("num_of_z_sampled must be 1", num_of_z_sampled=2)
    refused("peft_type 'LORA'", peft_type="LORA")
    refused("no model class os", auto_mapping={"base_model_class": "os", "parent_library": "os"})
    refused("FVAEPEFTConfig has no field surprise", surprise=1)
    weights = load_file(case / "adapter" / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "lora_B" not in k}, tmp_path / "weights")
    shutil.copytree(case / "adapter", tmp_path / "cut")
    (tmp_path / "weights").replace(tmp_path / "cut" / "adapter_model.safetensors")
    code, _, err = cli("import-reference", tmp_path / "cut", "--model", case / "base_model", "--out", tmp_path / "out")
    assert code == 2
    assert "it lacks" in err


def test_a_folder_that_is_none_of_the_reference_s_is_said_to_be_so(
    cli: Cli, golden: Path, finished: Path, tmp_path: Path
) -> None:
    expected = "expected the folder of an adapter that the reference implementation saved\n"
    for folder, says in (
        (tmp_path / "none", "no such folder; " + expected),
        (tmp_path, "holds no adapter_config.json; " + expected),
        (finished, "holds no adapter_config.json; " + expected),
        (golden / "tiny_vit" / "base_model", "holds no adapter_config.json; " + expected),
    ):
        model = golden / "tiny_vit" / "base_model"
        code, _, err = cli("import-reference", folder, "--model", model, "--out", tmp_path / "out")
        assert (code, err) == (2, f"fvae-lora: {folder}: {says}")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    adapter, model = golden / "tiny_vit" / "adapter", golden / "tiny_vit" / "base_model"
    code, _, err = cli("import-reference", adapter, "--model", model, "--out", full)
    assert (code, err) == (2, f"fvae-lora: --out: {full} exists and is not empty\n")


def test_the_exported_adapter_is_as_small_as_a_lora_of_the_same_rank(tmp_path: Path) -> None:
    """ViT-B/16, query and key, r 16: one layer stands for twelve, the rest of the model for itself."""
    base = ViTConfig(num_hidden_layers=1, image_size=16)
    sizes = {}
    for config in (
        FVAELoraConfig(r=16, target_modules=["q_proj", "k_proj"]),
        LoraConfig(r=16, target_modules=["q_proj", "k_proj"]),
    ):
        with torch.device("meta"):
            vit: nn.Module = ViTForImageClassification(base)
        model = get_peft_model(vit, config)
        model.to_empty(device="cpu")
        if isinstance(config, FVAELoraConfig):
            export_for_inference(model, tmp_path / "adapter")
        else:
            model.save_pretrained(tmp_path / "lora")
    for name in ("adapter", "lora"):
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        sizes[name] = sum(value.numel() * value.element_size() for value in weights.values())
    d, r = 768, 16
    assert sizes["lora"] == 4 * 2 * (2 * r * d)
    assert sizes["adapter"] == 4 * 2 * (2 * r * d + r + r * r + r)
    assert 1.011 < sizes["adapter"] / sizes["lora"] < 1.013
    files = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("adapter", "lora")]
    assert files[0] / files[1] < 1.05
