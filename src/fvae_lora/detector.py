"""Detection of inputs unlike those that an adapter was trained on, from its autoencoders' scores."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from .adapter_folder import check_json
from .evaluating import active_configs, adapted_layers
from .inspection import LayerScores, configs_with_decoder, score_inputs

Features = Literal["likelihood", "latents", "both"]
FEATURES: tuple[Features, ...] = get_args(Features)
TERMS = {"likelihood": ("log_likelihood",), "latents": ("z1_mean", "z2_mean")}
TERMS["both"] = TERMS["likelihood"] + TERMS["latents"]
NUMBERS, DESCRIPTION = "foreign_inputs.safetensors", "foreign_inputs.json"


@dataclass(frozen=True)
class ForeignScores:
    """Scores and p-values of the inputs of a batch.

    Attributes:
        score: Squared Mahalanobis distance from the training inputs, (batch,) of float64 on the CPU; infinite if an
            input has a feature that is not finite.
        p_value: The conformal p-value, from the share of held-out inputs that are at least as far, (batch,), in (0, 1].
            For an input like those of training it is at most a with probability at most a, so ``p_value <= 0.05`` gives
            a false alarm for at most one in twenty of them.
    """

    score: Tensor
    p_value: Tensor


class ForeignInputDetector:
    """Detects inputs unlike those that an adapter was trained on.

    An input's features are its scores by the adapted layers' autoencoders (`fvae_lora.score_inputs`). Its score is the
    Mahalanobis distance from the training inputs' mean, with their covariance shrunk towards its diagonal (Chen et al.
    2010, "Shrinkage algorithms for MMSE covariance estimation", of the correlations). The p-value compares it with the
    scores of held-out inputs; it is conformal, so it is valid for any model and features if the held-out and the new
    inputs are exchangeable.

    Measured in ``studies/uncertainty``: it is ahead of confidence, and behind the Mahalanobis distance of the mean of
    each adapted layer's input, which needs no autoencoder: compare with that on your data.

    Made by `fit` or `load`. It is valid for the adapters that were active then, with the weights that they had.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Features,
        layers: dict[str, int],
        adapter: str,
        mean: Tensor,
        std: Tensor,
        correlation: Tensor,
        held_out: Tensor,
    ) -> None:
        self._model, self._features, self._layers, self._adapter = model, features, layers, adapter
        self._mean, self._std, self._correlation, self._held_out = mean, std, correlation, held_out
        self._factor = torch.linalg.cholesky(correlation)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        training: Iterable[Mapping[str, Any]],
        held_out: Iterable[Mapping[str, Any]],
        features: Features = "both",
    ) -> Self:
        """Fit a detector to training inputs, batch by batch; no batch is kept.

        Args:
            model: An adapted model, or one that contains it.
            training: Batches of inputs that the adapter was trained on, by the names of the model's arguments.
            held_out: Batches of similar inputs that it was not trained on; their scores are kept. With n inputs, no
                p-value is below 1 / (n + 1).
            features: Which to use: the layers' ``"likelihood"``, their ``"latents"`` (the posteriors' means), or
                ``"both"``.

        Returns:
            The detector.

        Raises:
            ValueError: If `features` is none of these; if there are fewer than two training inputs or no held-out one;
                if a feature of a training input is not finite; if layers read different numbers of examples; or as
                `fvae_lora.score_inputs`.
        """
        if features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, not {features!r}")
        adapter, moments = fingerprint(model), _Moments()
        layers: dict[str, int] = {}
        for batch in training:
            layers, vectors = _vectors(score_inputs(model, **batch), features)
            moments.add(vectors, layers)
        if moments.count < 2:
            raise ValueError(f"training must have at least two inputs, not {moments.count}")
        mean, std, correlation = moments.shrunk()
        detector = cls(model, features, layers, adapter, mean, std, correlation, torch.zeros(0))
        scores = [detector._score(batch) for batch in held_out]
        if not sum(map(len, scores)):
            raise ValueError("held_out must have at least one input, not 0")
        detector._held_out = torch.cat(scores).sort().values
        return detector

    def score(self, **inputs: Any) -> ForeignScores:
        """Score a batch.

        Args:
            **inputs: The model's inputs by name, as for a forward.

        Returns:
            Scores and p-values.

        Raises:
            ValueError: If other adapters are active than those that the detector was fitted to, or as
                `fvae_lora.score_inputs`.
        """
        score = self._score(inputs)
        as_far = len(self._held_out) - torch.searchsorted(self._held_out, score)
        return ForeignScores(score, (1 + as_far).double() / (len(self._held_out) + 1))

    def _score(self, inputs: Mapping[str, Any]) -> Tensor:
        layers, vectors = _vectors(score_inputs(self._model, **inputs), self._features)
        if layers != self._layers:
            raise ValueError("other adapters or layers are active than those that the detector was fitted to")
        scaled = (vectors - self._mean) / self._std
        whitened = torch.linalg.solve_triangular(self._factor, scaled.mT, upper=False)
        return whitened.square().sum(0).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the detector beside its adapter, as ``foreign_inputs.json`` and ``foreign_inputs.safetensors``.

        Args:
            folder: The adapter's folder; created if it does not exist. A detector in it is replaced.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        numbers = save(
            {"mean": self._mean, "std": self._std, "correlation": self._correlation, "held_out": self._held_out}
        )
        description = {
            "features": self._features,
            "layers": self._layers,
            "adapter": self._adapter,
            "numbers": hashlib.sha256(numbers).hexdigest(),
        }
        _replace(target / NUMBERS, numbers)
        _replace(target / DESCRIPTION, json.dumps(description, indent=2).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: nn.Module) -> Self:
        """Read a detector of the adapters that are active in a model.

        Args:
            folder: Where `save` wrote it.
            model: The model with these adapters, loaded.

        Returns:
            The detector.

        Raises:
            ValueError: If files are missing, truncated or do not belong together, if the detector is of other weights
                than the active adapters', or if one of these has no decoder.
        """
        configs_with_decoder(model)
        description, path = check_json(Path(folder, DESCRIPTION)), Path(folder, NUMBERS)
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path} is not readable: {error.strerror}") from None
        if hashlib.sha256(contents).hexdigest() != description.get("numbers"):
            raise ValueError(f"{path} is truncated, or does not belong to the {DESCRIPTION} beside it")
        features, layers = description.get("features"), description.get("layers")
        if features not in FEATURES or not isinstance(layers, dict):
            raise ValueError(f"{path.with_name(DESCRIPTION)} must name features ({', '.join(FEATURES)}) and layers")
        if description.get("adapter") != fingerprint(model):
            raise ValueError(f"the detector in {folder} is of other weights than the model's active adapters have")
        return cls(model, features, layers, description["adapter"], **load(contents))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights of a model's active adapters, whatever their precision.

    Args:
        model: An adapted model, or one that contains it.

    Raises:
        ValueError: If no FVAE-LoRA adapter is active.
    """
    digest = hashlib.sha256()
    for adapter in active_configs(model):
        for layer in adapted_layers(model):
            if adapter not in layer.active_vaes():
                continue
            for name, weight in [*layer.fvae_lora_vae[adapter].named_parameters(), ("B", layer.B(adapter))]:
                digest.update(f"{layer.name} {name} {tuple(weight.shape)}\n".encode())
                digest.update(weight.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _vectors(scores: Mapping[str, LayerScores], features: Features) -> tuple[dict[str, int], Tensor]:
    """The number of features of each layer, and the features of a batch, (batch, features), float64 on the CPU."""
    if len({len(layer.tokens) for layer in scores.values()}) != 1:
        raise ValueError("the adapted layers read different numbers of examples, or tokens of unknown examples")
    parts = {
        key: torch.cat([getattr(layer, term).reshape(len(layer.tokens), -1) for term in TERMS[features]], dim=-1)
        for key, layer in scores.items()
    }
    return {key: part.shape[-1] for key, part in parts.items()}, torch.cat(list(parts.values()), -1).cpu().double()


class _Moments:
    """Mean and covariance, batch by batch; source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample
    variance".
    """  # noqa: D205

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, vectors: Tensor, layers: Mapping[str, int]) -> None:
        finite = [part.isfinite().all() for part in vectors.split(list(layers.values()), dim=-1)]
        if unfit := [key for key, fits in zip(layers, finite, strict=True) if not fits]:
            raise ValueError(f"training: an input has no finite features in {unfit[0]}")
        count, mean = len(vectors), vectors.mean(0)
        if not count:
            return
        step, total = mean - self.mean, self.count + count
        centred = vectors - mean
        self.squares = self.squares + centred.mT @ centred + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def shrunk(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, (F,), standard deviation, (F,), and correlations, (F, F), these shrunk towards none."""
        covariance = self.squares / (self.count - 1)
        std = covariance.diagonal().sqrt()
        std = torch.where(std > 0, std, 1)  # a constant feature
        correlation = covariance / torch.outer(std, std)
        correlation.diagonal().fill_(1)
        p, n, squares = len(std), self.count - 1, correlation.square().sum()
        spread = squares - p  # of the eigenvalues, whose mean is 1
        weight = torch.clamp(((1 - 2 / p) * squares + p**2) / ((n + 1 - 2 / p) * spread), max=1) if spread > 0 else 1
        return self.mean, std, (1 - weight) * correlation + weight * torch.eye(p, dtype=torch.float64)


def _replace(path: Path, contents: bytes) -> None:
    """Write a file that appears whole."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as unfinished:
        part = Path(unfinished, path.name)
        part.write_bytes(contents)
        part.replace(path)
