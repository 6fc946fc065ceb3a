"""The page of options has every field that LoRA does not have, with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from peft import LoraConfig

from fvae_lora import FVAELoraConfig

PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text(encoding="utf-8")


def test_every_option_that_lora_does_not_have_is_on_the_page_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", PAGE, re.MULTILINE))
    ours, loras = ({field.name for field in dataclasses.fields(kind)} for kind in (FVAELoraConfig, LoraConfig))
    assert listed == {name: repr(getattr(FVAELoraConfig(), name)) for name in ours - loras}
