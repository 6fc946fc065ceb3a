"""Models and data sets that are always there: known by name without opening any."""

from importlib.resources import files
from pathlib import Path

MODELS = {"vit-fashion-mnist": Path(str(files("fvae_lora_experiments"))) / "assets" / "vit-fashion-mnist"}
"""Models that come with this package, and their folders."""

DIGITS = "sklearn-digits"
DATASETS = (DIGITS,)
"""Data sets that come with a package."""
