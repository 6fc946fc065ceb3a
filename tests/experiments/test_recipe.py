"""Recipes: what ships, what overrides do, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fvae_lora import FVAELoraConfig, FVAEPEFTConfig
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe, shipped_recipes
from fvae_lora_experiments.schema import FvaeSettings

PLACES = {"model": "m", "dataset": "d"}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_for_every_method(name: str) -> None:
    writes = name.startswith("commonsense/") or name == "speech/whisper"
    for method in METHODS.keys() - ({"linear-probe"} if writes else set()):
        assert load_recipe(name, options=PLACES | {"method": method}).method == method


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_of_a_shipped_recipe_is_a_recipe_that_says_what_it_is_for(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(shipped_recipes()[name])
    assert copy.read_text().startswith("# ")
    assert load_recipe(str(copy), options=PLACES) == load_recipe(name, options=PLACES)


def test_a_shipped_recipe_has_the_comments_of_its_own_and_no_others() -> None:
    text = shipped_recipes()["glue/cola"]
    assert text == (
        "# CoLA: is a sentence grammatical? Judged by Matthews' correlation.\n"
        "extends: glue/default\n"
        "data: {config: cola}\n"
        "text: {columns: [sentence], metrics: [matthews]}\n"
        "train: {epochs: 20} # ours\n"
    )
    assert "\n# Each method's learning rate: " in shipped_recipes()["image/demo"]


def test_two_shipped_recipes_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "image.yaml").write_text("mine:\n  seed: 1\nmine:\n  seed: 2\n")
    monkeypatch.setattr("fvae_lora_experiments.recipe.RECIPES_FOLDER", tmp_path)
    with pytest.raises(yaml.YAMLError, match="mine is given twice"):
        shipped_recipes.__wrapped__()


def test_the_default_is_the_papers_setting() -> None:
    recipe = load_recipe("image/default", options=PLACES)
    train, adapter, fvae = recipe.train, recipe.adapter, recipe.fvae
    assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (30, 32, 5e-3, 0.01)
    assert (train.schedule, train.warmup_ratio) == ("linear", 0.1)
    assert (adapter.r, adapter.dropout, adapter.target_modules) == (16, 0.1, ["query", "key"])
    assert (fvae.elbo_weight, fvae.reconstruction_weight, fvae.factorization_weight) == (1e-3, 1, 1)
    assert (fvae.kl_weight, fvae.decoder_hidden_dims) == (10, [128])
    assert recipe.data.protocol == "clean"


def test_the_sections_defaults_are_those_of_the_method() -> None:
    assert FvaeSettings().model_dump() == {name: getattr(FVAELoraConfig(), name) for name in FvaeSettings.model_fields}


def test_the_reference_recipe_is_the_references_profile() -> None:
    recipe = load_recipe("image/reference", options=PLACES)
    quick_start: dict[str, Any] = {
        "latent_dim": 16,
        "enc_num_of_layer": 1,
        "enc_hidden_layer": 16,
        "enc_dropout": 0.1,
        "dec_hidden_layer": 128,
        "lambda_downstream": 1000,
    }
    theirs = FVAEPEFTConfig(**quick_start)
    for name, value in recipe.fvae.model_dump().items():
        if name != "factorization_weight":  # the two weights of z1 and z2 take its place
            assert getattr(theirs, name) == value, name
    assert (recipe.adapter.r, recipe.adapter.alpha) == (theirs.r, theirs.lora_alpha)
    assert load_recipe("image/reference", options=PLACES | {"method": "lora"}).adapter.alpha == 16


def test_overrides_win_over_the_methods_own_settings(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\ndataset: d\nper_method:\n  full:\n    train.learning_rate: 1.0e-4\n")
    assert load_recipe(str(file)).train.learning_rate == 5e-3
    assert load_recipe(str(file), ["method=full"]).train.learning_rate == 1e-4
    assert load_recipe(str(file), ["method=full", "train.learning_rate=1e-2"]).train.learning_rate == 1e-2


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("", [], "expected keys and values"),
        ("train: [", [], "not readable as YAML"),
        ("train: {epochs: 1, epochs: 2}", [], "not readable as YAML: epochs is given twice in"),
        ("seed: 1\nseed: 2", [], "seed is given twice in"),
        ("", ["train={epochs: 1, epochs: 2}"], "train: '{epochs: 1, epochs: 2}' is not a YAML value"),
        ("trian: {epochs: 1}", [], "trian: unknown key; allowed are task, method"),
        ("", ["train.epoch=1"], "train.epoch: unknown key; allowed are epochs, batch_size"),
        ("", ["train.epochs=0"], "train.epochs: input should be greater than or equal to 1, got 0"),
        ("", ["train.learning_rate=.nan"], "train.learning_rate: input should be"),
        ("", ["train.schedule=square"], "train.schedule: input should be 'linear', 'cosine'"),
        ("", ["train=3"], "train: expected keys and values below it, got 3"),
        ("", ["seed.x=3"], "seed: input should be a valid integer"),
        ("seed: 1", ["seed.x=3"], "seed.x: unknown key; seed has no keys below it"),
        ("", ["method=lorax"], "method: expected one of fvae-lora, fvae-lora-reference, vae2lat, "),
        ("", ["adapter.target_modules=[]"], "adapter.target_modules: list should have at least 1 item"),
        ("", ["adapter.target_modules={}"], "adapter.target_modules: input should be a valid list, got {}"),
        ("", ["adapter.target_modules=[3]"], "adapter.target_modules.0: input should be a valid string, got 3"),
        ("", ["seed=1", "seed=2"], "seed: given twice, as seed=2 and as seed=1; expected one of them"),
        ("", ["train.epochs=1", "train={epochs: 2}"], "train: given twice, as train={epochs: 2} and as train.epochs=1"),
        ("", ["epochs"], "epochs: expected key=value"),
        ("", ["seed=[1"], "seed: '[1' is not a YAML value"),
        ("per_method: {lorax: {seed: 1}}", [], "per_method.lorax: expected keys and values below one of fvae-lora"),
        ("per_method: {lora: 3}", [], "per_method.lora: expected keys and values"),
        ("task: audio", [], "task: input should be 'image'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(text: str, overrides: list[str], says: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{text}\nmodel: m\ndataset: d\n" if text and "[" not in text[-1] else text)
    if overrides and not text:
        file.write_text("model: m\ndataset: d\n")
    with pytest.raises(UserError) as error:
        load_recipe(str(file), overrides)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_nowhere_names_those_that_ship() -> None:
    with pytest.raises(UserError, match=r"recipe image/nope: no such file, .* image/default"):
        load_recipe("image/nope")


def test_a_recipe_without_a_model_says_how_to_give_one() -> None:
    with pytest.raises(UserError, match=r"model: missing; give model=... \(or --model\)"):
        load_recipe("image/default")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_recipe(str(file))
    assert not (tmp_path / "owned").exists()


def test_a_recipe_holds_what_differs_from_the_one_that_it_extends(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: image/svhn-reference\ndata: {split_seed: 3}\nper_method: {lora: {train.learning_rate: 1}}"
    )
    recipe, full = load_recipe(str(mine), ["method=lora"]), load_recipe(str(mine), ["method=full"])
    assert (recipe.dataset, recipe.model) == ("ufldl-stanford/svhn", "google/vit-base-patch16-224-in21k")
    assert (recipe.data.config, recipe.data.protocol, recipe.data.split_seed) == (
        "cropped_digits",
        "reference-on-test",
        3,
    )
    assert (recipe.train.epochs, recipe.adapter.target_modules) == (50, ["query", "value"])
    assert (recipe.train.learning_rate, full.train.learning_rate) == (1, 1e-4)


def test_a_recipe_extends_one_that_lies_beside_it_wherever_it_is_read_from(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: m\ndataset: d\ntrain: {epochs: 7}")
    (tmp_path / "more.yaml").write_text("extends: base.yaml\ndataset: e")
    recipe = load_recipe(str(tmp_path / "more.yaml"))
    assert (recipe.model, recipe.dataset, recipe.train.epochs) == ("m", "e", 7)


def test_a_recipe_that_extends_itself_or_nothing_is_refused(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text(f"extends: {b}")
    b.write_text(f"extends: {a}")
    with pytest.raises(UserError, match=r"a\.yaml: extends itself, by way of"):
        load_recipe(str(a))
    a.write_text("extends: image/nowhere")
    with pytest.raises(UserError, match=r"recipe .*image/nowhere: no such file"):
        load_recipe(str(a))
