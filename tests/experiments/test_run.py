"""One run, end to end, and what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageClassification

from finished_runs import events
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.schema import Recipe

TERMS = {"reconstruction", "kl_z1", "gamma", "w2"}
HIDDEN, CLASSES, R, LAYERS = 16, 3, 4, 4  # of tiny-vit: query and key of two layers
HEAD = CLASSES * (HIDDEN + 1)


@pytest.mark.parametrize(
    ("method", "trainable", "inference"),
    [
        ("linear-probe", HEAD, HEAD),
        ("lora", HEAD + LAYERS * 2 * R * HIDDEN, HEAD + LAYERS * 2 * R * HIDDEN),
        # at inference: trunk (16 -> 4) and mean head (4 -> 4) of encoder 1, with biases, and B
        ("fvae-lora", None, HEAD + LAYERS * (R * (HIDDEN + 1) + R * (R + 1) + R * HIDDEN)),
        ("full", "all", "all"),
    ],
)
def test_a_run_leaves_a_complete_record(
    make_recipe: Callable[..., Recipe], tmp_path: Path, method: str, trainable: Any, inference: Any, vit: Path
) -> None:
    recipe = make_recipe(method=method, fvae={"decoder_hidden_dims": [8]})
    run_recipe(recipe, tmp_path / "run", quiet=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())

    assert (record["schema"], record["state"], record["reason"]) == (1, "complete", None)
    assert (record["task"], record["method"], record["seed"]) == ("image", method, 1)
    assert record["model"]["name"] == "tiny-vit"
    data = record["dataset"]
    assert (data["name"], data["protocol"], data["classes"]) == ("colours", "clean", ["blue", "green", "red"])
    assert data["splits"] == {"train": 27, "validation": 3, "test": 12}
    assert data["validation_from"] == "0.1 of train, stratified, split seed 0"
    assert data["test_from"] == "the official test split"
    for fingerprint in (data["fingerprint"], record["model"]["fingerprint"]):
        assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert record["recipe"] | {"model": 0, "dataset": 0} == recipe.model_dump() | {"model": 0, "dataset": 0}

    base = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(vit, num_labels=CLASSES))
    everything = sum(p.numel() for p in base.parameters())
    counts = record["parameters"]
    assert counts["total"] == everything
    assert counts["inference"] == (everything if inference == "all" else inference)
    if trainable is not None:
        assert counts["trainable"] == (everything if trainable == "all" else trainable)
    else:
        assert counts["trainable"] > counts["inference"]

    assert {"python", "torch", "transformers", "peft", "fvae-lora"} <= record["versions"].keys()
    assert {"device", "cpu", "cores", "threads"} <= record["hardware"].keys()
    assert record["time"]["wall_s"] > record["time"]["train_s"] > 0
    assert record["memory"]["peak_mb"] > 50
    assert record["flops"]["train_total"] == 8 * record["flops"]["train_step"] > 8 * record["flops"]["eval_batch"] > 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_learning_curve_has_a_line_for_each_event(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    record = run_recipe(make_recipe(method="fvae-lora"), tmp_path, quiet=True)
    lines = events(tmp_path)
    assert [(e["event"], e["step"]) for e in lines] == [
        ("train", 2), ("train", 4), ("validation", 4), ("train", 6), ("train", 8), ("validation", 8), ("test", 8),
    ]  # fmt: skip
    for line in lines:
        assert line["epoch"] == line["step"] / 4
        if line["event"] == "train":
            assert {"loss", "learning_rate", "grad_norm", "elbo"} < line.keys()
            assert len(line["elbo"]) == LAYERS
            assert all(terms.keys() == TERMS for terms in line["elbo"].values())
        else:
            assert {"loss", "accuracy"} < line.keys()
    assert {k: lines[-1][k] for k in ("loss", "accuracy")} == record.metrics.test


def test_a_method_without_an_elbo_records_none(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run_recipe(make_recipe(), tmp_path, quiet=True)
    assert not any("elbo" in event for event in events(tmp_path))


def test_the_best_epoch_is_the_one_that_is_kept(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(method="full", train={"epochs": 6, "batch_size": 4, "learning_rate": 0.02})
    record = run_recipe(recipe, tmp_path, quiet=True)
    validation = [event for event in events(tmp_path) if event["event"] == "validation"]
    best = max(validation, key=lambda event: event["accuracy"])  # of equals the first
    found = record.metrics.validation
    assert found == {"accuracy": best["accuracy"], "loss": best["loss"], "best_epoch": round(best["epoch"])}
    assert best is not validation[-1], "the last epoch is the best: this test cannot tell"
    scores = evaluate(tmp_path, quiet=True)
    assert scores == record.metrics.test


@pytest.mark.parametrize("method", ["fvae-lora", "lora", "linear-probe", "full"])
def test_the_adapter_alone_gives_the_recorded_figure(
    make_recipe: Callable[..., Recipe], cli: Callable[..., tuple[int, str, str]], tmp_path: Path, method: str
) -> None:
    recipe = make_recipe(method=method, train={"learning_rate": 0.05})
    record = run_recipe(recipe, tmp_path, quiet=True)
    assert evaluate(tmp_path, quiet=True) == record.metrics.test
    code, out, _ = cli("evaluate", tmp_path)
    assert code == 0
    figure = f"{record.metrics.test['loss']:.6f}"
    assert out.count(figure) == 2
    for file in (tmp_path / "adapter").iterdir():
        assert file.suffix in (".safetensors", ".json", ".md")


def test_the_adapter_is_a_peft_adapter(make_recipe: Callable[..., Recipe], tmp_path: Path, vit: Path) -> None:
    run_recipe(make_recipe(method="fvae-lora"), tmp_path, quiet=True)
    base = AutoModelForImageClassification.from_pretrained(vit, num_labels=3, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert model.peft_config["default"].base_model_name_or_path == "tiny-vit"
    assert model(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 3)


def test_a_run_that_is_complete_is_only_read(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    record = run_recipe(make_recipe(), tmp_path, quiet=True)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file() and file.name != ".lock"}
    assert run_recipe(make_recipe(), tmp_path, quiet=True) == record
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_recipe(make_recipe(method="fvae-lora", seed=seed), tmp_path / name, quiet=True)
    assert events(tmp_path / "a") == events(tmp_path / "b")
    assert events(tmp_path / "a") != events(tmp_path / "c")


def test_a_head_for_other_classes_is_not_taken_over(tmp_path: Path, vit: Path) -> None:
    from fvae_lora_experiments.models.pretrained import load_classifier

    pretrained = AutoModelForImageClassification.from_pretrained(vit).classifier.weight
    same, _ = load_classifier(str(vit), AutoModelForImageClassification, ["LABEL_0", "LABEL_1"])
    other, _ = load_classifier(str(vit), AutoModelForImageClassification, ["cat", "dog"])
    assert torch.equal(same.classifier.weight, pretrained)
    assert not torch.equal(other.classifier.weight, pretrained)
    assert other.config.id2label == {0: "cat", 1: "dog"}


def test_patience_ends_training(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # At this learning rate nothing is learnt: the first epoch stays the best.
    recipe = make_recipe(train={"epochs": 9, "learning_rate": 1e-9, "patience": 2})
    run_recipe(recipe, tmp_path, quiet=True)
    assert [e["epoch"] for e in events(tmp_path) if e["event"] == "validation"] == [1, 2, 3]


def test_a_run_whose_model_and_data_have_moved_is_scored_where_they_are_now(
    make_recipe: Callable[..., Recipe], tmp_path: Path, vit: Path, pictures: Path
) -> None:
    for place, what in ((tmp_path / "m" / "tiny-vit", vit), (tmp_path / "d", pictures)):
        shutil.copytree(what, place)
    recipe = make_recipe(model=str(tmp_path / "m" / "tiny-vit"), dataset=str(tmp_path / "d"))
    record = run_recipe(recipe, tmp_path / "run", quiet=True)
    assert (record.recipe["model"], record.recipe["dataset"]) == ("../m/tiny-vit", "../d")
    for name in ("run", "m", "d"):  # moved together, a run still finds them
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert evaluate(tmp_path / "moved" / "run", quiet=True) == record.metrics.test
    (tmp_path / "moved" / "d").rename(tmp_path / "data")
    with pytest.raises(UserError, match="no such file or folder"):
        evaluate(tmp_path / "moved" / "run", quiet=True)
    assert evaluate(tmp_path / "moved" / "run", dataset=str(tmp_path / "data"), quiet=True) == record.metrics.test
