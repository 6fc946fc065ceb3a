"""From an adapter and rows to numbers: the pass over the data, and what is computed from what it leaves."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from fvae_lora import LayerSummary, summarise_layers
from fvae_lora_experiments.errors import UserError, first_line
from fvae_lora_experiments.inspect.inputs import Inputs, Known, progressing
from fvae_lora_experiments.inspect.probes import Projection, Question, Score, probe, project, question
from fvae_lora_experiments.predict.trained import Trained
from fvae_lora_experiments.run.timing import is_terminal

ACTIVE = 0.01
"""A unit is active if its posterior's mean has a greater variance over tokens: Burda et al. 2016, "Importance weighted
autoencoders"."""
SHOWN = 300
"""Rows in a projection."""
LATENTS = ("z1", "z2")


@dataclass(frozen=True)
class Latent:
    """What a layer's latent is like."""

    units: int
    active: int
    """Units whose posterior's mean has a variance above `ACTIVE`."""
    spread: list[float]
    """That variance, of each unit."""
    variance: float
    """Mean variance of the posterior."""
    probes: dict[str, Score | None]
    """How well `label` and `group` are read from it, where they are known."""
    projection: Projection | None


@dataclass(frozen=True)
class Layer:
    """What one adapted layer's autoencoder knows; the numbers are those of `fvae_lora.LayerSummary`."""

    name: str
    tokens: int
    kl_z1: float
    log_likelihood: float
    gamma: float
    w2: float | None
    r2: float
    r2_z1: float
    r2_z2: float
    update_norm: float
    output_norm: float
    z1: Latent
    z2: Latent

    @property
    def latents(self) -> dict[str, Latent]:
        """Both by their names."""
        return {"z1": self.z1, "z2": self.z2}

    @property
    def update(self) -> float:
        """The update's norm as a share of the frozen output's."""
        return self.update_norm / self.output_norm if self.output_norm else math.inf


@dataclass(frozen=True)
class Measured:
    """All layers, and the rows that they were measured on."""

    layers: Sequence[Layer]
    rows: int
    questions: Mapping[str, Question]
    """By `label` and `group`, where they are known."""
    shown: np.ndarray
    """Indices of the rows in the projections."""
    notes: Sequence[str]
    """What was left out."""


def measure(trained: Trained, inputs: Inputs) -> Measured:
    """Run the model once over all rows, and look at what its autoencoders made of them.

    Raises:
        UserError: a row cannot be read; no adapter has a decoder.
    """
    known: dict[str, Known] = {
        name: what for name, what in {"label": inputs.label, "group": inputs.group}.items() if what is not None
    }
    with warnings.catch_warnings(record=True) as caught, trained.task.autocast(trained.device):
        warnings.simplefilter("always", UserWarning)
        try:
            summaries = summarise_layers(trained.model, progressing(trained, inputs, "inspecting"))
        except ValueError as error:
            raise UserError(f"{inputs.name}: {first_line(error)}") from error
    if not summaries:
        raise UserError(f"dataset {inputs.name}: not one token counts in any adapted layer")
    rows = max(len(summary.z1_mean) for summary in summaries.values())
    shown = np.unique(np.linspace(0, rows - 1, min(rows, SHOWN)).round().astype(int))
    questions = {name: question(what) for name, what in known.items()}
    bar = tqdm(summaries.items(), unit="layer", desc="probing", disable=not is_terminal(), leave=False)
    layers = [_layer(name, summary, questions, shown) for name, summary in bar]
    notes = dict.fromkeys(first_line(w.message) for w in caught if issubclass(w.category, UserWarning))
    return Measured(layers, rows, questions, shown, list(notes))


def _layer(name: str, summary: LayerSummary, questions: Mapping[str, Question], shown: np.ndarray) -> Layer:
    latents = {
        latent: _latent(
            getattr(summary, f"{latent}_spread"),
            getattr(summary, f"{latent}_variance"),
            getattr(summary, f"{latent}_mean").numpy(),
            questions,
            shown,
        )
        for latent in LATENTS
    }
    same = {key: getattr(summary, key) for key in Layer.__dataclass_fields__ if key not in ("name", *LATENTS)}
    return Layer(name=name, z1=latents["z1"], z2=latents["z2"], **same)


def _latent(
    spread: Tensor, variance: Tensor, means: np.ndarray, questions: Mapping[str, Question], shown: np.ndarray
) -> Latent:
    return Latent(
        units=len(spread),
        active=int((spread > ACTIVE).sum()),
        spread=spread.tolist(),
        variance=variance.mean().item(),
        probes={name: probe(means, asked) for name, asked in questions.items()},
        projection=project(means, shown[shown < len(means)]),
    )
