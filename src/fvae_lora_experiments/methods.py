"""The methods that can be compared: each turns a pretrained model into the one that is trained.

Listing and checking methods needs neither peft nor torch, which are only imported when a model is adapted: the command
line must answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from fvae_lora_experiments.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from fvae_lora_experiments.schema import Recipe

Configure = Callable[["Recipe", "PreTrainedModel"], "PeftConfig"]


@dataclass(frozen=True)
class Method:
    """One method.

    `config` makes its adapter's configuration from the recipe and the model; None trains every parameter. `defaults`
    are a recipe's dotted keys that define the method: they win over the recipe's common sections, and lose to its
    `per_method` and to overrides. `training_only` gives the share of a parameter, by name, that inference does not
    need.
    """

    summary: str
    config: Configure | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training_only: Callable[[str], float] = lambda _: 0.0
    resumable: bool = True
    """Whether training can resume from a checkpoint; if not, an interrupted run starts again."""
    draws_z1: bool = False
    """Whether it has a latent that can be drawn at inference, too."""
    adapts_layers: bool = True
    """Whether it has a rank, at the layers that it adapts."""

    def apply(self, model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
        """`model`, changed in place, with this method's parameters trainable and all others frozen."""
        if self.config is None:
            return model
        from peft import get_peft_model

        from fvae_lora_experiments.ablation import ablate

        try:
            adapted = get_peft_model(model, self.config(recipe, model))
        except ValueError as error:
            raise UserError(f"recipe: {error}") from error
        ablate(adapted, **recipe.ablation.model_dump())
        _freeze_batch_norms(adapted)
        return adapted

    def inference_parameters(self, model: nn.Module, trained: Collection[str]) -> int:
        """How many of the `trained` parameters, given by name, `model` still needs after training."""
        counts = ((name, p.numel()) for name, p in model.named_parameters() if name in trained)
        return sum(n - int(n * self.training_only(name)) for name, n in counts)


def _modules(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    from fvae_lora_experiments.models.heads import head_modules
    from fvae_lora_experiments.models.targets import adapted_modules, in_layers

    targets, layers = adapted_modules(model, recipe.adapter.target_modules), recipe.adapter.layers
    return {
        "target_modules": targets if layers is None else in_layers(model, targets, layers),
        "modules_to_save": head_modules(model) or None,
    }


def _fvae_lora(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    from fvae_lora import FVAELoraConfig

    return FVAELoraConfig(
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha,
        lora_dropout=recipe.adapter.dropout,
        **_modules(recipe, model),
        **recipe.fvae.model_dump(),
    )


def _lora(recipe: Recipe, model: PreTrainedModel, **variant: Any) -> PeftConfig:
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha or recipe.adapter.r,
        lora_dropout=recipe.adapter.dropout,
        **_modules(recipe, model),
        **variant,
    )


def _hira(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    from peft import HiraConfig

    return HiraConfig(r=recipe.adapter.r, hira_dropout=recipe.adapter.dropout, **_modules(recipe, model))


def _adalora(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    from peft import AdaLoraConfig

    first = ceil(1.5 * recipe.adapter.r)
    return AdaLoraConfig(
        init_r=first,
        target_r=recipe.adapter.r,
        lora_alpha=(recipe.adapter.alpha or recipe.adapter.r) * first / recipe.adapter.r,
        lora_dropout=recipe.adapter.dropout,
        total_step=1,  # set when training begins and its length is known (`run.adalora.RankSchedule`)
        tinit=0,
        tfinal=0,
        **_modules(recipe, model),
    )


def _vera(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    from peft import VeraConfig

    return VeraConfig(r=recipe.adapter.r, vera_dropout=recipe.adapter.dropout, **_modules(recipe, model))


def _pvera(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    from peft import PveraConfig

    return PveraConfig(r=recipe.adapter.r, pvera_dropout=recipe.adapter.dropout, **_modules(recipe, model))


def _linear_probe(_: Recipe, model: PreTrainedModel) -> PeftConfig:
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from fvae_lora_experiments.models.heads import head_modules

    # LoRA on no layer: the head is trained, saved and loaded exactly as for the other adapters.
    if not (head := head_modules(model)):
        raise UserError(f"method linear-probe: {type(model).__name__} has no task head to train")
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=head)


def _is_training_only(name: str) -> bool:
    from fvae_lora import is_training_only

    return is_training_only(name)


_fvae_method = partial(Method, config=_fvae_lora, training_only=_is_training_only, draws_z1=True)

METHODS: dict[str, Method] = {
    "fvae-lora": _fvae_method("LoRA whose down-projection is the encoder of a VAE with two latents"),
    "fvae-lora-reference": _fvae_method(
        "FVAE-LoRA with the objective and the settings of the reference implementation",
        defaults={
            "adapter.alpha": 8,  # a scale of 0.5 at r = 16
            "adapter.dropout": 0,  # the reference reads the setting but never applies it
            "fvae.objective": "reference",
            "fvae.encoder_hidden_dims": [16],
            "fvae.encoder_dropout": 0.1,
            "fvae.decoder_hidden_dims": [128, 128, 128],
            "fvae.decoder_dropout": 0.1,
            "fvae.elbo_weight": 1,
            "fvae.kl_weight": 1,
            "fvae.factorization_weight_z1": 1,
            "fvae.factorization_weight_z2": 1,
            "fvae.task_weight": 1000,
            "fvae.layer_reduction": "mean",
        },
    ),
    "vae2lat": _fvae_method(
        "FVAE-LoRA with a plain ELBO for both latents",
        defaults={"fvae.objective": "vae2lat", "fvae.kl_weight": 1},
    ),
    "beta-vae2lat": _fvae_method(
        "vae2lat with the KL terms weighted by fvae.kl_weight",
        defaults={"fvae.objective": "vae2lat", "fvae.kl_weight": 10},
    ),
    "fvae-no-elbo": _fvae_method(
        "only FVAE-LoRA's first encoder and its noise, without an ELBO", defaults={"fvae.elbo_weight": 0}
    ),
    "lora": Method("LoRA on the same modules, with the same rank", _lora),
    "rslora": Method("LoRA with the scale alpha / sqrt(r)", partial(_lora, use_rslora=True)),
    "dora": Method("LoRA on the weights' direction, with a separate magnitude", partial(_lora, use_dora=True)),
    "pissa": Method(
        "LoRA that starts from the weights' largest singular values",
        partial(_lora, init_lora_weights="pissa"),
        defaults={"adapter.dropout": 0},  # dropout would remove parts of the pretrained weights
    ),
    "olora": Method(
        "LoRA that starts from an orthonormal basis of the weights", partial(_lora, init_lora_weights="olora")
    ),
    "hira": Method("LoRA whose product is multiplied entry by entry with the weights", _hira),
    "adalora": Method(
        "LoRA that starts with 1.5 r and prunes a third of the ranks where they matter least",
        _adalora,
        resumable=False,  # checkpoints do not hold the importance of each rank
    ),
    "vera": Method(
        "two trained vectors per layer around a frozen random projection", _vera, defaults={"adapter.r": 256}
    ),
    "pvera": Method(
        "VeRA with a random latent",
        _pvera,
        defaults={"adapter.r": 256},
        training_only=lambda name: 0.5 * ("pvera_lambda_d" in name),  # its second half scales the variances
    ),
    "linear-probe": Method("only the classification head", _linear_probe, adapts_layers=False),
    "full": Method("every parameter of the model", None, adapts_layers=False),
}


def _freeze_batch_norms(model: nn.Module) -> None:
    """Keeps frozen batch norms on the statistics of pre-training: an adapter's folder could not hold new ones."""
    from torch.nn.modules.batchnorm import _BatchNorm

    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters())
        if frozen and isinstance(module, _BatchNorm):
            module.train(False)
            module.train = partial(_stay_in_eval, module)  # type: ignore


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
