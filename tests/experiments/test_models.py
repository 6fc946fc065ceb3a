"""Any image classifier: heads, batch norms and module names differ, a run's promises do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForImageClassification, PreTrainedConfig, ViTImageProcessor

from fvae_lora_experiments.models.heads import head_modules
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.schema import Recipe

SIDE = 16
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PATCHES = WIDTHS | {"image_size": SIDE, "patch_size": 8}

CONFIGS: dict[str, tuple[PreTrainedConfig, str]] = {
    "deit": (transformers.DeiTConfig(**PATCHES, architectures=["DeiTForImageClassification"]), "fvae-lora"),
    "beit": (transformers.BeitConfig(**PATCHES), "lora"),
    "dinov2": (transformers.Dinov2Config(**WIDTHS, image_size=SIDE, patch_size=8), "fvae-lora"),
    "swin": (
        transformers.SwinConfig(
            image_size=SIDE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
        ),
        "fvae-lora",
    ),
    "convnext": (transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]), "linear-probe"),
    "resnet": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"),
        "linear-probe",
    ),
    "mobilenet": (transformers.MobileNetV2Config(depth_multiplier=0.1, image_size=32), "full"),
    "siglip": (transformers.SiglipConfig(vision_config=PATCHES, text_config=WIDTHS | {"vocab_size": 9}), "lora"),
    "clip": (transformers.CLIPConfig(vision_config=PATCHES, text_config=WIDTHS | {"vocab_size": 9}), "fvae-lora"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_and_its_adapter_agree(make_recipe: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    config, method = CONFIGS[name]
    side = 32 if name in ("mobilenet", "convnext") else SIDE
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / name)
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / name)
    recipe = make_recipe(model=str(tmp_path / name), method=method, train={"epochs": 1, "learning_rate": 0.01})
    record = run_recipe(recipe, tmp_path / "run", quiet=True)
    assert evaluate(tmp_path / "run", quiet=True) == record.metrics.test
    validation = record.metrics.validation
    assert validation["best_epoch"] == 1


def test_a_frozen_batch_norm_keeps_its_statistics(make_recipe: Callable[..., Recipe]) -> None:
    from fvae_lora_experiments.methods import METHODS

    model = AutoModelForImageClassification.from_config(CONFIGS["resnet"][0])
    adapted = METHODS["linear-probe"].apply(model, make_recipe(method="linear-probe"))
    before = {name: value.clone() for name, value in adapted.named_buffers()}
    assert before
    adapted.train()
    adapted(torch.randn(4, 3, SIDE, SIDE))
    assert all(torch.equal(value, before[name]) for name, value in adapted.named_buffers())
    assert next(m for m in adapted.modules() if "classifier" in type(m).__name__.lower() or m is adapted).training


def test_a_head_is_everything_beside_the_backbone() -> None:
    assert head_modules(AutoModelForImageClassification.from_config(CONFIGS["deit"][0])) == ["classifier"]
    assert head_modules(AutoModelForImageClassification.from_config(CONFIGS["resnet"][0])) == ["classifier"]
