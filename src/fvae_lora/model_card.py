"""What an adapter's README says about loading it: stock peft cannot, unless this package is imported."""

from __future__ import annotations

from pathlib import Path

MARKER = "<!-- fvae-lora: how to load -->"


def say_how_to_load(folder: Path, rank: int, base_model: str | None) -> None:
    """Add to the README of an adapter's folder what must be installed and imported to load it.

    Args:
        folder: The adapter's folder; its README is made if there is none, and is left alone if it says so already.
        rank: The adapter's rank.
        base_model: Name of the model that it belongs to, if it is known.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if MARKER in text:
        return
    base = " ".join(str(base_model or "the base model").replace("`", "'").split())  # one line
    section = f"""{MARKER}
## How to load this adapter

It is an FVAE-LoRA adapter (rank {rank}). Install `fvae-lora` beside peft and import it before loading; without
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
