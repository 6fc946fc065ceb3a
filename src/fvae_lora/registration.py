"""Registers FVAE_LORA as a method of unmodified peft."""

from __future__ import annotations

from typing import Any, NoReturn

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "FVAE_LORA"
REFERENCE_TYPES = ("FVAEPEFT", "FVAE_PEFT")


def add_peft_type() -> None:
    """Add the member that `peft.utils.register_peft_method` needs to the enum of peft's methods."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register() -> None:
    """Register configuration and tuner; calling it again does nothing."""
    from .config import FVAELoraConfig
    from .peft_model import FVAELoraModel

    if PeftType(NAME) in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(
        name=NAME.lower(), config_cls=FVAELoraConfig, model_cls=FVAELoraModel, prefix=FVAELoraModel.prefix
    )
    for reference_type in REFERENCE_TYPES:
        PEFT_TYPE_TO_CONFIG_MAPPING[reference_type] = _ReferenceAdapter


class _ReferenceAdapter:
    """Registered as the configuration of the reference implementation's adapters, to say how to load them."""

    def __init__(self, **_: Any) -> None:
        self.from_pretrained("this folder")

    @staticmethod
    def from_pretrained(folder: str, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"{folder} holds an adapter of the reference implementation; load it with "
            "fvae_lora.load_reference_adapter(base_model, folder)"
        )
