"""Frozen blocks that are computed once: the same run, for less."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPConfig, CLIPForImageClassification, CLIPImageProcessor, CLIPVisionConfig

from finished_runs import events
from fvae_lora_experiments.errors import RunError, UserError
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.schema import Recipe

LAST = {"adapter": {"layers": [1]}}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["lora", "fvae-lora", "linear-probe", "dora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_cached_states_is_the_run_without(
    make_recipe: Callable[..., Recipe], tmp_path: Path, method: str, precision: str
) -> None:
    train = {"learning_rate": 0.02, "precision": precision}
    plain = run_recipe(make_recipe(method=method, train=train, **LAST), tmp_path / "plain", quiet=True)
    cached = make_recipe(method=method, train=train | {"cache_frozen": True}, **LAST)
    record = run_recipe(cached, tmp_path / "cached", quiet=True)
    assert events(tmp_path / "cached") == events(tmp_path / "plain")
    assert record.metrics == plain.metrics
    assert record.parameters == plain.parameters
    assert record.flops.train_step < plain.flops.train_step
    assert evaluate(tmp_path / "cached", quiet=True) == record.metrics.test


def test_the_next_run_finds_the_states_on_disk(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_recipe(make_recipe(train={"cache_frozen": True}, **LAST), tmp_path / "first", quiet=True)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.safetensors")}
    assert len(files) == 3
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or original(*a, **k))
    run_recipe(
        make_recipe(method="fvae-lora", seed=2, train={"cache_frozen": True}, **LAST), tmp_path / "second", quiet=True
    )
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.safetensors")} == files
    # the fingerprint looks at every image once; beside that only the first of a split is opened, for its shape
    assert len(opened) < 2 * 28


def test_other_data_settings_have_other_states(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    for share in (0.2, 0.3):
        data = {"validation_share": share}
        run_recipe(make_recipe(data=data, train={"cache_frozen": True}, **LAST), tmp_path / f"{share}", quiet=True)
    sizes = [json.loads((tmp_path / f"{s}" / "run.json").read_text())["dataset"]["splits"]["train"] for s in (0.2, 0.3)]
    assert sizes[0] > sizes[1]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 6


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "the first block is trained; set adapter.layers"),
        ({"method": "full"}, "the first block is trained; set adapter.layers"),
        (LAST | {"image": {"augmentation": ["horizontal_flip"]}}, "set image.augmentation="),
    ],
)
def test_what_cannot_be_cached_is_refused_in_one_line(
    make_recipe: Callable[..., Recipe], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises((UserError, RunError), match=f"train.cache_frozen: .*{reason}"):
        run_recipe(make_recipe(train={"cache_frozen": True}, **changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_only_the_named_layers_are_adapted(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run_recipe(make_recipe(method="fvae-lora", **LAST), tmp_path / "run", quiet=True)
    lines = events(tmp_path / "run")
    assert all(".1." in layer for line in lines for layer in line.get("elbo", {}))


def test_a_number_of_training_rows_keeps_the_classes_shares_and_the_other_splits(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    halves = {"validation_share": 0.5}
    whole = run_recipe(make_recipe(data=halves), tmp_path / "whole", quiet=True).dataset.splits
    rows = halves | {"train_rows": 8, "validation_rows": 6}
    part = run_recipe(make_recipe(data=rows), tmp_path / "part", quiet=True).dataset.splits
    assert part == whole | {"train": 8, "validation": 6}


@pytest.mark.parametrize("architecture", ["vit", "clip"])
def test_an_image_size_of_ones_own(
    make_recipe: Callable[..., Recipe], vit: Path, tmp_path: Path, architecture: str
) -> None:
    model = vit
    if architecture == "clip":  # its classifier takes the option without naming it
        model = tmp_path / "clip"
        widths = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        vision = CLIPVisionConfig(image_size=8, patch_size=4, **widths)
        CLIPForImageClassification(CLIPConfig(vision_config=vision.to_dict())).save_pretrained(model)
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(model)
    small = run_recipe(make_recipe(model=str(model)), tmp_path / "small", quiet=True)
    large = run_recipe(make_recipe(model=str(model), image={"size": 16}), tmp_path / "large", quiet=True)
    assert large.flops.train_step > 2 * small.flops.train_step
    assert evaluate(tmp_path / "large", quiet=True) == large.metrics.test
