"""What the package is from outside: its names, its documentation, what importing it costs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import fvae_lora
from fvae_lora import FVAELoraConfig

NAMES = {
    "LOGVAR_RANGE",
    "ConversionReport",
    "ElboTrainerMixin",
    "FVAELoraConfig",
    "FVAELoraTrainer",
    "FVAEPEFTConfig",
    "ForeignInputDetector",
    "ForeignScores",
    "LayerScores",
    "LayerSummary",
    "UncertainPrediction",
    "adapter_folder",
    "add_elbo",
    "convert_to_lora",
    "elbo_loss",
    "elbo_terms",
    "export_for_inference",
    "is_training_only",
    "load_reference_adapter",
    "predict_with_uncertainty",
    "resolve_targets",
    "score_inputs",
    "summarise_layers",
}
OF_THE_EXPERIMENTS = {"datasets", "fvae_lora_experiments", "matplotlib", "pandas", "pydantic", "typer"}
OF_THE_EXPERIMENTS |= {"transformers.trainer"}

OPTIONS = Path(__file__).parents[1] / "docs" / "options.md"


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def imports() -> dict[str, list[str]]:
    """What is there in a process after it imports peft, then this package, then asks for its Trainer."""
    return json.loads(
        python(
            "import json, sys, peft, transformers.conversion_mapping, transformers.core_model_loading\n"
            "kinds = lambda: [str(member.value) for member in peft.utils.PeftType]\n"
            "found = {'kinds of peft': kinds(), 'peft': list(sys.modules)}\n"
            "import fvae_lora\n"
            "found |= {'kinds': kinds(), 'package': list(sys.modules)}\n"
            "fvae_lora.FVAELoraTrainer\n"
            "print(json.dumps(found | {'trainer': list(sys.modules)}))"
        )
    )


def test_the_public_names_are_those_that_were_promised() -> None:
    assert set(fvae_lora.__all__) == NAMES
    assert all(hasattr(fvae_lora, name) for name in NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FVAELoraModell'"):
        _ = fvae_lora.FVAELoraModell
    with pytest.raises(ImportError):
        from fvae_lora import nothing_of_the_kind  # noqa: F401


def raises(function: object) -> bool:
    return "raise " in inspect.getsource(function) or "_require(" in inspect.getsource(function)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_is_documented(name: str) -> None:
    public = getattr(fvae_lora, name)
    doc = inspect.getdoc(public)
    assert doc
    if not callable(public) or (inspect.isclass(public) and name != "FVAELoraConfig"):
        return
    arguments = doc.partition("Args:")[2]
    for argument in inspect.signature(public).parameters:
        described = f"{argument}:" in arguments
        inherited = name == "FVAELoraConfig" and argument in inspect.signature(PeftConfig).parameters
        assert described or inherited, argument
    if not inspect.isclass(public):
        assert "Returns:" in doc or inspect.signature(public).return_annotation == "None"
    if raises(public):
        assert "Raises:" in doc


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_function_has_types(name: str) -> None:
    public = getattr(fvae_lora, name)
    if inspect.isfunction(public):
        signature = inspect.signature(public)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_the_method_is_registered_with_peft() -> None:
    kind = PeftType("FVAE_LORA")
    assert kind == "FVAE_LORA" == kind.value == kind.name == PeftType.FVAE_LORA
    assert kind in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is fvae_lora.FVAELoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind].__name__ == "FVAELoraModel"
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == "fvae_lora_"
    assert fvae_lora.FVAELoraConfig().peft_type is kind


def test_pefts_own_methods_stay_what_they_were(imports: dict[str, list[str]]) -> None:
    assert imports["kinds"] == [*imports["kinds of peft"], "FVAE_LORA"]


@pytest.mark.slow
def test_importing_twice_is_harmless() -> None:
    python(
        "import importlib, fvae_lora, sys\n"
        "for name in [n for n in sys.modules if n.startswith('fvae_lora')]: del sys.modules[name]\n"
        "import fvae_lora\n"
        "from peft import get_peft_model; import torch\n"
        "config = fvae_lora.FVAELoraConfig(target_modules=['0'])\n"
        "get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)\n"
        "print('fine')"
    )


def test_importing_it_brings_nothing_of_the_experiments(imports: dict[str, list[str]]) -> None:
    """Nothing but itself, and what peft and the parts of transformers that it uses bring anyway."""
    ours, theirs = set(imports["package"]), set(imports["peft"])
    assert not ours & OF_THE_EXPERIMENTS
    added = {name.partition(".")[0] for name in ours - theirs}
    assert added - set(sys.stdlib_module_names) <= {"fvae_lora", "peft", "torch", "transformers"}


def test_the_trainer_is_imported_when_asked_for(imports: dict[str, list[str]]) -> None:
    assert "transformers.trainer" in set(imports["trainer"]) - set(imports["package"])


def test_the_method_depends_on_four_packages() -> None:
    requirements = importlib.metadata.requires("fvae-lora")
    core = {r.partition(">")[0].partition("=")[0].strip() for r in requirements if "extra ==" not in r}
    assert core == {"torch", "peft", "transformers", "safetensors"}


def test_the_package_is_typed() -> None:
    assert (importlib.resources.files("fvae_lora") / "py.typed").is_file()


def test_every_option_that_lora_does_not_have_is_on_the_page_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", OPTIONS.read_text(encoding="utf-8"), re.MULTILINE))
    ours, loras = ({field.name for field in dataclasses.fields(kind)} for kind in (FVAELoraConfig, LoraConfig))
    assert listed == {name: repr(getattr(FVAELoraConfig(), name)) for name in ours - loras}
