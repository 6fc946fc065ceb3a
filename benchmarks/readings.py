"""What finished runs make of rows: logits, states, autoencoders. Shared by `calibration.py` and `detection.py`.

All is in single precision, except for cached states of frozen blocks, which have the run's own.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from fvae_lora.evaluating import adapted_layers
from fvae_lora.inspection import Totals, read_inputs, token_scores
from fvae_lora.layer import FVAELoraLayer
from fvae_lora_experiments.data import Splits
from fvae_lora_experiments.models.heads import head_modules
from fvae_lora_experiments.process import quiet_models
from fvae_lora_experiments.run.finished import read_finished_run
from fvae_lora_experiments.run.folder import RunFolder
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import open_base, open_data, with_adapter
from fvae_lora_experiments.run.state_cache import collate, use_cached_states
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import Task, load_task

BATCH = 64


@dataclass(frozen=True)
class Run:
    """A finished run: its model in eval mode, and the splits that it was trained, selected and tested on."""

    path: Path
    recipe: Recipe
    record: Record
    task: Task
    model: PeftModel
    processor: Any
    splits: Splits

    @property
    def method(self) -> str:
        """Its method; FVAE-LoRA whose ELBO reaches the layers below is another one."""
        whole = self.recipe.method == "fvae-lora" and not self.recipe.fvae.elbo_stop_gradient
        return f"{self.recipe.method}-paper" if whole else self.recipe.method

    @property
    def has_decoder(self) -> bool:
        """Whether its layers have autoencoders."""
        return any(layer.records for layer in adapted_layers(self.model))

    def items(self, splits: Splits) -> dict[str, Any]:
        """Other rows as the run's own task prepares them."""
        return self.task.datasets(splits, self.model.get_base_model(), self.processor)

    def ready(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """Named sets of items, with the states of the frozen blocks if the run was trained on these. To be called once.

        States are kept on disk, by the names of the sets.
        """
        if not self.recipe.train.cache_frozen:
            return dict(items)
        found: dict[str, Any] = use_cached_states(
            self.model, dict(items), self.task, self.record, torch.device("cpu"), quiet=True
        )
        return found

    def batches(self, items: Any) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Batches without labels, and the labels, (rows,); texts by length, in the same order each time."""
        order = list(range(len(items)))
        if self.recipe.task == "text":
            order.sort(key=lambda row: len(items[row]["input_ids"]))
        for start in range(0, len(order), BATCH):
            batch = collate(self.task, [items[row] for row in order[start : start + BATCH]])
            labels = batch.pop("labels")
            yield batch, labels.numpy()


def open_run(path: Path) -> Run:
    """The finished run in a folder, on its own data."""
    recipe, record = read_finished_run(path)
    with quiet_models():
        base, processor = open_base(recipe, record)
        # Which blocks are frozen, and so cached, is told by what can be trained.
        model = with_adapter(base, RunFolder(path).adapter, is_trainable=recipe.train.cache_frozen).eval()
    assert isinstance(model, PeftModel)
    return Run(path, recipe, record, load_task(recipe), model, processor, open_data(recipe, record))


def finished_runs(folder: Path) -> list[Path]:
    """The folders below `folder` with finished runs that are results, sorted."""
    records = {file.parent: json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("run.json")}
    return sorted(
        path
        for path, record in records.items()
        if record["state"] == "complete" and record["recipe"]["purpose"] == "result"
    )


@contextmanager
def adapter_dropout(model: nn.Module) -> Iterator[None]:
    """Switches the adapters' own dropout on, and nothing else of training."""
    layers = [module for module in model.modules() if _is_adapted(module)]
    switched: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, FVAELoraLayer):
            switched += [vae.input_dropout for vae in layer.active_vaes().values()]
        else:
            switched.append(layer)
    try:
        for module in switched:
            module.train()
        yield
    finally:
        model.eval()


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "merge")


@torch.no_grad()
def logits_of(run: Run, items: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits, (rows, classes), and labels, (rows,)."""
    found, labels = [], []
    for batch, truth in run.batches(items):
        found.append(run.model(**batch).logits.double().numpy())
        labels.append(truth)
    return np.concatenate(found), np.concatenate(labels)


@dataclass(frozen=True)
class TokenGaussian:
    """The mean, (d,), and the Cholesky factor of the covariance, (d, d), of an input's tokens; float64."""

    mean: Tensor
    factor: Tensor

    def distances(self, x: Tensor) -> Tensor:
        """Squared Mahalanobis distances, (..., d) -> (...)."""
        centred = (x.double() - self.mean).flatten(0, -2)
        whitened = torch.linalg.solve_triangular(self.factor, centred.mT, upper=False)
        return whitened.square().sum(0).reshape(x.shape[:-1])


@torch.no_grad()
def token_gaussians(run: Run, items: Any) -> list[TokenGaussian]:
    """A normal distribution of the tokens of each input that adapted layers read, over rows."""
    totals: list[list[Tensor]] = []
    for batch, _ in run.batches(items):
        with _noting_inputs(run.model) as inputs:
            run.model(**batch)
        mask = batch.get("attention_mask")
        for number, x in enumerate(inputs.values()):
            tokens = (x.flatten(0, 1) if mask is None else x[mask.bool()]).double()
            moments = [torch.tensor(len(tokens)), tokens.sum(0), tokens.mT @ tokens]
            if number == len(totals):
                totals.append(moments)
            else:
                totals[number] = [known + more for known, more in zip(totals[number], moments, strict=True)]
    found = []
    for count, total, squares in totals:
        mean = total / count
        covariance = squares / count - torch.outer(mean, mean)
        covariance += 1e-6 * covariance.diagonal().mean() * torch.eye(len(mean))
        found.append(TokenGaussian(mean, torch.linalg.cholesky(covariance)))
    return found


@torch.no_grad()
def read(run: Run, items: Any, gaussians: Sequence[TokenGaussian]) -> dict[str, np.ndarray]:
    """What a run's model makes of rows in eval mode, in one forward.

    Returns:
        `logits`, (rows, classes); `state`, what the head reads, (rows, d); `inputs`, the mean over tokens of each input
        that adapted layers read, (rows, sum of d); `tokens`, the mean over tokens of each token's distance by the
        input's Gaussian, (rows, inputs). Of a model with autoencoders also the terms of `fvae_lora.score_inputs`,
        (rows, layers) or (rows, layers * dims), and `least`, the likelihood of each row's least likely token, (rows,
        layers).
    """
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for batch, _ in run.batches(items):
        for name, value in _read_batch(run, batch, gaussians).items():
            found[name].append(value.float().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _read_batch(run: Run, batch: Mapping[str, Any], gaussians: Sequence[TokenGaussian]) -> dict[str, Tensor]:
    head: dict[str, Tensor] = {}
    totals: dict[str, Totals] = defaultdict(Totals)
    least: dict[str, Tensor] = {}

    def note_head(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        head["state"], head["logits"] = args[0], output

    def note_layer(key: str, layer: FVAELoraLayer, adapter: str, x: Tensor, row: Tensor, rows: int) -> None:
        scores = token_scores(layer.active_vaes()[adapter], x)
        totals[key].add(scores, row, rows)
        likelihood = scores["log_likelihood"]
        least[key] = likelihood.new_full((rows,), torch.inf).scatter_reduce(0, row, likelihood, "amin")

    base = run.model.get_base_model()
    (name,) = head_modules(base)
    handle = base.get_submodule(name).register_forward_hook(note_head)
    try:
        with _noting_inputs(run.model) as inputs:
            if run.has_decoder:
                read_inputs(run.model, (), batch, note_layer)
            else:
                run.model(**batch)
    finally:
        handle.remove()
    mask = batch.get("attention_mask")
    apart = [g.distances(x).unsqueeze(-1) for g, x in zip(gaussians, inputs.values(), strict=True)]
    found = head | {
        "inputs": torch.cat([_mean_over_tokens(x, mask) for x in inputs.values()], -1),
        "tokens": torch.cat([_mean_over_tokens(x, mask) for x in apart], -1),
    }
    if totals:
        means = [total.means() for total in totals.values()]
        rows = len(head["logits"])
        found |= {term: torch.cat([of_layer[term].reshape(rows, -1) for of_layer in means], -1) for term in means[0]}
        found["least"] = torch.stack(list(least.values()), -1)
    return found


@contextmanager
def _noting_inputs(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """What adapted layers read in a forward, (rows, tokens, d), each once: query and value of a block read the same."""
    inputs: dict[int, Tensor] = {}

    def note(_: nn.Module, args: tuple[Tensor]) -> None:
        inputs[id(args[0])] = args[0]

    handles = [layer.register_forward_pre_hook(note) for layer in model.modules() if _is_adapted(layer)]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _mean_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(rows, tokens, d) -> (rows, d), without padding."""
    if mask is None:
        return x.float().mean(1)
    weight = mask.float().unsqueeze(-1)
    return (x.float() * weight).sum(1) / weight.sum(1)


def rounded(value: float) -> float:
    """A number with the digits that a record keeps."""
    return float(f"{value:.6g}")


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Features side by side, (rows, ...)."""
    return np.concatenate(parts, axis=-1)
