"""Labelled rows: where they come from, how they are split, and a fingerprint of what they are."""

from fvae_lora.experiments.data.fingerprint import fingerprint
from fvae_lora.experiments.data.source import open_source
from fvae_lora.experiments.data.splits import Splits, split

__all__ = ["Splits", "fingerprint", "open_source", "split"]
