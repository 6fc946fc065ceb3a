"""A pytest plugin that turns peft's test-suite on FVAE-LoRA: wherever the suite says ``LoraConfig``, ours stands.

- ``peft.LoraConfig`` is replaced before the suite imports it, so its lists of cases and its examples hold ours.
- Cases of other methods, and tests in which our configuration is never made, are left out.
- A test whose options are LoRA's own, or that ends in one of our refusals, is skipped with a reason, and so is what
  `exclusions` names. Everything else must pass.
- Under the profile "full" the suite's ``loss.backward()`` adds the ELBO first, as `fvae_lora.add_elbo` does: a loss
  without it is an error by design. Under "linear" (a linear encoder, no ELBO) no line of a test is changed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import peft
import peft.tuners.lora
import pytest
import torch
from exclusions import EXCLUDED, HEAVIER_ELBO, LOWER_RATE, REFUSALS, WITHOUT_NOISE
from peft import PeftConfig
from torch import Tensor, nn

from fvae_lora import FVAELoraConfig, elbo_loss, hooks, objective
from fvae_lora import peft_model as tuner
from fvae_lora.layer import FVAELoraLayer
from fvae_lora.recorder import State as ElboState

PROFILES: dict[str, dict[str, Any]] = {
    "full": {"decoder_hidden_dims": [8]},
    "linear": {"encoder_hidden_dims": [], "elbo_weight": 0.0},
}
Lora = peft.LoraConfig
NOT_OURS = "makes no configuration of ours"


class State:
    """Of the test that is running."""

    profile = "full"
    fields: ClassVar[dict[str, Any]] = {}
    in_test = False
    made_ours = False
    adapted: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()


class LorasOwn:
    """What a case holds, made while the suite is imported, that needs an option of LoRA's own."""

    def __init__(self, option: str) -> None:
        self.option = option


class _MakesOurs(type):
    def __call__(cls, task_type: Any = None, **kwargs: Any) -> Any:
        State.made_ours = True
        if (option := loras_own_option(kwargs)) is not None:
            if State.in_test:
                pytest.skip(f"{option} is an option of LoRA's own")
            return LorasOwn(option)
        return FVAELoraConfig(task_type=task_type, **State.fields | translated(kwargs))

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, FVAELoraConfig)


class InPlaceOfLora(FVAELoraConfig, metaclass=_MakesOurs):
    """What the suite finds under the name of ``LoraConfig``."""


InPlaceOfLora.__name__ = FVAELoraConfig.__name__  # peft's messages name the class


def loras_own_option(kwargs: dict[str, Any]) -> str | None:
    """The name of an option that FVAE-LoRA does not have, if one is set."""
    ours = FVAELoraConfig.__dataclass_fields__
    for name, value in kwargs.items():
        field = Lora.__dataclass_fields__.get(name)
        is_default = field is not None and value == field.default
        if name not in ours and not is_default and not (name == "init_lora_weights" and isinstance(value, bool)):
            return name
    return None


def translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    """LoRA's arguments as ours."""
    own = {name: value for name, value in kwargs.items() if name in FVAELoraConfig.__dataclass_fields__}
    fields = {"r": Lora.r, "lora_alpha": Lora.lora_alpha} | own
    if "init_lora_weights" in kwargs:
        fields["init_weights"] = kwargs["init_lora_weights"]
    if fields.get("bias") == "lora_only":
        fields["bias"] = "fvae_lora_only"
    return fields


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", choices=tuple(PROFILES), default="full")


def pytest_configure(config: pytest.Config) -> None:
    State.profile = config.getoption("--profile")
    State.fields = PROFILES[State.profile]
    peft.LoraConfig = InPlaceOfLora
    for module in (peft.tuners.lora, peft.tuners.lora.layer):
        module.LoraLayer = FVAELoraLayer
    stub_optional_packages()
    import tests.testing_utils as utils

    utils._HUB_MODEL_ACCESSES = _EveryModel()  # the suite goes online for a model that it has not yet seen
    utils.load_cat_image = lambda: np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    torch.set_num_threads(1)
    hooks_recorder_of = tuner.recorder_of

    def noted(model: nn.Module) -> Any:
        State.adapted.add(model)
        return hooks_recorder_of(model)

    tuner.recorder_of = noted
    if State.profile == "full":
        Tensor.backward = with_elbo(Tensor.backward)


class _EveryModel(Counter):
    def __contains__(self, _: object) -> bool:
        return True


def with_elbo(backward: Callable[..., None]) -> Callable[..., None]:
    """The suite's ``loss.backward()``, after the ELBO of what ran was added."""

    def run(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        for model in list(State.adapted):
            recorder = vars(model).get(hooks.ATTRIBUTE)
            if recorder is not None and any(forward.state is ElboState.WAITING for forward in recorder.forwards):
                loss = loss + elbo_loss(model)
        backward(loss, *args, **kwargs)

    return run


def stub_optional_packages() -> None:
    """Of these the suite wants a name or two where nothing is loaded; parameterized is one decorator."""
    stub("datasets", load_dataset=None)
    stub("diffusers", __version__="0.0", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    stub("parameterized", parameterized=types.SimpleNamespace(expand=_expand))


def stub(name: str, **attributes: Any) -> None:
    """Put a module in the place of a package that is not installed."""
    if importlib.util.find_spec(name) is None:
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(attributes)


def _expand(cases: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        names = list(inspect.signature(test).parameters)[1:]
        rows = [tuple(case)[: len(names)] for case in cases]
        return pytest.mark.parametrize(names, [row if len(names) > 1 else row[0] for row in rows])(test)

    return decorate


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leave out the cases of other methods before pytest makes tests of them, some thirty thousand."""
    for marker in metafunc.definition.iter_markers("parametrize"):
        names, rows, *rest = marker.args
        kept = [row for row in rows if not _of_another_method(row)]
        if len(kept) < len(rows):
            object.__setattr__(marker, "args", (names, kept, *rest))
            object.__setattr__(marker, "kwargs", {key: value for key, value in marker.kwargs.items() if key != "ids"})


def _of_another_method(row: Any) -> bool:
    values = getattr(row, "values", row)  # of pytest.param
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, type) and issubclass(value, PeftConfig) and value is not InPlaceOfLora:
            return True
        if isinstance(value, PeftConfig) and not isinstance(value, FVAELoraConfig):
            return True
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what `exclusions` names and what asks for LoRA's own options."""
    for item in items:
        if (reason := _reason_to_skip(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _values(item: pytest.Item) -> Iterator[Any]:
    callspec = getattr(item, "callspec", None)
    yield from callspec.params.values() if callspec else ()


def _reason_to_skip(item: pytest.Item) -> str | None:
    name = item.nodeid.removeprefix("tests/")
    for pattern, reason in EXCLUDED.items():
        if re.search(pattern, name):
            return reason
    for value in _values(item):
        option = value.option if isinstance(value, LorasOwn) else None
        if isinstance(value, dict):
            option = loras_own_option(value) if set(value) <= set(Lora.__dataclass_fields__) else None
        if option is not None:
            return f"{option} is an option of LoRA's own"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    State.in_test, State.made_ours = True, any(isinstance(value, FVAELoraConfig) for value in _values(item))
    State.adapted.clear()
    State.fields = dict(PROFILES[State.profile])
    if State.profile == "full" and any(re.search(pattern, item.nodeid) for pattern in HEAVIER_ELBO):
        State.fields["elbo_weight"] = 0.1
    noise, sgd = objective.standard_normal, torch.optim.SGD
    if any(re.search(pattern, item.nodeid) for pattern in LOWER_RATE):
        torch.optim.SGD = lambda parameters, lr: sgd(parameters, lr=min(lr, 0.01))
    if any(re.search(pattern, item.nodeid) for pattern in WITHOUT_NOISE):
        objective.standard_normal = lambda *arguments: torch.zeros_like(noise(*arguments))
    try:
        return (yield)
    finally:
        objective.standard_normal, torch.optim.SGD = noise, sgd
        State.in_test = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Fixtures may adapt a model too."""
    try:
        return (yield)
    except Exception as error:
        _skip_if_refused(error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skip, with its reason, a test that has nothing to do with us or that ends in one of our refusals."""
    try:
        return (yield)
    except Exception as error:
        _skip_if_refused(error)
        raise
    finally:
        if not State.made_ours:
            pytest.skip(NOT_OURS)


def _skip_if_refused(error: Exception) -> None:
    for pattern, reason in REFUSALS.items():
        if re.search(pattern, str(error)):
            pytest.skip(reason)
