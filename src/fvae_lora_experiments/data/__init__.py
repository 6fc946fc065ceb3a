"""Labelled rows: where they come from, how they are split and grouped, and a fingerprint of what they are."""

from fvae_lora_experiments.data.fingerprint import fingerprint
from fvae_lora_experiments.data.groups import accuracies, group_counts
from fvae_lora_experiments.data.images import open_images
from fvae_lora_experiments.data.splits import Splits, split
from fvae_lora_experiments.data.spurious import unlike_published

__all__ = ["Splits", "accuracies", "fingerprint", "group_counts", "open_images", "split", "unlike_published"]
