"""The head of a model, which turns features into classes."""

from pathlib import Path

from transformers import PreTrainedModel

from fvae_lora import adapter_folder
from fvae_lora_experiments.errors import UserError

SAVED_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
"""How the names of a saved head's last weights end."""


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the head's modules: all children of the model except the largest, which is the backbone.

    A generative model has none: what turns its features into tokens is pretrained.

    Raises:
        UserError: the head is inside the backbone.
    """
    if model.get_output_embeddings() is not None:
        return []
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    backbone = max(sizes, key=lambda name: sizes[name])
    heads = [name for name, size in sizes.items() if size and name != backbone]
    if not heads:
        raise UserError(f"model: {type(model).__name__} has no classification head beside its backbone `{backbone}`")
    return heads


def draw_new_head(model: PreTrainedModel) -> None:
    """Draws new parameters for the head from torch's global generator."""
    for name in head_modules(model):
        for module in model.get_submodule(name).modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def saved_head_size(adapter: Path) -> int | None:
    """How many outputs the classification head has that is saved in an adapter's folder; None without one."""
    sizes = [shape[0] for key, shape in adapter_folder.shapes(adapter).items() if key.endswith(SAVED_HEADS)]
    return sizes[0] if sizes else None
