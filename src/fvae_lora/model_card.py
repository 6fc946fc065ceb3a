"""What an adapter's README says about loading it: stock peft cannot, unless this package is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import FVAELoraConfig

MARKER = "<!-- fvae-lora: how to load -->"


def say_how_to_load(folder: Path, config: FVAELoraConfig) -> None:
    """Add to the README of an adapter's folder what must be installed and imported to load it.

    Args:
        folder: The adapter's folder; its README is made if there is none, and is left alone if it says so already.
        config: The adapter's configuration.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if MARKER in text:
        return
    base = " ".join(str(config.base_model_name_or_path or "the base model").replace("`", "'").split())  # one line
    section = f"""{MARKER}
## How to load this adapter

It is an FVAE-LoRA adapter (rank {config.r}). Install `fvae-lora` beside peft and import it before loading; without
the import peft stops with `KeyError: 'FVAE_LORA'`.

```sh
pip install fvae-lora
```

```python
import fvae_lora  # registers FVAE_LORA with peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")  # base_model: {base}
```
"""
    readme.write_text(f"{text.rstrip()}\n\n{section}" if text else section, encoding="utf-8")
