"""What the Trainer's logs say of the loss: the task's own, and each term of the ELBO with its weight."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from by_hand import adapted
from fvae_lora import FVAELoraConfig, FVAELoraTrainer, elbo_terms
from fvae_lora.layer import FVAELoraLayer
from fvae_lora.loss_log import LossLog
from fvae_lora.objective import LayerElbo, TokenWeights
from fvae_lora.recorder import Forward, LayerRun
from tiny import batch_for

SIGNS = {"reconstruction": -1.0, "kl_z1": 1.0, "gamma": -1.0, "kl_z2": 1.0, "z1_l2": -1.0, "z2_l2": 1.0}


class Spy(FVAELoraTrainer):
    """Keeps the task loss and the terms of each micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, dict[str, float]]] = []

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.seen.append(elbo_terms(model))
        return loss


def trainer(
    model: PeftModel, tmp_path: Path, trainer_class: type[Trainer] = Spy, rows: int = 32, **arguments: Any
) -> Any:
    batch = batch_for(model.get_base_model(), rows)
    data = [{name: value[i] for name, value in batch.items()} for i in range(rows)]
    settings = {"logging_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"} | arguments
    made = trainer_class(model, TrainingArguments(str(tmp_path), **settings), train_dataset=data)
    made.train()
    return made


def training_logs(made: Trainer) -> list[dict[str, float]]:
    return [entry for entry in made.state.log_history if "loss" in entry]


def weights(model: PeftModel) -> dict[str, float]:
    config = model.peft_config["default"]
    delta = config.factorization_weight
    return {
        "reconstruction": config.reconstruction_weight,
        "kl_z1": config.kl_weight,
        "kl_z2": config.kl_weight,
        "gamma": delta,
        "z1_l2": config.factorization_weight_z1 if config.factorization_weight_z1 is not None else delta,
        "z2_l2": config.factorization_weight_z2 if config.factorization_weight_z2 is not None else delta,
    }


OBJECTIVES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "fvae": ({}, {"reconstruction", "kl_z1", "gamma"}),
    "vae2lat": ({"objective": "vae2lat"}, {"reconstruction", "kl_z1", "kl_z2"}),
    "reference": (
        {
            "objective": "reference",
            "factorization_weight_z1": 0.4,
            "factorization_weight_z2": 0.6,
            "layer_reduction": "mean",
            "task_weight": 5.0,
        },
        {"reconstruction", "kl_z1", "z1_l2", "z2_l2"},
    ),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_logs_are_the_weighted_terms_averaged_over_the_logged_steps(
    tmp_path: Path, objective: str, accumulation: int
) -> None:
    fields, names = OBJECTIVES[objective]
    model = adapted("vit", torch.float32, **fields)
    layers = {module.name for module in model.modules() if isinstance(module, FVAELoraLayer)}
    assert len(layers) == 4

    class PerLayer(Spy):
        log_elbo_per_layer = True

    made = trainer(model, tmp_path, PerLayer, gradient_accumulation_steps=accumulation)
    logs = training_logs(made)
    assert [entry["step"] for entry in logs] == [2, 4]
    scale = model.peft_config["default"].elbo_weight / (4 if objective == "reference" else 1)
    for i, entry in enumerate(logs):
        seen = made.seen[2 * accumulation * i : 2 * accumulation * (i + 1)]
        expected: dict[str, float] = defaultdict(float)
        for terms in seen:  # equally many tokens in each
            for layer in layers:
                for name in names:
                    value = scale * weights(model)[name] * SIGNS[name] * terms[layer][name] / len(seen)
                    expected[f"elbo/{layer}/{name}"] += value
                    expected[f"elbo/{name}"] += value
        found = {key: value for key, value in entry.items() if key.startswith("elbo/")}
        assert found == pytest.approx(expected, rel=1e-5)
        together = sum(entry[f"elbo/{name}"] for name in names)
        task_weight = model.peft_config["default"].task_weight
        assert entry["loss"] == pytest.approx(task_weight * entry["task_loss"] + together, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("bert", {"gradient_accumulation_steps": 3}),
        ("bert", {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}),
        ("llama", {"gradient_accumulation_steps": 3}),
        ("llama", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("t5", {"gradient_accumulation_steps": 3}),
    ],
)
def test_the_parts_add_up_to_the_loss(tmp_path: Path, kind: str, arguments: dict[str, Any]) -> None:
    """With padding, so that micro-batches differ in tokens and in labels."""
    made = trainer(adapted(kind, torch.float32), tmp_path, max_steps=3, logging_steps=3, **arguments)
    (entry,) = training_logs(made)
    together = sum(value for key, value in entry.items() if key.startswith("elbo/"))
    assert entry["loss"] == pytest.approx(entry["task_loss"] + together, rel=1e-5)
    assert {key for key in entry if key.startswith("elbo/")} == {"elbo/reconstruction", "elbo/kl_z1", "elbo/gamma"}


def test_the_task_loss_is_the_model_s_own(tmp_path: Path, without_noise: None) -> None:
    model = adapted("vit", torch.float32)
    plain = copy.deepcopy(model).get_base_model()
    batch = batch_for(plain, 4)
    with torch.no_grad():
        expected = float(plain.eval()(**batch).loss)
    made = trainer(model, tmp_path, rows=4, max_steps=1, logging_steps=1, data_seed=0)
    assert training_logs(made)[0]["task_loss"] == pytest.approx(expected, rel=1e-5)


def test_every_training_starts_with_empty_sums(tmp_path: Path) -> None:
    model = adapted("vit", torch.float32)
    made = trainer(model, tmp_path, max_steps=3)  # the third step is in no log
    made.train()
    logs = training_logs(made)
    assert [entry["step"] for entry in logs] == [2]
    together = sum(value for key, value in logs[0].items() if key.startswith("elbo/"))
    assert logs[0]["loss"] == pytest.approx(logs[0]["task_loss"] + together, rel=1e-5)


def test_without_adapters_or_elbo_there_is_nothing_to_tell(tmp_path: Path) -> None:
    model = adapted("vit", torch.float32, elbo_weight=0.0)
    for entry in training_logs(trainer(model, tmp_path)):
        assert entry["task_loss"] == pytest.approx(entry["loss"], rel=1e-6)
        assert not [key for key in entry if key.startswith("elbo/")]
    plain = model.unload()
    plain.requires_grad_(True)
    made = FVAELoraTrainer(plain, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    made.log({"loss": 1.0})
    assert "task_loss" not in made.state.log_history[-1]


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    class EvaluateOften(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            made = owners[0]
            made.evaluate(made.train_dataset)

    owners: list[Any] = []

    class Owned(Spy):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            owners.append(self)
            self.add_callback(EvaluateOften())

    for entry in training_logs(trainer(adapted("vit", torch.float32), tmp_path, Owned)):
        together = sum(value for key, value in entry.items() if key.startswith("elbo/"))
        assert entry["loss"] == pytest.approx(entry["task_loss"] + together, rel=1e-5)


def test_numbers_are_read_from_the_device_at_logging_steps_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_at: list[int] = []
    means = LossLog.means

    def watched(log: LossLog, step: int, *args: Any) -> dict[str, float]:
        read_at.append(step)
        return means(log, step, *args)

    monkeypatch.setattr(LossLog, "means", watched)
    trainer(adapted("vit", torch.float32), tmp_path, max_steps=7, logging_steps=3)
    assert read_at == [3, 6]

    # Tensors without data: whatever reads a number raises.
    meta: dict[str, Any] = {"device": "meta"}
    weights = TokenWeights(None, torch.ones((), **meta))
    elbo = LayerElbo(
        FVAELoraConfig(), weights, torch.ones((), **meta), torch.ones(3, **meta), (), torch.ones(0, **meta)
    )
    run = LayerRun("layer", "default", elbo, True)
    forward = Forward(per_token={("layer", "default"): torch.ones((), **meta)})
    forward.runs.append(run)
    log = LossLog()
    for step in range(2):
        log.add(torch.ones((), **meta), [forward], 2, step)
    with pytest.raises((RuntimeError, NotImplementedError)):
        log.means(2, lambda sums: sums, False)

    def reduced(sums: Tensor) -> Tensor:
        assert sums.shape == (4,)
        return torch.tensor([2.0, 4.0, -6.0, 8.0])

    log.add(torch.ones((), **meta), [forward], 2, 0)
    assert log.means(2, reduced, True) == {
        "task_loss": 1.0,
        "elbo/reconstruction": 2.0,
        "elbo/layer/reconstruction": 2.0,
        "elbo/kl_z1": -3.0,
        "elbo/layer/kl_z1": -3.0,
        "elbo/gamma": 4.0,
        "elbo/layer/gamma": 4.0,
    }
