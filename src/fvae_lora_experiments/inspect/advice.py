"""Plain-language warnings: what is wrong in which layers, and what to change."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fvae_lora_experiments.inspect.measure import ACTIVE, Layer, Measured
from fvae_lora_experiments.report.numbers import without_common_parents

NAMED = 3
"""Layers that a warning names; of the others it gives the number."""
POOR_DECODER = 0.1
"""The share of variance under which a decoder hardly knows its layer's inputs."""
LOUD = 2.0
"""The variance of z1's posterior, whose prior's is 1, above which noise takes over in training."""
FEW = 0.5
"""The share of z1's units under which a smaller rank would do."""
NEAR = 0.02
"""Scores of probes that differ by less are the same."""
ABOVE_CHANCE = 0.1
"""How much better than a guess a probe must be for its latent to know something."""
FAINT, OVERWHELMING = 1e-3, 1.0
"""The update's norm as a share of the frozen output's that is too small, and too great."""


def advise(measured: Measured, settings: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is wrong.

    Args:
        measured: all layers.
        settings: fields of the adapter's configuration, for the values that may be changed.
    """
    layers = measured.layers

    def now(*keys: str) -> str:
        return " or ".join(f"{key} (now {settings.get(key, 'the default')})" for key in keys)

    rules: list[tuple[Callable[[Layer], bool], str]] = [
        (
            lambda layer: layer.z1.active == 0,
            f"all units of z1 collapsed: no mean varies by more than {ACTIVE:g}, so the adapter adds the same to every "
            f"token; lower {now('kl_weight', 'elbo_weight')}, or train longer or at a higher learning rate",
        ),
        (
            lambda layer: 0 < layer.z1.active < FEW * layer.z1.units,
            f"under half of z1's units are active; lower {now('kl_weight')}, or save parameters by a lower {now('r')}",
        ),
        (
            lambda layer: layer.z2.active == 0,
            "all units of z2 collapsed: it says nothing of the input, so that nothing is kept out of z1; raise "
            f"{now('reconstruction_weight')} or lower {now('factorization_weight')}",
        ),
        (
            lambda layer: layer.r2 < POOR_DECODER,
            f"the decoder explains under {POOR_DECODER:.0%} of the input's variance, so likelihoods there say little; "
            f"train longer or raise {now('reconstruction_weight')}",
        ),
        (
            lambda layer: layer.z1.variance > LOUD,
            f"the posterior of z1 is wider than its prior (variance over {LOUD:g}), so training is noisy; "
            f"{now('kl_weight')} must exceed {now('factorization_weight')}",
        ),
        (
            lambda layer: layer.update < FAINT,
            f"the update is under {FAINT:.1%} of the frozen output, so the adapter does hardly anything; raise the "
            "learning rate or lora_alpha",
        ),
        (
            lambda layer: layer.update > OVERWHELMING,
            "the update is greater than the frozen output; lower the learning rate or lora_alpha",
        ),
    ]
    if (label := measured.questions.get("label")) is not None:
        rules.append(
            (
                lambda layer: _read_from_both(layer, label.chance),
                "the label is read from z2 as well as from z1, so the latents do not part what matters from the rest; "
                f"{now('factorization_weight')} is there to part them",
            )
        )
    named = list(zip(short_names(layers), layers, strict=True))
    found = ((what, [name for name, layer in named if applies(layer)]) for applies, what in rules)
    return [f"{_where(names, len(layers))}: {what}." for what, names in found if names]


def short_names(layers: Sequence[Layer]) -> list[str]:
    """The layers' names without what all of them have in common: `3.q_proj` of `vit.layers.3.attention.q_proj`."""
    names = [layer.name for layer in layers]
    paths = [name.split(".") for name in names]
    if len(layers) < 2 or len(set(map(len, paths))) > 1:
        return without_common_parents(names)
    differ = [len(set(parts)) > 1 for parts in zip(*paths, strict=True)]
    return [".".join(part for part, kept in zip(path, differ, strict=True) if kept) for path in paths]


def _read_from_both(layer: Layer, chance: float) -> bool:
    first, second = layer.z1.probes["label"], layer.z2.probes["label"]
    if first is None or second is None:
        return False
    return second.mean > chance + ABOVE_CHANCE and second.mean > first.mean - NEAR


def _where(names: Sequence[str], of: int) -> str:
    if len(names) == of:
        return f"All {of} layers" if of > 1 else names[0]
    more = f" and {len(names) - NAMED} more of {of}" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
