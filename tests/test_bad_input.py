"""A mistake is refused with one clear error that says what to do, and leaves nothing half done."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

from fvae_lora import FVAELoraConfig, load_reference_adapter
from fvae_lora.config import PEFT_SAVES_BIASES
from tiny import adapted_linear, batch_for, randomised, tiny_bert, tiny_llama, tiny_vit

NAN, INF = float("nan"), float("inf")

# Configurations


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 2.5),
        ("r", True),
        ("r", "16"),
        ("residual_dim", 0),
        ("lora_alpha", 0),
        ("lora_alpha", -8),
        ("lora_alpha", NAN),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("encoder_dropout", 1.5),
        ("decoder_dropout", "0.1"),
        ("encoder_hidden_dims", [0]),
        ("encoder_hidden_dims", 16),
        ("encoder_hidden_dims", [16, -3]),
        ("decoder_hidden_dims", None),
        ("decoder_hidden_dims", [128.5]),
        ("elbo_weight", -1e-3),
        ("elbo_weight", INF),
        ("reconstruction_weight", -1),
        ("kl_weight", -1),
        ("kl_weight", NAN),
        ("factorization_weight", -1),
        ("task_weight", 0),
        ("task_weight", -1),
        ("residual_prior_std", 0),
        ("residual_prior_std", -1.0),
        ("residual_prior_std", NAN),
        ("residual_prior_mean", NAN),
        ("residual_prior_mean", "1.5"),
        ("elbo_token_fraction", 0),
        ("elbo_token_fraction", 1.01),
        ("objective", "elbo"),
        ("objective", None),
        ("objective", ["fvae"]),
        ("latent_fusion", "sum"),
        ("layer_reduction", "max"),
        ("bias", "lora_only"),
        ("rank_pattern", {"query": 0}),
        ("alpha_pattern", {"query": -1}),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_the_fields_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}") as error:
        FVAELoraConfig(**{field: value})
    assert "\n" not in str(error.value)
    assert repr(value) in str(error.value) or isinstance(value, dict)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("residual_dim", {"latent_fusion": "average", "residual_dim": 4, "r": 8}),
        ("residual_dim", {"latent_fusion": "average", "residual_dim": 8, "r": 8, "rank_pattern": {"query": 4}}),
        ("encoder_dropout", {"encoder_hidden_dims": [], "encoder_dropout": 0.1}),
        ("decoder_dropout", {"decoder_hidden_dims": [], "decoder_dropout": 0.1}),
        ("factorization_weight_z1", {"factorization_weight_z1": 1.0}),
        ("factorization_weight_z2", {"factorization_weight_z2": 1.0, "objective": "vae2lat"}),
        ("factorization_weight_z1", {"factorization_weight_z1": -1.0, "objective": "reference"}),
        ("sample_at_inference", {"inference_only": True, "sample_at_inference": True}),
        ("layers_to_transform", {"layers_pattern": "layer"}),
        ("layers_to_transform", {"target_modules": ".*query", "layers_to_transform": [0]}),
    ],
)
def test_fields_that_contradict_each_other_are_refused(field: str, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be"):
        FVAELoraConfig(**fields)


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="latent_dim"):
        FVAELoraConfig(latent_dim=16)


@pytest.mark.skipif(PEFT_SAVES_BIASES, reason="peft saves them from 0.21 on")
def test_biases_that_peft_would_not_save_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^bias must be 'none'"):
        FVAELoraConfig(bias="all")


@pytest.mark.parametrize("value", [0, [0], [0, 1]])
def test_zero_is_a_valid_layer(value: object) -> None:
    assert FVAELoraConfig(layers_to_transform=value).layers_to_transform == value


# Targets


class Odd(nn.Module):
    """A model with one layer of each kind that cannot be adapted, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.conv = nn.Conv2d(3, 3, 1, groups=3)
        self.norm = nn.LayerNorm(3)
        self.linear = nn.Linear(3, 3)


def parameter_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize(
    ("name", "kind"), [("embedding", "Embedding"), ("conv", "Conv2d with groups"), ("norm", "LayerNorm")]
)
def test_a_layer_of_another_type_is_refused_with_type_and_name(name: str, kind: str, inject: bool) -> None:
    model = Odd()
    before = parameter_names(model)
    config = FVAELoraConfig(target_modules=["linear", name])
    with pytest.raises(ValueError, match=rf"target_modules: {name} is a {kind}"):
        inject_adapter_in_model(config, model) if inject else get_peft_model(model, config)
    assert parameter_names(model) == before


def test_a_refused_second_adapter_leaves_the_first_in_place() -> None:
    model = get_peft_model(Odd(), FVAELoraConfig(target_modules=["linear"]))
    before = parameter_names(model)
    with pytest.raises(ValueError, match="conv is a Conv2d"):
        model.add_adapter("other", FVAELoraConfig(target_modules=["conv"]))
    assert parameter_names(model) == before
    assert list(model.peft_config) == ["default"]


# Merging and training what cannot be


@pytest.mark.parametrize("way", ["merge_and_unload", "merge_adapter"])
def test_merging_a_non_linear_encoder_says_why_and_what_else_to_do(way: str) -> None:
    model = adapted_linear().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ValueError, match="ReLU") as error:
        getattr(model, way)()
    assert "export_for_inference" in str(error.value)
    assert "encoder_hidden_dims=[]" in str(error.value)
    assert torch.equal(model(x), expected)


def test_two_active_adapters_that_disagree_on_the_task_weight_are_refused() -> None:
    config = FVAELoraConfig(target_modules=["query"], r=2, task_weight=1.0)
    model = get_peft_model(tiny_bert(), config)
    model.add_adapter("other", FVAELoraConfig(target_modules=["query"], r=2, task_weight=1000.0))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="task_weight"):
        model(**batch_for(tiny_bert()))


# Adapter folders


@pytest.fixture
def base() -> PreTrainedModel:
    return tiny_bert().eval()


@pytest.fixture
def folder(tmp_path: Path, base: PreTrainedModel) -> Path:
    """A good adapter of `base`."""
    config = FVAELoraConfig(target_modules=["query", "value"], r=4, decoder_hidden_dims=[8], task_type="SEQ_CLS")
    randomised(get_peft_model(copy.deepcopy(base), config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def first_key(weights: dict[str, Tensor], part: str) -> str:
    return next(key for key in sorted(weights) if part in key)


def drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(first_key(weights, part))


def add(weights: dict[str, Tensor]) -> None:
    key = first_key(weights, "fvae_lora_B")
    weights[key.replace("layer.0", "layer.7")] = weights[key].clone()


def reshape(weights: dict[str, Tensor]) -> None:
    key = first_key(weights, "fvae_lora_B")
    weights[key] = torch.zeros(99, 4)


def reshape_classifier(weights: dict[str, Tensor]) -> None:
    key = first_key(weights, "classifier.weight")
    weights[key] = torch.zeros(7, 16)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "weights cut in half": (lambda f: cut(f / WEIGHTS, 0.5), "truncated"),
    "weights cut in the header": (lambda f: cut(f / WEIGHTS, 0.01), "truncated"),
    "empty weights": (lambda f: cut(f / WEIGHTS, 0), "truncated"),
    "weights of another format": (lambda f: (f / WEIGHTS).write_bytes(b"PK" * 500), "truncated"),
    "a key is missing": (lambda f: rewrite(f, drop("encoder1_mean_weight")), "lacks .*encoder1_mean_weight"),
    "B is missing": (lambda f: rewrite(f, drop("fvae_lora_B")), "lacks .*fvae_lora_B"),
    "the decoder is missing": (lambda f: rewrite(f, drop("decoder_output_bias")), "lacks .*decoder_output_bias"),
    "a key too many": (lambda f: rewrite(f, add), r"no place for .*layer\.7"),
    "another shape": (lambda f: rewrite(f, reshape), r"shape \(99, 4\).*needs \(16, 4\)"),
    "a classifier of another size": (lambda f: rewrite(f, reshape_classifier), r"shape \(7, 16\).*needs \(3, 16\)"),
    "a rank that the weights do not have": (lambda f: edit(f, r=5), "shape"),
    "other targets than the weights": (lambda f: edit(f, target_modules=["query", "key"]), "lacks .*key"),
    "targets that the model does not have": (lambda f: edit(f, target_modules=["foo"]), "target_modules: 'foo'"),
    "a bad value": (lambda f: edit(f, r=0), "^r must be"),
    "an unknown type": (lambda f: edit(f, peft_type="NOT_A_TYPE"), "NOT_A_TYPE"),
}


UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "configuration cut in half": (lambda f: cut(f / CONFIG, 0.5), CONFIG),
    "empty configuration": (lambda f: cut(f / CONFIG, 0), CONFIG),
    "configuration that is no object": (lambda f: (f / CONFIG).write_text("[1, 2]"), "JSON object"),
    "configuration that is not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00{"), CONFIG),
}


def edit(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_refused_and_untouched(model: PreTrainedModel, load: Callable[[], object], match: str | None = None) -> None:
    """The error is one line, and the model has neither new layers nor other outputs."""
    batch = {key: value for key, value in batch_for(model).items() if key != "labels"}
    names, training = parameter_names(model), model.training
    with torch.no_grad():
        expected = model(**batch).logits
    with pytest.raises((ValueError, KeyError, TypeError), match=match) as error:
        load()
    assert "\n" not in str(error.value).strip()
    assert parameter_names(model) == names
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert not getattr(model, "_hf_peft_config_loaded", False)
    assert not hasattr(model, "peft_config")
    assert model.training is training
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_unfitting_folder_is_refused_and_nothing_is_half_loaded(
    folder: Path, base: PreTrainedModel, damage: str
) -> None:
    spoil, match = DAMAGES[damage]
    spoil(folder)
    assert_refused_and_untouched(base, lambda: PeftModel.from_pretrained(base, folder), match)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("damage", ["weights cut in half", "a key is missing", "another shape"])
def test_a_damaged_second_adapter_leaves_the_first_as_it_was(
    folder: Path, base: PreTrainedModel, damage: str, low_cpu_mem_usage: bool
) -> None:
    model = PeftModel.from_pretrained(base, folder)
    names = parameter_names(model)
    with torch.no_grad():
        expected = model(**batch_for(base)).logits
    spoil, match = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=match):
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert parameter_names(model) == names
    assert list(model.peft_config) == ["default"]
    with torch.no_grad():
        assert torch.equal(model(**batch_for(base)).logits, expected)


@pytest.mark.parametrize("damage", ["weights cut in half", "another shape", "no weights"])
def test_what_transformers_cannot_load_can_be_deleted(folder: Path, base: PreTrainedModel, damage: str) -> None:
    """`load_adapter` of transformers adds the layers before it looks at the weights; peft's own does not."""
    with torch.no_grad():
        expected = base(**batch_for(base)).logits
    spoil, _ = DAMAGES[damage]
    spoil(folder)
    with pytest.raises((RuntimeError, OSError, SafetensorError)):
        base.load_adapter(str(folder))
    base.delete_adapter("default")
    with torch.no_grad():
        assert torch.equal(base(**batch_for(base)).logits, expected)


@pytest.mark.parametrize("damage", UNREADABLE)
def test_an_unreadable_configuration_is_refused_and_nothing_is_half_loaded(
    folder: Path, base: PreTrainedModel, damage: str
) -> None:
    """peft reads the file to learn the method's name, with an error of its own; read as ours it is named."""
    spoil, match = UNREADABLE[damage]
    spoil(folder)
    assert_refused_and_untouched(base, lambda: PeftModel.from_pretrained(base, folder))
    assert_refused_and_untouched(base, lambda: FVAELoraConfig.from_pretrained(folder), match)


def test_an_adapter_of_another_architecture_is_refused(folder: Path) -> None:
    for other in (tiny_vit().eval(), tiny_llama().eval()):
        assert_refused_and_untouched(other, lambda o=other: PeftModel.from_pretrained(o, folder), "fit|target_modules")


def test_an_adapter_of_a_larger_model_is_refused(folder: Path) -> None:
    """Same architecture and names, other width; same width, more or fewer layers."""
    for fields in ({"hidden_size": 32}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"num_labels": 7}):
        other = tiny_bert(**fields).eval()
        assert_refused_and_untouched(other, lambda o=other: PeftModel.from_pretrained(o, folder), "does not fit")


def test_a_folder_that_does_not_exist_is_refused(base: PreTrainedModel, tmp_path: Path) -> None:
    assert_refused_and_untouched(base, lambda: PeftModel.from_pretrained(base, tmp_path / "nothing"), "nothing")


def test_pickled_weights_are_not_loaded(folder: Path, base: PreTrainedModel) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert_refused_and_untouched(base, lambda: PeftModel.from_pretrained(base, folder), WEIGHTS)


# The reference's folders


@pytest.fixture
def reference(golden: Path, tmp_path: Path) -> Path:
    shutil.copytree(golden / "tiny_bert" / "adapter", tmp_path / "reference")
    return tmp_path / "reference"


@pytest.fixture
def reference_base(golden: Path) -> PreTrainedModel:
    return BertForSequenceClassification.from_pretrained(golden / "tiny_bert" / "base_model")


@pytest.mark.parametrize(
    "load",
    [
        lambda model, folder: PeftModel.from_pretrained(model, folder),
        lambda model, folder: PeftModel.from_pretrained(model, str(folder)),
        lambda model, folder: model.load_adapter(str(folder)),
        lambda _, folder: PeftConfig.from_pretrained(folder),
        lambda _, folder: AutoPeftModelForSequenceClassification.from_pretrained(folder),
    ],
    ids=["PeftModel", "PeftModel, str", "transformers", "PeftConfig", "AutoPeftModel"],
)
def test_a_reference_adapter_given_to_peft_names_what_loads_it(
    reference: Path, reference_base: PreTrainedModel, load: Callable[..., object]
) -> None:
    match = "load_reference_adapter"
    assert_refused_and_untouched(reference_base, lambda: load(reference_base, reference), match)


REFERENCE_DAMAGES = {
    name: (DAMAGES | UNREADABLE)[name]
    for name in (
        "no weights",
        "weights cut in half",
        "empty weights",
        "configuration cut in half",
        "configuration that is no object",
        "targets that the model does not have",
    )
} | {
    "no configuration": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "a key is missing": (lambda f: rewrite(f, drop("0.mean.weight")), "lacks .*encoder1_mean_weight"),
    "an unknown key": (lambda f: rewrite(f, lambda w: w.update({"a.b.lora_A.what.weight": torch.zeros(1)})), "what"),
    "a tau of 0": (lambda f: rewrite(f, lambda w: w[first_key(w, "scale_tril")].zero_().sub_(1)), "tau must be"),
    "another latent_dim": (lambda f: edit(f, latent_dim=5), "shape"),
    "an unsupported mode": (lambda f: edit(f, force_classical_ae=True), "force_classical_ae"),
    "an unknown field": (lambda f: edit(f, surprise=1), "surprise"),
    "an adapter of ours": (lambda f: edit(f, peft_type="FVAE_LORA"), "PeftModel.from_pretrained"),
    "an adapter of LoRA": (lambda f: edit(f, peft_type="LORA"), "PeftModel.from_pretrained"),
}


@pytest.mark.parametrize("damage", REFERENCE_DAMAGES)
def test_a_damaged_reference_folder_is_refused_and_nothing_is_half_loaded(
    reference: Path, reference_base: PreTrainedModel, damage: str
) -> None:
    spoil, match = REFERENCE_DAMAGES[damage]
    spoil(reference)
    assert_refused_and_untouched(reference_base, lambda: load_reference_adapter(reference_base, reference), match)


def test_a_reference_adapter_of_another_model_is_refused(reference: Path) -> None:
    for other in (tiny_bert(hidden_size=32).eval(), tiny_bert(num_hidden_layers=1).eval(), tiny_llama().eval()):
        assert_refused_and_untouched(other, lambda o=other: load_reference_adapter(o, reference), "does not fit|target")


# Where the package is not imported


def test_the_readme_says_what_to_install_and_import(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "pip install fvae-lora" in text
    assert "import fvae_lora" in text
    assert "PeftModel.from_pretrained" in text


def test_the_readme_keeps_what_somebody_wrote(folder: Path, base: PreTrainedModel) -> None:
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("## How to load", "Notes of mine.\n\n## How to load"))
    PeftModel.from_pretrained(base, folder).save_pretrained(folder)
    text = readme.read_text()
    assert "Notes of mine." in text
    assert text.count("import fvae_lora") == 1


@pytest.mark.slow
def test_without_the_import_peft_stops_and_the_readme_explains(folder: Path, base: PreTrainedModel) -> None:
    base.save_pretrained(folder.parent / "base")
    script = (
        "import sys\n"
        "from transformers import BertForSequenceClassification\n"
        "from peft import PeftModel\n"
        "if sys.argv[3] == 'imported': import fvae_lora\n"
        "base = BertForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "PeftModel.from_pretrained(base, sys.argv[2])\n"
    )
    arguments = [sys.executable, "-c", script, str(folder.parent / "base"), str(folder)]
    without = subprocess.run([*arguments, "no"], capture_output=True, text=True, check=False)
    assert without.returncode != 0
    error = without.stderr.strip().splitlines()[-1]
    assert error in (folder / "README.md").read_text()
    assert subprocess.run([*arguments, "imported"], capture_output=True, text=True, check=False).returncode == 0


def test_an_adapted_model_names_its_own_layers_not_those_of_peft(base: PreTrainedModel) -> None:
    model = get_peft_model(base, FVAELoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match=r"'nothing' matches no module .* named dense, key, query, value$"):
        model.add_adapter("other", FVAELoraConfig(r=4, target_modules=["nothing"]))
