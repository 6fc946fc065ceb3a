"""The head of a model, which turns features into classes."""

from transformers import PreTrainedModel

from fvae_lora_experiments.errors import UserError


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
