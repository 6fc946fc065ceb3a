"""Every option of the functions that load an adapter does what it does for LoRA; a new one must be tried here first."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from fvae_lora import FVAELoraConfig
from tiny import batch_for, tiny_bert

WEIGHTS = "adapter_model.safetensors"
Method = Callable[..., PeftConfig]
METHODS: dict[str, Method] = {
    "lora": lambda **fields: LoraConfig(r=4, target_modules=["value"], **fields),
    "fvae-lora": lambda **fields: FVAELoraConfig(r=4, target_modules=["value"], decoder_hidden_dims=[8], **fields),
}
IS_OURS = re.compile("lora_")


class Saved:
    """A trained adapter in a folder, what its model says, and fresh models to load it into."""

    def __init__(self, method: Method, folder: Path, **fields: Any) -> None:
        torch.manual_seed(0)
        self.method, self.fields, self.folder = method, fields, folder / "adapter"
        self.base = tiny_bert(initializer_range=0.3).eval()
        model = get_peft_model(self.fresh(), method(**fields))
        for name, parameter in model.named_parameters():
            if IS_OURS.search(name):
                nn.init.normal_(parameter, 0, 0.5)
        model.save_pretrained(self.folder)
        self.expected = says(model)
        assert (self.expected - says(self.base)).abs().max() > 1e-2

    def fresh(self, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
        """The base model, without an adapter."""
        model = tiny_bert(**fields)
        weights = {name: w for name, w in self.base.state_dict().items() if not fields or "classifier" not in name}
        model.load_state_dict(weights, strict=not fields)
        return model.to(dtype).eval()

    @property
    def weights(self) -> dict[str, Tensor]:
        """What lies in the folder."""
        return load_file(self.folder / WEIGHTS)

    def rename(self, old: str, new: str) -> None:
        """As if the adapter came of a version with other names."""
        save_file({name.replace(old, new): value for name, value in self.weights.items()}, self.folder / WEIGHTS)

    def right(self, model: nn.Module) -> bool:
        """Whether a model says what the saved one did."""
        return torch.allclose(says(model), self.expected, atol=1e-5)


def says(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch_for(tiny_bert()).items() if k != "labels"}).logits.float()


def of_adapter(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if IS_OURS.search(name)]


def warned(load: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        return load(), [str(warning.message).partition(":")[0] for warning in found]


def or_error(load: Callable[[], Any]) -> Any:
    """What comes out, or the message of the error; transformers has options that it does not take itself."""
    try:
        return load()
    except TypeError as error:
        return str(error)


def refused(load: Callable[[], Any]) -> bool:
    """One line or torch's own message: refused it is."""
    try:
        load()
    except (ValueError, RuntimeError):
        return True
    return False


MAPPING = {r"^transformer\.": "bert."}  # peft and we apply it to names without its own prefix


# --- peft -----------------------------------------------------------------------------------------------------------


def load_peft(saved: Saved, first: bool, base: PreTrainedModel | None = None, **options: Any) -> PeftModel:
    """By ``PeftModel.from_pretrained``, or by ``load_adapter`` beside another adapter."""
    base, folder = base or saved.fresh(), options.pop("model_id", saved.folder)
    if first:
        return PeftModel.from_pretrained(base, folder, **options)
    model = get_peft_model(base, saved.method(**saved.fields), adapter_name="first")
    name = options.pop("adapter_name", "default")
    model.load_adapter(folder, name, **options)
    model.set_adapter(name, inference_mode=not options.get("is_trainable", False))
    return model


def adapter_name(saved: Saved, first: bool) -> Any:
    model = load_peft(saved, first, adapter_name="other")
    return saved.right(model), list(model.peft_config), model.active_adapters


def is_trainable(saved: Saved, first: bool) -> Any:
    models = [load_peft(saved, first, is_trainable=value) for value in (True, False)]
    trained = [{p.requires_grad for name, p in m.named_parameters() if ".default" in name} for m in models]
    return [saved.right(m) for m in models], trained, [m.peft_config["default"].inference_mode for m in models]


def given_config(saved: Saved, first: bool) -> Any:
    read = type(saved.method()).from_pretrained(saved.folder)
    return [saved.right(load_peft(saved, first, config=config)) for config in (read, saved.method(**saved.fields))]


def autocast(saved: Saved, first: bool) -> Any:
    found = []
    for value in (True, False):
        model = load_peft(saved, first, saved.fresh(torch.bfloat16), autocast_adapter_dtype=value)
        found.append({p.dtype for name, p in model.named_parameters() if IS_OURS.search(name) and "default" in name})
    return found


def low_cpu_mem_usage(saved: Saved, first: bool) -> Any:
    model = load_peft(saved, first, low_cpu_mem_usage=True)
    return saved.right(model), any(p.is_meta for p in of_adapter(model))


def key_mapping(saved: Saved, first: bool) -> Any:
    saved.rename("model.bert.", "model.transformer.")
    right = saved.right(load_peft(saved, first, key_mapping=MAPPING))
    # One that maps nothing: peft says which weights it misses and goes on.
    model, said = warned(lambda: load_peft(saved, first, key_mapping={"nothing": "else"}))
    return right, saved.right(model), "Found missing adapter keys while loading the checkpoint" in said


def torch_device(saved: Saved, first: bool) -> Any:
    model = load_peft(saved, first, torch_device="cpu")
    return saved.right(model), {p.device for p in of_adapter(model)}


def subfolder(saved: Saved, first: bool) -> Any:
    return saved.right(load_peft(saved, first, model_id=saved.folder.parent, subfolder=saved.folder.name))


def of_the_hub(saved: Saved, first: bool) -> Any:
    return saved.right(load_peft(saved, first, revision="main", token="none", cache_dir=str(saved.folder)))


def ignore_mismatched_sizes(saved: Saved, first: bool) -> Any:
    saved = Saved(saved.method, saved.folder, modules_to_save=["classifier"])
    larger = lambda: saved.fresh(num_labels=7)  # noqa: E731
    model, said = warned(lambda: load_peft(saved, first, larger(), ignore_mismatched_sizes=True))
    return (
        says(model).shape,
        any("were not initialized" in text for text in said),
        refused(lambda: load_peft(saved, first, larger())),
    )


def devices(saved: Saved, first: bool) -> Any:
    """A base model that accelerate has spread over devices."""
    base = saved.fresh()
    base.hf_device_map = {"": "cpu"}
    options = {"device_map": {"": "cpu"}, "max_memory": {"cpu": "1GB"}, "offload_dir": str(saved.folder)}
    return saved.right(load_peft(saved, first, base, **options))


PEFT = {
    "model": lambda saved, first: saved.right(load_peft(saved, first)),
    "model_id": lambda saved, first: saved.right(load_peft(saved, first, model_id=str(saved.folder))),
    "adapter_name": adapter_name,
    "is_trainable": is_trainable,
    "config": given_config,
    "autocast_adapter_dtype": autocast,
    "low_cpu_mem_usage": low_cpu_mem_usage,
    "key_mapping": key_mapping,
    "torch_device": torch_device,
    "kwargs: subfolder": subfolder,
    "kwargs: revision, token, cache_dir": of_the_hub,
    "kwargs: ignore_mismatched_sizes": ignore_mismatched_sizes,
    "kwargs: device_map, max_memory, offload_dir": devices,
}
NOT_AS_LORA = {"ephemeral_gpu_offload", "hotswap"}  # their answers have tests of their own below
LOADERS = {"from_pretrained": True, "load_adapter": False}  # what takes no such option takes it for peft's others


def options_of(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def untested(function: Callable[..., Any], tested: dict[str, Any]) -> set[str]:
    return options_of(function) - {name.partition(":")[0] for name in tested} - NOT_AS_LORA


@pytest.mark.parametrize("option", PEFT)
@pytest.mark.parametrize("loader", LOADERS)
def test_an_option_of_peft_does_what_it_does_for_lora(loader: str, option: str, tmp_path: Path) -> None:
    found = {name: PEFT[option](Saved(method, tmp_path / name), LOADERS[loader]) for name, method in METHODS.items()}
    assert found["fvae-lora"] == found["lora"]


@pytest.mark.parametrize("first", [True, False])
def test_a_mapping_of_names_loads_the_saved_adapter(first: bool, tmp_path: Path) -> None:
    saved = Saved(METHODS["fvae-lora"], tmp_path)
    saved.rename("model.bert.", "model.transformer.")
    assert saved.right(load_peft(saved, first, key_mapping=MAPPING))


@pytest.mark.parametrize("first", [True, False])
def test_a_mapping_does_not_hide_shapes_that_do_not_fit(first: bool, tmp_path: Path) -> None:
    saved = Saved(METHODS["fvae-lora"], tmp_path)
    saved.rename("model.bert.", "model.transformer.")
    base = tiny_bert(hidden_size=32)
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(ValueError, match=r"does not fit .* shape"):
        PeftModel.from_pretrained(base, saved.folder, key_mapping=MAPPING)
    assert [name for name, _ in base.named_parameters()] == names


def test_ephemeral_offloading_is_left_out_with_a_word(tmp_path: Path) -> None:
    saved = Saved(METHODS["fvae-lora"], tmp_path)
    model, said = warned(lambda: load_peft(saved, True, ephemeral_gpu_offload=True))
    assert saved.right(model)
    assert any("Ephemeral GPU offloading is not supported" in text for text in said)
    assert saved.right(load_peft(saved, False, ephemeral_gpu_offload=True))


# --- A state dict ---------------------------------------------------------------------------------------------------


def into(saved: Saved, base: PreTrainedModel | None = None, weights: Any = None, **options: Any) -> Any:
    name = options.get("adapter_name", "default")
    low = {"low_cpu_mem_usage": True} if options.get("low_cpu_mem_usage") else {}
    model = get_peft_model(base or saved.fresh(), saved.method(**saved.fields), adapter_name=name, **low)
    result = set_peft_model_state_dict(model, saved.weights if weights is None else weights, **options)
    return model, result


def a_part(saved: Saved) -> Any:
    """What is not there stays as it is, and is in the result."""
    some = dict(list(saved.weights.items())[:1])
    _, result = into(saved, weights=some | {"base_model.model.nothing.weight": torch.ones(1)})
    return bool(result.missing_keys), result.unexpected_keys


def other_sizes(saved: Saved) -> Any:
    saved = Saved(saved.method, saved.folder, modules_to_save=["classifier"])
    (model, _), said = warned(lambda: into(saved, saved.fresh(num_labels=7), ignore_mismatched_sizes=True))
    return (
        says(model).shape,
        any("were not initialized" in text for text in said),
        refused(lambda: into(saved, saved.fresh(num_labels=7))),
    )


STATE = {
    "model": lambda saved: saved.right(into(saved)[0]),
    "peft_model_state_dict": a_part,
    "adapter_name": lambda saved: saved.right(into(saved, adapter_name="other")[0]),
    "ignore_mismatched_sizes": other_sizes,
    "low_cpu_mem_usage": lambda saved: saved.right(into(saved, low_cpu_mem_usage=True)[0]),
}


@pytest.mark.parametrize("option", STATE)
def test_an_option_of_a_state_dict_does_what_it_does_for_lora(option: str, tmp_path: Path) -> None:
    found = {name: STATE[option](Saved(method, tmp_path / name)) for name, method in METHODS.items()}
    assert found["fvae-lora"] == found["lora"]


# --- transformers ---------------------------------------------------------------------------------------------------


def load_transformers(saved: Saved, folder: Any = ..., **options: Any) -> PreTrainedModel:
    base = saved.fresh()
    base.load_adapter(str(saved.folder) if folder is ... else folder, **options)
    return base


def a_state_dict(saved: Saved) -> Any:
    """The configuration is a folder's, the weights come with other names."""
    read = type(saved.method()).from_pretrained(saved.folder)
    return saved.right(load_transformers(saved, None, peft_config=read, adapter_state_dict=saved.weights))


def trainable_in_transformers(saved: Saved) -> Any:
    models = [load_transformers(saved, is_trainable=value) for value in (True, False)]
    return [{p.requires_grad for p in of_adapter(m)} for m in models], [saved.right(m) for m in models]


def by_auto_class(saved: Saved) -> Any:
    """``from_pretrained`` of a model hands its own options on: a mapping of names here."""
    saved.fresh().save_pretrained(saved.folder)
    right = saved.right(AutoModelForSequenceClassification.from_pretrained(saved.folder))
    saved.rename("model.bert.", "model.transformer.")
    mapping = {r"transformer\.encoder": "bert.encoder"}
    return right, saved.right(AutoModelForSequenceClassification.from_pretrained(saved.folder, key_mapping=mapping))


TRANSFORMERS: dict[str, Callable[[Saved], Any]] = {
    "peft_model_id": lambda saved: saved.right(load_transformers(saved)),
    "adapter_name": lambda saved: list(load_transformers(saved, adapter_name="other").peft_config),
    "peft_config": a_state_dict,
    "adapter_state_dict": a_state_dict,
    "low_cpu_mem_usage": lambda saved: saved.right(load_transformers(saved, low_cpu_mem_usage=True)),
    "is_trainable": trainable_in_transformers,
    "local_files_only": lambda saved: or_error(lambda: saved.right(load_transformers(saved, local_files_only=True))),
    "adapter_kwargs": lambda saved: saved.right(
        load_transformers(saved, str(saved.folder.parent), adapter_kwargs={"subfolder": saved.folder.name})
    ),
    "load_config": by_auto_class,
    "kwargs: use_safetensors": lambda saved: saved.right(load_transformers(saved, use_safetensors=True)),
}


@pytest.mark.parametrize("option", TRANSFORMERS)
def test_an_option_of_transformers_does_what_it_does_for_lora(option: str, tmp_path: Path) -> None:
    if option.partition(":")[0] not in options_of(PeftAdapterMixin.load_adapter):
        pytest.skip("not one of its options")
    if option.startswith("adapter_kwargs") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("before transformers 5.23 this option does not find the weights of a LoRA, either")
    found = {name: TRANSFORMERS[option](Saved(method, tmp_path / name)) for name, method in METHODS.items()}
    assert found["fvae-lora"] == found["lora"]


def test_hotswapping_through_transformers_is_refused(tmp_path: Path) -> None:
    saved = Saved(METHODS["fvae-lora"], tmp_path)
    model = load_transformers(saved)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(str(saved.folder), adapter_name="default", hotswap=True)
    assert saved.right(model)


# --- Those of a version to come -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "tested"),
    [
        (PeftModel.from_pretrained, PEFT),
        (PeftModel.load_adapter, PEFT),
        (set_peft_model_state_dict, STATE),
        (PeftAdapterMixin.load_adapter, TRANSFORMERS),
    ],
)
def test_every_option_has_a_test(function: Callable[..., Any], tested: dict[str, Any]) -> None:
    assert not untested(function, tested), "try it above, beside LoRA"
