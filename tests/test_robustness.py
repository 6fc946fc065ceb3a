"""Any valid configuration works, extreme activations stay finite, and a hostile adapter folder can do no harm."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fvae_lora import FVAELoraConfig, add_elbo, elbo_terms, export_for_inference
from fvae_lora.config import PEFT_SAVES_BIASES
from tiny import adapted_linear, batch_for, randomised, tiny_bert, tiny_llama

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
BASE = tiny_bert().eval()
BATCH = batch_for(BASE)


# --- Configurations -------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> FVAELoraConfig:
    width, weight = st.integers(1, 6), st.floats(0, 20)
    encoder = draw(st.none() | st.lists(width, max_size=2))
    decoder = draw(st.lists(width, max_size=2))
    dropout = st.sampled_from([0.0, 0.4])
    objective = draw(st.sampled_from(["fvae", "vae2lat", "reference"]))
    fusion = draw(st.sampled_from(["concat", "average"]))
    own_weights = st.none() | weight if objective == "reference" else st.none()
    return FVAELoraConfig(
        task_type="SEQ_CLS",
        target_modules=draw(st.sampled_from([["query", "value"], ["dense"], "all-linear", r".*\.0\..*query", None])),
        r=draw(width),
        residual_dim=None if fusion == "average" else draw(st.none() | width),
        lora_alpha=draw(st.none() | st.floats(0.1, 64)),
        lora_dropout=draw(dropout),
        encoder_hidden_dims=encoder,
        encoder_dropout=0.0 if encoder == [] else draw(dropout),
        shared_encoder_trunk=draw(st.booleans()),
        decoder_hidden_dims=decoder,
        decoder_dropout=draw(dropout) if decoder else 0.0,
        latent_fusion=fusion,
        residual_prior_mean=draw(st.floats(-5, 5)),
        residual_prior_std=draw(st.floats(0.05, 5)),
        objective=objective,
        elbo_weight=draw(st.sampled_from([0.0, 1e-3, 1.0])),
        reconstruction_weight=draw(weight),
        kl_weight=draw(weight),
        factorization_weight=draw(weight),
        factorization_weight_z1=draw(own_weights),
        factorization_weight_z2=draw(own_weights),
        task_weight=draw(st.floats(0.1, 1000)),
        layer_reduction=draw(st.sampled_from(["sum", "mean"])),
        elbo_stop_gradient=draw(st.booleans()),
        elbo_token_fraction=draw(st.floats(0.01, 1)),
        sample_at_inference=draw(st.booleans()),
        rank_pattern=draw(st.sampled_from([{}, {"query": 2}, {r"layer\.0.*": 3}])) if fusion == "concat" else {},
        alpha_pattern=draw(st.sampled_from([{}, {"value": 2.5}])),
        bias=draw(st.sampled_from(["none", "all", "fvae_lora_only"])) if PEFT_SAVES_BIASES else "none",
        init_weights=draw(st.booleans()),
    )


def fields_of(config: PeftConfig) -> dict[str, Any]:
    """As JSON has them: sets have no order there, and peft names a task's heads once more with each loading."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain["modules_to_save"] = plain["modules_to_save"] and sorted(set(plain["modules_to_save"]))
    return json.loads(json.dumps({key: value for key, value in plain.items() if key != "inference_mode"}))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    torch.manual_seed(5)  # for those that sample
    return model.eval()(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


@QUIET
@given(config=configs())
def test_any_valid_configuration_trains_saves_and_loads(
    config: FVAELoraConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert FVAELoraConfig(**fields_of(config)) == config
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(BASE), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    loss = model(**BATCH).loss
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(math.isfinite(value) for terms in elbo_terms(model).values() for value in terms.values())
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), folder)
    assert fields_of(loaded.peft_config["default"]) == fields_of(model.peft_config["default"])
    torch.testing.assert_close(logits(loaded), logits(model))


# --- Activations ----------------------------------------------------------------------------------------------------

FORMS = {
    "as it is": {},
    "reference": {"objective": "reference"},
    "sampled": {"elbo_token_fraction": 0.5},
    "stopped": {"elbo_stop_gradient": True},
}


SIZES = {torch.float32: [0.0, 1e4, 1e15], torch.bfloat16: [0.0, 1e4, 1e15], torch.float16: [0.0, 1e4]}


@pytest.mark.parametrize(("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes])
@pytest.mark.parametrize("form", FORMS)
def test_large_and_zero_activations_stay_finite(size: float, form: str, dtype: torch.dtype) -> None:
    model = adapted_linear(dtype=torch.float32, **FORMS[form])
    model.get_base_model()[0].base_layer.to(dtype)
    x = (size * torch.linspace(-1, 1, 48).reshape(2, 4, 6)).to(dtype).requires_grad_()
    output = model(x)
    loss = add_elbo(output.float().square().mean() * 0, model)
    assert loss.isfinite()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert x.grad.isfinite().all()


def test_beyond_what_squares_allow_the_loss_says_so() -> None:
    """The largest of bfloat16: a likelihood that overflows is no number that could pass for a loss."""
    model = adapted_linear(dtype=torch.float32)
    output = model(torch.full((2, 6), 3e38))
    assert not add_elbo(output.new_zeros(()), model).isfinite()
    with torch.no_grad():
        assert model.eval()(torch.full((2, 6), 1e30)).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (0, 4, 6), (3, 0, 6)])
def test_one_token_and_none(shape: tuple[int, ...], form: str) -> None:
    model = adapted_linear(**FORMS[form])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = model(x)
    assert output.shape == (*shape[:-1], 5)
    loss = add_elbo(output.sum(), model)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if not x.numel():
        assert loss == 0
    assert model.eval()(x).shape == output.shape


# --- Adapter folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    torch.manual_seed(0)
    config = FVAELoraConfig(target_modules=["query", "value"], r=4, decoder_hidden_dims=[8], task_type="SEQ_CLS")
    randomised(get_peft_model(copy.deepcopy(BASE), config)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def edit(folder: Path, **fields: object) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(json.loads((folder / CONFIG_NAME).read_text()) | fields))


def try_to_load(folder: Path) -> PeftModel | None:
    """The loaded model, which then gives logits; or ``None`` after an error of one line that leaves the model alone."""
    base = copy.deepcopy(BASE)
    before = logits(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, folder)
    except (ValueError, KeyError, RecursionError) as error:
        message = str(error).strip()
    else:
        assert logits(model).shape == before.shape
        return model
    assert "\n" not in message
    assert len(message) < 2000
    assert not hasattr(base, "peft_config")
    assert torch.equal(logits(base), before)
    return None


NAMES = sorted(FVAELoraConfig(target_modules=["query"]).to_dict().keys() - {"peft_type", "peft_version"})
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
# What is wrong about these is seen by peft, or only beside the model's own layers.
LATE = {"trainable_token_indices", "modules_to_save", "exclude_modules", "target_modules"}


@settings(QUIET, max_examples=60)
@given(name=st.sampled_from(NAMES), value=ODD)
@example(name="r", value=10**400)
@example(name="lora_dropout", value=10**400)
@example(name="rank_pattern", value=None)
@example(name="rank_pattern", value={"(": 2})
@example(name="target_modules", value="*[")
@example(name="target_modules", value=[["query"]])
@example(name="modules_to_save", value="classifier")
@example(name="layers_to_transform", value=0.5)
@example(name="encoder_hidden_dims", value=[10**9])
def test_any_value_in_any_field(name: str, value: object, folder: Path) -> None:
    original = (folder / CONFIG_NAME).read_text()
    edit(folder, **{name: value})
    try:
        if try_to_load(folder) is None and name not in LATE:
            with pytest.raises(ValueError, match=r"^[^\n]+ must be |does not fit|[Ii]nvalid task type|inference_only"):
                PeftModel.from_pretrained(copy.deepcopy(BASE), folder)
    finally:
        (folder / CONFIG_NAME).write_text(original)


@QUIET
@given(fields=st.dictionaries(st.text(min_size=1, max_size=12), ODD, max_size=3))
def test_unknown_fields_are_left_out(fields: dict[str, object], folder: Path, good: Path) -> None:
    original = (folder / CONFIG_NAME).read_text()
    edit(folder, **{f"x_{name}": value for name, value in fields.items()})
    loaded = try_to_load(folder)
    (folder / CONFIG_NAME).write_text(original)
    assert loaded is not None
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(copy.deepcopy(BASE), good)))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"r": 1' + "0" * 5000 + "}", "\ufeff{}", "null"])
def test_text_that_json_readers_stumble_over(text: str, folder: Path) -> None:
    (folder / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=CONFIG_NAME):
        FVAELoraConfig.from_pretrained(folder)


@QUIET
@given(data=st.data())
def test_weights_with_bytes_cut_off_or_changed(data: st.DataObject, folder: Path, good: Path) -> None:
    """Header or body, a byte or a half: refused, or loaded where what changed is a number."""
    content = bytearray((good / SAFETENSORS_WEIGHTS_NAME).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        assert try_to_load(folder) is None
    else:
        content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
        (folder / SAFETENSORS_WEIGHTS_NAME).write_bytes(content)
        try_to_load(folder)


def change(folder: Path, changes: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    save_file(weights | changes(weights), folder / SAFETENSORS_WEIGHTS_NAME)


def key(weights: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(weights) if part in name)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_that_are_no_floating_point_numbers(dtype: torch.dtype, folder: Path) -> None:
    change(folder, lambda weights: {(name := key(weights, "fvae_lora_B")): weights[name].to(dtype)})
    with pytest.raises(ValueError, match=r"floating-point numbers.*fvae_lora_B"):
        PeftModel.from_pretrained(copy.deepcopy(BASE), folder)
    assert try_to_load(folder) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_loaded(dtype: torch.dtype, folder: Path, good: Path) -> None:
    change(folder, lambda weights: {name: value.to(dtype) for name, value in weights.items()})
    loaded, expected = try_to_load(folder), PeftModel.from_pretrained(copy.deepcopy(BASE), good)
    assert loaded is not None
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=0.05)


def test_swapped_tensors_of_unlike_shape(folder: Path) -> None:
    def swapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        one, other = key(weights, "fvae_lora_B"), key(weights, "encoder1_hidden0_weight")
        return {one: weights[other], other: weights[one]}

    change(folder, swapped)
    with pytest.raises(ValueError, match="has shape"):
        PeftModel.from_pretrained(copy.deepcopy(BASE), folder)


# --- No code, no other paths ----------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ODD_PATHS = ["/etc/passwd", "../../outside", "file:///etc/hosts", "a\nb`c`<script>", "~/.ssh", "\x00", ""]


@pytest.mark.parametrize("path", ODD_PATHS)
def test_the_base_models_name_opens_nothing(path: str, folder: Path, tmp_path: Path) -> None:
    edit(folder, base_model_name_or_path=path, revision=path)
    before = tree(tmp_path)
    model = try_to_load(folder)
    assert model is not None
    assert tree(tmp_path) == before
    model.save_pretrained(tmp_path / "again")
    assert tree(tmp_path).keys() - before.keys() == {str(file) for file in (tmp_path / "again").iterdir()}
    readme = (tmp_path / "again" / "README.md").read_text()
    assert "```sh" in readme
    assert "\nb`c`" not in readme.partition("How to load")[2]


@pytest.mark.slow
def test_auto_mapping_imports_nothing(folder: Path, tmp_path: Path) -> None:
    """peft's auto classes import the library that the folder names; only known and imported ones get that far."""
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    edit(folder, task_type=None, auto_mapping={"base_model_class": "Model", "parent_library": "trap"})
    code = f"import fvae_lora, peft; peft.AutoPeftModel.from_pretrained({str(folder)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert run.returncode != 0
    assert "Cannot infer the auto class" in run.stderr
    assert not (tmp_path / "sprung").exists()
    assert try_to_load(folder) is not None


def test_code_beside_the_weights_is_not_run(folder: Path, tmp_path: Path) -> None:
    trap = f"open({str(tmp_path / 'sprung')!r}, 'w')"
    for name in ("__init__.py", "modeling_bert.py", "adapter_model.py", "sitecustomize.py"):
        (folder / name).write_text(trap)
    edit(folder, auto_map={"AutoModel": "modeling_bert.Model"}, trust_remote_code=True)
    assert try_to_load(folder) is not None
    with pytest.raises((OSError, ValueError)):
        AutoPeftModelForSequenceClassification.from_pretrained(str(folder))
    assert not (tmp_path / "sprung").exists()


def test_links_to_the_weights_are_followed_and_dead_ones_refused(folder: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert try_to_load(folder) is not None
    (tmp_path / "blob").unlink()
    with pytest.raises(ValueError, match=SAFETENSORS_WEIGHTS_NAME):
        PeftModel.from_pretrained(copy.deepcopy(BASE), folder)


def test_an_export_stays_inside_its_folder(folder: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(copy.deepcopy(BASE), folder)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = tree(tmp_path)
    for target in ("new", "link"):
        export_for_inference(model, tmp_path / target)
        assert try_to_load(tmp_path / target) is not None
    written = tree(tmp_path).keys() - before.keys()
    assert {Path(path).parent.name for path in written} <= {"new", "link", "real"}


def test_an_adapter_for_another_model_leaves_it_alone(folder: Path) -> None:
    other = tiny_llama().eval()
    with pytest.raises(ValueError, match=r"target_modules|does not fit"):
        PeftModel.from_pretrained(other, folder)
    assert not any("fvae_lora" in name for name, _ in other.named_parameters())
