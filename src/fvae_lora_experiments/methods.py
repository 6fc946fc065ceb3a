"""The methods that can be compared: each turns a pretrained model into the one that is trained."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from peft import (
    AdaLoraConfig,
    HiraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PveraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import match_target_against_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fvae_lora import FVAELoraConfig
from fvae_lora.export import is_training_only
from fvae_lora.module_names import resolve_targets
from fvae_lora_experiments.ablation import ablate
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.heads import head_modules

if TYPE_CHECKING:
    from fvae_lora_experiments.recipe import Recipe

NAME = re.compile(r"[\w.]+")
"""A module's name, in which nothing says that it is an expression."""

Configure = Callable[["Recipe", PreTrainedModel], PeftConfig]


@dataclass(frozen=True)
class Method:
    """One method.

    `config` makes its adapter's configuration from the recipe and the model; None trains every parameter. `defaults`
    are what the method is, in a recipe's dotted keys: they win over the recipe's common sections, and lose to its
    `per_method` and to overrides. `training_only` gives the share of a parameter, by its name, that is not needed at
    inference.
    """

    summary: str
    config: Configure | None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    training_only: Callable[[str], float] = lambda _: 0.0
    resumable: bool = True
    """Whether a checkpoint holds all that training goes on from; if not, an interrupted run begins again."""

    def apply(self, model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel | PeftModel:
        """`model`, changed in place, with this method's parameters trainable and all others frozen."""
        if self.config is None:
            return model
        try:
            adapted = get_peft_model(model, self.config(recipe, model))
        except ValueError as error:
            raise UserError(f"recipe: {error}") from error
        ablate(adapted, **recipe.ablation.model_dump())
        _keep_statistics(adapted)
        return adapted

    def inference_parameters(self, model: nn.Module, trained: Collection[str]) -> int:
        """How many of the parameters that are `trained`, by name, `model` still needs once training is over."""
        counts = ((name, p.numel()) for name, p in model.named_parameters() if name in trained)
        return sum(n - int(n * self.training_only(name)) for name, n in counts)


def _where(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    targets, layers = adapted_modules(model, recipe.adapter.target_modules), recipe.adapter.layers
    return {
        "target_modules": targets if layers is None else _in_layers(model, targets, layers),
        "modules_to_save": head_modules(model) or None,
    }


def _fvae_lora(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    return FVAELoraConfig(
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha,
        lora_dropout=recipe.adapter.dropout,
        **_where(recipe, model),
        **recipe.fvae.model_dump(),
    )


def _lora(recipe: Recipe, model: PreTrainedModel, **variant: Any) -> PeftConfig:
    return LoraConfig(
        r=recipe.adapter.r,
        lora_alpha=recipe.adapter.alpha or recipe.adapter.r,
        lora_dropout=recipe.adapter.dropout,
        **_where(recipe, model),
        **variant,
    )


def _hira(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    return HiraConfig(r=recipe.adapter.r, hira_dropout=recipe.adapter.dropout, **_where(recipe, model))


def _adalora(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    first = ceil(1.5 * recipe.adapter.r)
    return AdaLoraConfig(
        init_r=first,
        target_r=recipe.adapter.r,
        lora_alpha=(recipe.adapter.alpha or recipe.adapter.r) * first / recipe.adapter.r,
        lora_dropout=recipe.adapter.dropout,
        total_step=1,  # until training begins and its length is known (`adalora.RankSchedule`)
        tinit=0,
        tfinal=0,
        **_where(recipe, model),
    )


def _vera(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    return VeraConfig(r=recipe.adapter.r, vera_dropout=recipe.adapter.dropout, **_where(recipe, model))


def _pvera(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    return PveraConfig(r=recipe.adapter.r, pvera_dropout=recipe.adapter.dropout, **_where(recipe, model))


def _linear_probe(_: Recipe, model: PreTrainedModel) -> PeftConfig:
    # LoRA on no layer at all: the head is trained, saved and loaded exactly as it is for the other adapters.
    if not (head := head_modules(model)):
        raise UserError(f"method linear-probe: {type(model).__name__} has no head that a task adds")
    return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=head)


_fvae_method = partial(Method, config=_fvae_lora, training_only=is_training_only)

METHODS: dict[str, Method] = {
    "fvae-lora": _fvae_method("LoRA whose down-projection is the encoder of a VAE with two latents"),
    "fvae-lora-reference": _fvae_method(
        "FVAE-LoRA with the objective and the settings of the reference implementation",
        defaults={
            "adapter.alpha": 8,  # so a scale of 0.5 at r = 16
            "adapter.dropout": 0,  # it reads the setting but never applies it
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
        "FVAE-LoRA's first encoder and its noise alone, without an ELBO", defaults={"fvae.elbo_weight": 0}
    ),
    "lora": Method("LoRA on the same modules, with the same rank", _lora),
    "rslora": Method("LoRA with the scale alpha / sqrt(r)", partial(_lora, use_rslora=True)),
    "dora": Method("LoRA on the weights' direction, with a magnitude beside it", partial(_lora, use_dora=True)),
    "pissa": Method(
        "LoRA that begins at the weights' largest singular values",
        partial(_lora, init_lora_weights="pissa"),
        defaults={"adapter.dropout": 0},  # dropout would take away parts of the pretrained weights
    ),
    "olora": Method(
        "LoRA that begins at an orthonormal basis of the weights", partial(_lora, init_lora_weights="olora")
    ),
    "hira": Method("LoRA whose product is multiplied, entry by entry, with the weights", _hira),
    "adalora": Method(
        "LoRA that begins with 1.5 r and gives away a third of the ranks where they matter least",
        _adalora,
        resumable=False,  # the importance of each rank is in no checkpoint
    ),
    "vera": Method("two trained vectors a layer around a frozen random projection", _vera, defaults={"adapter.r": 256}),
    "pvera": Method(
        "VeRA with a random latent",
        _pvera,
        defaults={"adapter.r": 256},
        training_only=lambda name: 0.5 * ("pvera_lambda_d" in name),  # its second half scales the variances
    ),
    "linear-probe": Method("the classification head alone", _linear_probe),
    "full": Method("every parameter of the model", None),
}


def adapted_modules(model: PreTrainedModel, wanted: Sequence[str] | str) -> list[str]:
    """Which modules of `model` are meant, full names or their last parts.

    Args:
        model: not adapted yet.
        wanted: names, of which ViT's `query` is `q_proj` in transformers 5; or, as in peft, `all-linear` or a regular
            expression of whole names. A name alone is that name.

    Raises:
        UserError: if the model has no module of a name; lists the names of its linear layers.
    """
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        others = (*head_modules(model), *_output_layers(model))
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        return [name for name in linear if not f"{name}.".startswith(tuple(f"{other}." for other in others))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # recipes use the old names on purpose: they fit more models
            found = resolve_targets(model, [wanted] if isinstance(wanted, str) and NAME.fullmatch(wanted) else wanted)
    except re.error as error:
        raise UserError(f"adapter.target_modules: {wanted!r} is no regular expression: {error}") from error
    except ValueError as error:
        raise UserError(f"adapter.{error}") from error
    if isinstance(found, str):
        return [name for name, _ in model.named_modules() if match_target_against_key(found, name)]
    return sorted(found)


def _output_layers(model: PreTrainedModel) -> list[str]:
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if output is not None and module is output]


def _in_layers(model: PreTrainedModel, targets: Sequence[str], layers: Sequence[int]) -> list[str]:
    """Full names of the modules that are meant and lie in these blocks, counted as peft does.

    Raises:
        UserError: if there are none in one of the blocks.
    """
    ends = tuple(f".{target}" for target in targets)
    blocks = {
        name: int(block[1])
        for name, _ in model.named_modules()
        if (name in targets or name.endswith(ends)) and (block := re.match(r".*?\.[^.]*\.(\d+)\.", name))
    }
    if missing := sorted({*layers} - {*blocks.values()}):
        there = sorted({*blocks.values()})
        known = f"0 to {there[-1]}" if there == [*range(len(there))] and there else ", ".join(map(str, there)) or "none"
        raise UserError(
            f"adapter.layers: block {missing[0]} of {type(model).__name__} has nothing to adapt; allowed are {known}"
        )
    return [name for name, block in blocks.items() if block in layers]


def _keep_statistics(model: nn.Module) -> None:
    """Frozen batch norms go on using the statistics of pre-training: an adapter's folder could not carry new ones."""
    for module in model.modules():
        frozen = not any(p.requires_grad for p in module.parameters())
        if frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(False)
            module.train = partial(_stay, module)  # type: ignore


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
