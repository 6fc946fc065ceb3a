"""FVAE-LoRA on stock peft: LoRA whose down-projection is the encoder of a VAE with two latents.

Importing this package registers the method with peft. `FVAELoraConfig` takes the place of ``LoraConfig``; any training
loop that uses the model's own loss then trains with the ELBO, others call `add_elbo` or use `FVAELoraTrainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import registration

registration.add_peft_type()

from . import adapter_folder  # noqa: E402
from .config import FVAELoraConfig  # noqa: E402
from .detector import ForeignInputDetector, ForeignScores  # noqa: E402
from .inspection import LayerScores, score_inputs  # noqa: E402
from .loss import add_elbo, elbo_loss, elbo_terms  # noqa: E402
from .module_names import resolve_targets  # noqa: E402
from .reference import FVAEPEFTConfig, load_reference_adapter  # noqa: E402
from .summary import LayerSummary, summarise_layers  # noqa: E402
from .to_inference import export_for_inference, is_training_only  # noqa: E402
from .to_lora import ConversionReport, convert_to_lora  # noqa: E402
from .uncertainty import UncertainPrediction, predict_with_uncertainty  # noqa: E402
from .vae import LOGVAR_RANGE  # noqa: E402

registration.register()

if TYPE_CHECKING:
    from .trainer import ElboTrainerMixin, FVAELoraTrainer

__all__ = [
    "LOGVAR_RANGE",
    "ConversionReport",
    "ElboTrainerMixin",
    "FVAELoraConfig",
    "FVAELoraTrainer",
    "FVAEPEFTConfig",
    "ForeignInputDetector",
    "ForeignScores",
    "LayerScores",
    "LayerSummary",
    "UncertainPrediction",
    "adapter_folder",
    "add_elbo",
    "convert_to_lora",
    "elbo_loss",
    "elbo_terms",
    "export_for_inference",
    "is_training_only",
    "load_reference_adapter",
    "predict_with_uncertainty",
    "resolve_targets",
    "score_inputs",
    "summarise_layers",
]


def __getattr__(name: str) -> Any:
    # transformers' Trainer is slow to import: load it only when it is asked for.
    if name in ("ElboTrainerMixin", "FVAELoraTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
