"""What is written of an inspection, for programs (JSON) and as tables."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from fvae_lora_experiments.inspect.advice import advise, short_names
from fvae_lora_experiments.inspect.inputs import Inputs
from fvae_lora_experiments.inspect.measure import ACTIVE, LATENTS, Layer, Measured
from fvae_lora_experiments.inspect.probes import FOLDS, Score
from fvae_lora_experiments.inspect.source import Source
from fvae_lora_experiments.places import short_name
from fvae_lora_experiments.report.numbers import UNKNOWN, number
from fvae_lora_experiments.report.tables import Table
from fvae_lora_experiments.run.record import printable

SETTINGS = (
    "r",
    "residual_dim",
    "objective",
    "elbo_weight",
    "reconstruction_weight",
    "kl_weight",
    "factorization_weight",
    "elbo_stop_gradient",
    "residual_prior_mean",
)
"""Fields of the configuration that are told of."""


@dataclass(frozen=True)
class Inspection:
    """Everything that is said of an adapter."""

    source: Source
    inputs: Inputs
    measured: Measured

    @property
    def warnings(self) -> list[str]:
        """What is wrong, and what to change."""
        return advise(self.measured, self.source.settings)

    @property
    def notes(self) -> list[str]:
        """What was not measured, and why."""
        measured, notes = self.measured, list(self.measured.notes)
        if self.inputs.label is None:
            notes.append(f"No probes for a label: {self.inputs.without_label}.")
        for name, asked in measured.questions.items():
            left_out = int(len(asked.rows) - asked.rows.sum())
            if asked.reason:
                notes.append(f"No probes for the {name}: {asked.reason}.")
            elif left_out:
                notes.append(f"Probes for the {name} leave out {left_out} rows, of classes with under {FOLDS} rows.")
        return [printable(note) for note in notes]

    @property
    def facts(self) -> dict[str, str]:
        """What was looked at."""
        recipe = self.source.recipe
        given = {key: self.source.settings[key] for key in SETTINGS if self.source.settings.get(key) is not None}
        return {
            "Adapter": f"{short_name(str(self.source.path))}, {len(self.measured.layers)} adapted layers",
            "Model": short_name(recipe.model),
            "Data": f"{self.inputs.name}: {self.inputs.rows}; {self.measured.rows} rows were read",
            "Settings": ", ".join(f"{key}={value}" for key, value in given.items()),
        }

    def tables(self) -> list[Table]:
        """What the autoencoders are like, and what is read from their latents."""
        layers = self.measured.layers
        names = short_names(layers)
        rows = [[name, *(cell(layer) for cell in COLUMNS.values())] for name, layer in zip(names, layers, strict=True)]
        tables = [Table("Autoencoders", ["layer", *COLUMNS], rows, COLUMN_NOTES)]
        asked = {name: asked for name, asked in self.measured.questions.items() if not asked.reason}
        if asked:
            headings = [f"{name} from {latent}" for name in asked for latent in LATENTS]
            lines = [
                [short, *(_score(layer.latents[latent].probes[name]) for name in asked for latent in LATENTS)]
                for short, layer in zip(names, layers, strict=True)
            ]
            said = [
                f"{name.capitalize()}: {what.metric}"
                + (f" in %, {100 * what.chance:.1f} is a guess." if what.known.classes else " in %.")
                for name, what in asked.items()
            ]
            tables.append(Table("Linear probes", ["layer", *headings], lines, [PROBE_NOTE, *said]))
        return tables

    def as_json(self) -> str:
        """All numbers; null is what is not known."""
        measured = self.measured
        tree = {
            "schema": 1,
            "adapter": short_name(str(self.source.path)),
            "model": short_name(self.source.recipe.model),
            "task": self.source.recipe.task,
            "data": {"name": self.inputs.name, "rows": self.inputs.rows, "count": measured.rows},
            "settings": {key: self.source.settings.get(key) for key in SETTINGS},
            "active_above": ACTIVE,
            "probes": {
                name: {
                    "metric": asked.metric,
                    "chance": asked.chance,
                    "rows": int(asked.rows.sum()),
                    "folds": FOLDS,
                    "classes": [printable(label) for label in asked.known.classes],
                    "without": asked.reason or None,
                }
                for name, asked in measured.questions.items()
            },
            "shown": {
                "row": measured.shown.tolist(),
                **{name: asked.known.values[measured.shown].tolist() for name, asked in measured.questions.items()},
            },
            "warnings": self.warnings,
            "notes": self.notes,
            "layers": [asdict(layer) | {"update_share": layer.update} for layer in measured.layers],
        }
        return json.dumps(_without_nan(tree), indent=1) + "\n"


COLUMNS = {
    "KL": lambda layer: number(layer.kl_z1),
    "log p(x)": lambda layer: number(layer.log_likelihood),
    "Gamma": lambda layer: number(layer.gamma),
    "W2²": lambda layer: UNKNOWN if layer.w2 is None else number(layer.w2),
    "active z1": lambda layer: _active(layer, "z1"),
    "active z2": lambda layer: _active(layer, "z2"),
    "R² %": lambda layer: _percent(layer.r2),
    "R² of z1 %": lambda layer: _percent(layer.r2_z1),
    "R² of z2 %": lambda layer: _percent(layer.r2_z2),
    "update %": lambda layer: _percent(layer.update),
}
COLUMN_NOTES = (
    "KL(q1 || p1), log p(x | z1, z2) at the posteriors' means, Gamma and W2²(q1, q2): means over tokens, in "
    f"nats but for W2. Active: units whose posterior's mean has a variance over {ACTIVE:g} over tokens; of how many.",
    "R²: the share of the input's variance that the decoder explains from both latents, or from one with the other at "
    "its prior's mean; negative where the mean of all tokens explains more. Update: its norm over the frozen output's.",
)
PROBE_NOTE = (
    f"A linear model reads it from the latent's mean over a row's tokens: mean ± standard deviation over {FOLDS} folds "
    "of a cross-validation."
)


def _active(layer: Layer, latent: str) -> str:
    found = layer.latents[latent]
    return f"{found.active}/{found.units}"


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return UNKNOWN
    return f"{100 * share:.1f}".replace("-", "\N{MINUS SIGN}") if abs(share) < 10 else number(100 * share)


def _score(score: Score | None) -> str:
    return (
        UNKNOWN if score is None else f"{100 * score.mean:.1f} ± {100 * score.std:.1f}".replace("-", "\N{MINUS SIGN}")
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
