"""The methods that can be compared: each turns a pretrained model into the one that is trained."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from fvae_lora import FVAELoraConfig
from fvae_lora.experiments.errors import UserError
from fvae_lora.experiments.heads import head_modules
from fvae_lora.experiments.recipe import Recipe
from fvae_lora.names import resolve_targets


@dataclass(frozen=True)
class Method:
    """One method.

    `config` makes its adapter's configuration from the recipe, the names of the modules to adapt and of the head;
    None trains every parameter. Parameters with one of `training_only` in their names are not needed at inference.
    """

    summary: str
    config: Callable[[Recipe, PreTrainedModel], PeftConfig] | None
    training_only: tuple[str, ...] = ()

    def apply(self, model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
        """`model`, changed in place, with this method's parameters trainable and all others frozen."""
        if self.config is None:
            return model
        try:
            config = self.config(recipe, model)
        except ValueError as error:
            raise UserError(f"recipe: {error}") from error
        adapted = get_peft_model(model, config)
        _keep_statistics(adapted)
        return adapted

    def inference_parameters(self, model: nn.Module) -> int:
        """How many of the trainable parameters are still needed once training is over."""
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        return sum(p.numel() for name, p in trained if not any(part in name for part in self.training_only))


def _fvae_lora(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    return FVAELoraConfig(
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha,
        lora_dropout=recipe.adapter.dropout,
        target_modules=adapted_modules(model, recipe.adapter.target_modules),
        modules_to_save=head_modules(model),
        **recipe.fvae.model_dump(),
    )


def _lora(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    return LoraConfig(
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha or recipe.adapter.r,
        lora_dropout=recipe.adapter.dropout,
        target_modules=adapted_modules(model, recipe.adapter.target_modules),
        modules_to_save=head_modules(model),
    )


def _linear_probe(_: Recipe, model: PreTrainedModel) -> PeftConfig:
    # LoRA on no layer at all: the head is trained, saved and loaded exactly as it is for the other adapters.
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=head_modules(model))


METHODS = {
    "fvae-lora": Method(
        "LoRA whose down-projection is the encoder of a VAE with two latents",
        _fvae_lora,
        training_only=("encoder2", "decoder", "logvar", "log_tau"),
    ),
    "lora": Method("LoRA on the same modules, with the same rank", _lora),
    "linear-probe": Method("the classification head alone", _linear_probe),
    "full": Method("every parameter of the model", None),
}


def adapted_modules(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The names in `wanted` as this model spells them: ViT's `query` is `q_proj` in transformers 5.

    Raises:
        UserError: if the model has no module of a name; lists the names of its linear layers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recipes use the old names on purpose: they fit more models
            return sorted(resolve_targets(model, wanted))
    except ValueError as error:
        raise UserError(f"adapter.{error}") from error


def _keep_statistics(model: nn.Module) -> None:
    """Frozen batch norms go on using the statistics of pre-training: an adapter's folder could not carry new ones."""
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters())
        if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(False)
            module.train = partial(_stay, module)  # type: ignore


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
