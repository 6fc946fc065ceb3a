"""The methods: each trains, is saved, and scores the same when it is loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraModel, PeftModel
from transformers import AutoModelForImageClassification

from arguments import later_wins
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.models.targets import adapted_modules
from fvae_lora_experiments.recipe import check_recipe, load_recipe
from fvae_lora_experiments.run.adalora import orthogonality
from fvae_lora_experiments.run.finished import read_finished_run
from fvae_lora_experiments.run.runner import evaluate, open_base, open_data, run_recipe, scoring_trainer
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task

HIDDEN, CLASSES, R, LAYERS = 16, 3, 4, 4  # of tiny-vit: query and key of two layers
HEAD = CLASSES * (HIDDEN + 1)
LORA = LAYERS * 2 * R * HIDDEN
FVAE = LAYERS * (R * (HIDDEN + 1) + R * (R + 1) + R * HIDDEN)

INFERENCE = {
    "fvae-lora": FVAE,
    "fvae-lora-reference": LAYERS * (16 * (HIDDEN + 1) + R * (16 + 1) + R * HIDDEN),
    "vae2lat": FVAE,
    "beta-vae2lat": FVAE,
    "fvae-no-elbo": FVAE,
    "lora": LORA,
    "rslora": LORA,
    "dora": LORA + LAYERS * HIDDEN,
    "pissa": LORA,
    "olora": LORA,
    "hira": LORA,
    "adalora": LAYERS * R * (2 * HIDDEN + 1),
    "vera": LAYERS * (HIDDEN + R),
    "pvera": LAYERS * (HIDDEN + R),
    "linear-probe": 0,
}
TRAINED_MORE = {"fvae-lora", "fvae-lora-reference", "vae2lat", "beta-vae2lat", "fvae-no-elbo", "adalora", "pvera"}


@pytest.fixture
def two_steps(vit: Path, pictures: Path) -> Callable[..., Recipe]:
    """A recipe of two steps: what a method has of its own, and a large learning rate."""

    def make(method: str, *overrides: str) -> Recipe:
        usual = ["train.epochs=1", "train.batch_size=14", "adapter.r=4", "image.augmentation=[]", "adapter.alpha=8"]
        usual += ["train.learning_rate=0.05", "train.warmup_ratio=0"]
        places = {"model": str(vit), "dataset": str(pictures), "method": method}
        return load_recipe("image/default", later_wins([*usual, *overrides]), places)

    return make


def gradients(model: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of a training step, and the gradient of each trained parameter by its name."""
    logits = model.train()(pixel_values=pixels).logits
    logits.square().sum().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_without_noise_relu_start_and_elbo_the_method_is_lora(two_steps: Callable[..., Recipe]) -> None:
    away = ("ablation.noise=false", "ablation.start=lora", "fvae.encoder_hidden_dims=[]", "adapter.dropout=0")
    models = {}
    for method, overrides in (("fvae-no-elbo", away), ("lora", ("adapter.dropout=0",))):
        recipe = two_steps(method, *overrides)
        base, _ = load_task(recipe).load_model(["a", "b", "c"])
        models[method] = METHODS[method].apply(base, recipe)
    ours, lora = models["fvae-no-elbo"], models["lora"]
    assert not any(p.any() for name, p in ours.named_parameters() if ".fvae_lora_B." in name)
    with torch.no_grad():
        random = {name: torch.randn_like(p) for name, p in lora.named_parameters() if ".lora_B." in name}
        for name, p in lora.named_parameters():
            if name in random:
                p.copy_(random[name])
        its = dict(lora.named_parameters())
        for name, p in ours.named_parameters():
            if ".fvae_lora_B." in name:
                p.copy_(its[name.replace("fvae_lora_B", "lora_B")])
            elif name.endswith("encoder1_mean_weight"):
                p.copy_(its[name.replace("fvae_lora_vae.default.encoder1_mean_weight", "lora_A.default.weight")])
            elif name.endswith("encoder1_mean_bias"):
                p.zero_()
            elif name in its:  # the head
                p.copy_(its[name])
    pixels = torch.randn(4, 3, 8, 8)
    (logits, grads), (expected, lora_grads) = gradients(ours, pixels), gradients(lora, pixels)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)  # what is left of the noise
    for name, grad in lora_grads.items():
        name = name.replace("lora_B", "fvae_lora_B")
        name = name.replace("lora_A.default.weight", "fvae_lora_vae.default.encoder1_mean_weight")
        torch.testing.assert_close(grads[name], grad, rtol=1e-2, atol=1e-2 * grad.abs().max().item())


def test_what_an_ablation_takes_away_is_not_trained(two_steps: Callable[..., Recipe], tmp_path: Path) -> None:
    record = run_recipe(two_steps("fvae-lora", "ablation.noise=false"), tmp_path / "run", quiet=True)
    whole = run_recipe(two_steps("fvae-lora"), tmp_path / "whole", quiet=True)
    assert whole.parameters.trainable - record.parameters.trainable == LAYERS * R * (R + 1)
    assert evaluate(tmp_path / "run", quiet=True) == record.metrics.test


def validation_scores(folder: Path) -> dict[str, float]:
    """What the saved adapter, loaded onto the original model, scores on validation."""
    recipe, record = read_finished_run(folder)
    base, processor = open_base(recipe, record)
    rows = load_task(recipe).datasets(open_data(recipe, record), base, processor)["validation"]
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    with scoring_trainer(model, recipe, quiet=True) as trainer:
        return trainer.score(rows, "validation")


@pytest.mark.parametrize("method", INFERENCE)
def test_what_was_trained_is_what_was_saved(two_steps: Callable[..., Recipe], tmp_path: Path, method: str) -> None:
    record = run_recipe(two_steps(method), tmp_path, quiet=True)
    assert evaluate(tmp_path, quiet=True) == record.metrics.test
    in_training = record.metrics.validation
    again = validation_scores(tmp_path)
    assert again["loss"] == pytest.approx(in_training["loss"], rel=1e-4)
    assert again["accuracy"] == in_training["accuracy"]

    counts = record.parameters
    assert counts.inference == HEAD + INFERENCE[method]
    assert (counts.trainable > counts.inference) == (method in TRAINED_MORE)


def test_every_method_is_tried_here() -> None:
    assert {*INFERENCE, "full"} == METHODS.keys()


def test_a_method_is_what_its_name_says_in_every_recipe(two_steps: Callable[..., Recipe]) -> None:
    assert two_steps("pissa").adapter.dropout == 0
    assert two_steps("lora").adapter.dropout == 0.1
    assert [two_steps(m).fvae.kl_weight for m in ("vae2lat", "beta-vae2lat", "fvae-lora")] == [1, 10, 10]
    assert two_steps("beta-vae2lat", "fvae.kl_weight=3").fvae.kl_weight == 3
    with_no_elbo = two_steps("fvae-no-elbo")
    assert with_no_elbo.fvae.elbo_weight == 0


def test_without_an_elbo_there_is_nothing_of_a_vae(two_steps: Callable[..., Recipe], vit: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit)
    adapted = METHODS["fvae-no-elbo"].apply(model, two_steps("fvae-no-elbo"))
    names = [name for name, _ in adapted.named_parameters()]
    assert any("encoder1" in name for name in names)
    assert not any("encoder2" in name or "decoder" in name for name in names)


def test_pissa_begins_at_the_pretrained_model(two_steps: Callable[..., Recipe], vit: Path) -> None:
    pixels = torch.randn(2, 3, 8, 8)
    base = AutoModelForImageClassification.from_pretrained(vit).eval()
    before, weight = base(pixels).logits, base.vit.layers[0].attention.q_proj.weight.clone()
    adapted = METHODS["pissa"].apply(base, two_steps("pissa")).eval()
    torch.testing.assert_close(adapted(pixels).logits, before, rtol=1e-4, atol=1e-5)
    changed = adapted.base_model.model.vit.layers[0].attention.q_proj.base_layer.weight
    assert not torch.allclose(changed, weight), "the first singular values were not taken out of the weights"


def test_adalora_gives_ranks_away_and_keeps_its_factors_orthogonal(
    two_steps: Callable[..., Recipe], tmp_path: Path, vit: Path
) -> None:
    longer = ["train.epochs=5", "train.batch_size=8", "train.learning_rate=0.01"]
    record = run_recipe(two_steps("adalora", *longer), tmp_path / "long", quiet=True)
    assert record.parameters.trainable == HEAD + LAYERS * 6 * (2 * HIDDEN + 1)
    config = json.loads((tmp_path / "long" / "adapter" / "adapter_config.json").read_text())
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (20, 2, 6)
    ranks = sum(sum(kept) for kept in config["rank_pattern"].values())
    assert LAYERS * R <= ranks < LAYERS * 6
    assert record.parameters.inference == HEAD + ranks * (2 * HIDDEN + 1)


def test_adalora_s_regulariser_is_that_of_peft(two_steps: Callable[..., Recipe], vit: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_pretrained(vit)
    adapted = METHODS["adalora"].apply(base, two_steps("adalora", "adapter.dropout=0")).eval()
    batch: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
    tuner = adapted.base_model
    assert isinstance(tuner, AdaLoraModel)
    expected = tuner(**batch).loss - tuner.model(**batch).loss
    torch.testing.assert_close(orthogonality(adapted), expected, rtol=1e-4, atol=1e-5)


def test_adalora_s_regulariser_counts_once_a_step(two_steps: Callable[..., Recipe], tmp_path: Path) -> None:
    def first_norm(*overrides: str) -> float:
        folder = tmp_path / "-".join(overrides)
        run_recipe(two_steps("adalora", "adapter.dropout=0", "train.log_every=1", *overrides), folder, quiet=True)
        lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
        norm: float = next(lines)["grad_norm"]
        return norm

    whole = first_norm("train.batch_size=8")
    split = first_norm("train.batch_size=2", "train.gradient_accumulation=4")
    assert split == pytest.approx(whole, rel=1e-3)


def test_an_interrupted_adalora_run_begins_again(
    two_steps: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fvae_lora_experiments.run import runner

    recipe = two_steps("adalora", "train.epochs=3")
    undisturbed = run_recipe(recipe, tmp_path / "a", quiet=True)

    class Killed(BaseException):
        """Nothing catches it."""

    keep = runner.RunFolder.keep_checkpoints

    def keep_and_die(folder: Any, *steps: int) -> None:
        keep(folder, *steps)
        if steps[0] == 4:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(runner.RunFolder, "keep_checkpoints", keep_and_die)
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path / "b", quiet=True)
    assert (tmp_path / "b" / "checkpoints" / "checkpoint-4").exists()
    resumed = run_recipe(recipe, tmp_path / "b", quiet=True)
    assert resumed.metrics == undisturbed.metrics
    assert (tmp_path / "a" / "metrics.jsonl").read_text() == (tmp_path / "b" / "metrics.jsonl").read_text()


def test_a_recipe_of_a_method_survives_the_record(two_steps: Callable[..., Recipe]) -> None:
    recipe = two_steps("fvae-lora-reference")
    assert check_recipe(recipe.model_dump(), "record") == recipe


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("query", ["q_proj"]),
        (["query"], ["q_proj"]),
        ("attention.v_proj", ["attention.v_proj"]),
        (r".*\.(q|k)_proj", [f"vit.layers.{layer}.attention.{name}_proj" for layer in (0, 1) for name in "qk"]),
        (r"vit\.layers\.1\..*fc1", ["vit.layers.1.mlp.fc1"]),
    ],
)
def test_modules_are_named_as_in_peft(
    make_recipe: Callable[..., Recipe], vit: Path, wanted: str | list[str], found: list[str]
) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit)
    recipe = make_recipe(adapter={"target_modules": wanted})
    assert adapted_modules(model, recipe.adapter.target_modules) == found


@pytest.mark.parametrize("method", ["lora", "fvae-lora", "hira", "adalora"])
def test_all_linear_is_what_peft_means_by_it(make_recipe: Callable[..., Recipe], vit: Path, method: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForImageClassification.from_pretrained(vit)
    expected = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    recipe = make_recipe(method=method, adapter={"target_modules": "all-linear"})
    adapted = METHODS[method].apply(AutoModelForImageClassification.from_pretrained(vit), recipe)
    assert set(adapted.targeted_module_names) == set(expected.targeted_module_names)
    assert len(adapted.targeted_module_names) == 2 * 6


@pytest.mark.parametrize("wanted", ["query", ["query"], "all-linear", r".*\.q_proj"])
def test_layers_choose_among_modules_however_they_are_named(
    make_recipe: Callable[..., Recipe], vit: Path, wanted: str | list[str]
) -> None:
    recipe = make_recipe(adapter={"target_modules": wanted, "layers": [1]})
    adapted = METHODS["lora"].apply(AutoModelForImageClassification.from_pretrained(vit), recipe)
    assert {name.split(".")[2] for name in adapted.targeted_module_names} == {"1"}
    assert len(adapted.targeted_module_names) == (6 if wanted == "all-linear" else 1)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (
            "nope",
            "adapter.target_modules: 'nope' matches no module of ViTForImageClassification; its linear",
        ),
        ("query,key", "adapter.target_modules: 'query,key' matches no module"),
        (r".*\.(q_proj", "adapter.target_modules: '.*\\\\.(q_proj' is not a regular expression: missing )"),
        (r".*layernorm_before", "recipe: Target module LayerNorm"),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused_in_one_line(
    make_recipe: Callable[..., Recipe], vit: Path, wanted: str, says: str
) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit)
    with pytest.raises(UserError) as refusal:
        METHODS["lora"].apply(model, make_recipe(adapter={"target_modules": wanted}))
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
