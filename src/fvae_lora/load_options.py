"""The options of peft's call that is loading an adapter.

peft first puts the layers into the model and then applies these options to the weights, without passing them to the
tuner. To refuse weights that do not fit before the model is changed, they are read from the stack frame of peft's call.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft import PeftModel

from .adapter_folder import PEFT_PREFIX

LOADERS = {PeftModel.from_pretrained.__func__.__code__, PeftModel.load_adapter.__code__}


@dataclass(frozen=True)
class LoadOptions:
    """Which weight goes where, and what happens to one that does not fit."""

    key_mapping: Mapping[str, str] = field(default_factory=dict)
    ignore_mismatched_sizes: bool = False

    @classmethod
    def from_running_call(cls) -> LoadOptions | None:
        """The options of peft's call that is loading an adapter; ``None`` if none is."""
        frame = sys._getframe()
        while frame.f_code not in LOADERS:
            if frame.f_back is None:
                return None
            frame = frame.f_back
        arguments = frame.f_locals
        return cls(arguments["key_mapping"] or {}, bool(arguments["kwargs"].get("ignore_mismatched_sizes")))

    def renamed(self, key: str) -> str:
        """The name that peft gives to a weight of the checkpoint: it replaces the first pattern that matches.

        Args:
            key: Its name without ``base_model.model.``, or with it.

        Returns:
            The same without the prefix.
        """
        key = key.removeprefix(PEFT_PREFIX)
        for pattern, replacement in self.key_mapping.items():
            renamed, matches = re.subn(pattern, replacement, key)
            if matches:
                return renamed
        return key
