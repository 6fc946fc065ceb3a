"""The loss table, of graphs: checkpointing, models of unusual shape, backwards, copies, memory, torch.compile."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    Trainer,
)

import fvae_lora.objective
from by_hand import (
    Batch,
    adapted,
    assert_same,
    collated,
    config,
    elbo_by_hand,
    gradients,
    layers_by_hand,
    loss_by_hand,
    rows_for,
    trainer_gradients,
)
from fvae_lora import ElboTrainerMixin, FVAELoraTrainer, add_elbo, elbo_loss, elbo_terms
from fvae_lora.layer import FVAELoraLayer
from loss_table import DOUBLE, TOLERANCE, WAYS_OUT, expected_of, own_loss, vit, without_labels
from tiny import batch_for, randomised, tiny_vit

pytestmark = pytest.mark.usefixtures("without_noise")


# --- Gradient checkpointing -----------------------------------------------------------------------------------------


def checkpointed(model: PeftModel, use_reentrant: bool) -> list[bool]:
    """Turn checkpointing on; the list gets, for each run of an adapted layer, whether gradients were on."""
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    base.enable_input_require_grads()
    runs: list[bool] = []
    layer = next(module for module in model.modules() if isinstance(module, FVAELoraLayer))
    layer.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    return runs


REENTRANT = {True: [False, True], False: [True, True]}  # gradients on in the first run of a layer, and in the second


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["vit", "bert", "llama", "t5"])
def test_checkpointing(kind: str, use_reentrant: bool) -> None:
    model = adapted(kind)
    batch = batch_for(model.get_base_model())
    if kind == "t5":
        batch = collated(rows_for("t5", [6, 6, 6]))
    expected = gradients(model, lambda: model(**batch).loss)
    assert_same(expected, expected_of(model, batch), TOLERANCE.get(kind, 1e-10))
    runs = checkpointed(model, use_reentrant)
    assert_same(gradients(model, lambda: model(**batch).loss), expected)
    assert runs == REENTRANT[use_reentrant]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_noise(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with noise, for once
    model, batch = vit()

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return model(**batch).loss

    expected = gradients(model, seeded)
    runs = checkpointed(model, use_reentrant)
    assert_same(gradients(model, seeded), expected)
    assert runs == REENTRANT[use_reentrant]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_in_an_own_loop(use_reentrant: bool) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    checkpointed(model, use_reentrant)
    assert_same(gradients(model, lambda: add_elbo(own_loss(model, batch), model)), expected)
    assert_same(gradients(model, lambda: own_loss(model, batch) + elbo_loss(model)), expected)
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        own_loss(model, batch).backward()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        model(**batch).logits.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_two_forwards_before_one_backward(use_reentrant: bool) -> None:
    """Of unequal lengths, so that each forward needs its own masks and its own number of tokens."""
    model = adapted("bert")
    one, other = collated(rows_for("bert", [2, 5, 3])), collated(rows_for("bert", [4, 1, 5]))
    expected = gradients(model, lambda: 2 * loss_by_hand(model, [one]) + 3 * loss_by_hand(model, [other]))
    runs = checkpointed(model, use_reentrant)
    found = gradients(model, lambda: 2 * model(**one).loss + 3 * model(**other).loss)
    assert_same(found, expected)
    assert runs[:4] == [not use_reentrant] * 2 + [True] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_partial_checkpointing(use_reentrant: bool) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    runs = checkpointed(model, use_reentrant)
    model.get_base_model().vit.layers[1].gradient_checkpointing = False
    assert_same(gradients(model, lambda: model(**batch).loss), expected)
    assert runs == REENTRANT[use_reentrant]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_twice_through_one_graph(use_reentrant: bool) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    checkpointed(model, use_reentrant)

    def twice() -> None:
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()

    found = gradients(model, twice)
    assert_same({name: gradient / 2 for name, gradient in found.items()}, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_around_the_whole_model(use_reentrant: bool) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    pixels = batch["pixel_values"].requires_grad_()

    def whole() -> Tensor:
        return checkpoint(lambda x: model(x, labels=batch["labels"]).loss, pixels, use_reentrant=use_reentrant)

    assert_same(gradients(model, whole), expected)


def test_nested_reentrant_checkpoints() -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    layers = model.get_base_model().vit.layers
    for layer in [*layers, layers[0].attention]:
        layer.forward = _checkpointing(layer.forward)
    model.get_base_model().enable_input_require_grads()
    assert_same(gradients(model, lambda: model(**batch).loss), expected)


def _checkpointing(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *args, **kwargs: checkpoint(lambda y: forward(y, *args, **kwargs), x, use_reentrant=True)


def test_a_checkpoint_that_cannot_train_says_so() -> None:
    """Where nothing before it requires a gradient, a reentrant checkpoint never runs again."""
    model = adapted("vit", modules_to_save=["classifier"])
    batch = batch_for(model.get_base_model())
    for layer in model.get_base_model().vit.layers:
        layer.forward = _checkpointing(layer.forward)
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        pytest.raises(RuntimeError, match="use_reentrant=False"),
    ):
        model(**batch).loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_in_the_trainer(use_reentrant: bool, tmp_path: Path) -> None:
    model, rows = adapted("bert"), rows_for("bert", [2, 6, 3, 5])
    expected = gradients(model, lambda: loss_by_hand(model, [collated(rows)]))
    for trainer in (Trainer, FVAELoraTrainer):
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        (found,) = trainer_gradients(trainer, model, rows, 4, 1, tmp_path, **settings)
        assert_same(found, expected)


# --- Layers and models of unusual shape -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_layer_that_runs_several_times_has_one_mean(use_reentrant: bool | None) -> None:
    settings = {"vocab_size": 60, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    albert = AlbertConfig(**settings, **dropout, num_attention_heads=2, num_hidden_layers=3)
    base = AlbertForSequenceClassification(albert).to(DOUBLE)
    model = adapted(base, target_modules=["query", "value"])
    batch = collated(rows_for("bert", [2, 6, 4]))
    expected = expected_of(model, batch)
    if use_reentrant is not None:
        layers = base.albert.encoder.albert_layer_groups[0].albert_layers
        layers[0].forward = _checkpointing(layers[0].forward)
        base.enable_input_require_grads()
    assert_same(gradients(model, lambda: model(**batch).loss), expected)
    assert len(elbo_terms(model)) == 2


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.lin(x).sum() + self.lin(y).sum()


def test_runs_of_one_layer_count_by_their_tokens() -> None:
    model = randomised(get_peft_model(_Shared().to(DOUBLE), config("vit", target_modules=["lin"])))
    batch = {"x": torch.randn(2, 4, dtype=DOUBLE), "y": torch.randn(7, 3, 4, dtype=DOUBLE)}

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return output + elbo

    expected = gradients(model, by_hand)
    assert_same(gradients(model, lambda: add_elbo(model(**batch), model)), expected)
    terms = elbo_terms(model)["lin"]
    x = torch.cat([batch["x"], batch["y"].flatten(0, 1)])
    model(x, x)
    assert terms == pytest.approx(elbo_terms(model)["lin"])


def test_active_adapters_add_up() -> None:
    model, batch = vit()
    model.add_adapter("other", config("vit", r=2, elbo_weight=0.7, reconstruction_weight=0.1))
    randomised(model).base_model.set_adapter(["default", "other"])
    expected = expected_of(model, batch)
    assert_same(gradients(model, lambda: model(**batch).loss), expected)
    assert {name.rpartition(".")[2] for name in elbo_terms(model)} == {"default", "other"}


def test_active_adapters_must_agree_on_the_weight_of_the_task() -> None:
    model, batch = vit()
    model.add_adapter("other", config("vit", task_weight=2.0))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="task_weight"):
        model(**batch)
    with pytest.raises(ValueError, match="task_weight"):
        add_elbo(own_loss(model, batch), model)


def test_mean_over_layers_and_weighted_task(tmp_path: Path) -> None:
    model = adapted("vit", layer_reduction="mean", task_weight=5.0)
    rows = rows_for("vit", range(4))
    batch = collated(rows)

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return 5 * output.loss + elbo / 4  # two modules in each of two layers

    expected = gradients(model, by_hand)
    assert_same(gradients(model, lambda: model(**batch).loss), expected)
    assert_same(gradients(model, lambda: add_elbo(own_loss(model, batch), model)), expected)
    for trainer in (Trainer, FVAELoraTrainer):
        assert_same(trainer_gradients(trainer, model, rows, 1, 4, tmp_path)[0], expected)


class _Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = get_peft_model(tiny_vit(DOUBLE), config("vit"))
        self.right = get_peft_model(tiny_vit(DOUBLE), config("vit", elbo_weight=0.5))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self.left(pixel_values).logits * self.right(pixel_values).logits).mean()


def test_two_adapted_models_in_one() -> None:
    model = randomised(_Towers()).train()
    batch = batch_for(model.left.get_base_model())

    def by_hand() -> Tensor:
        with layers_by_hand() as found:
            task = model(**batch)
        # The two have layers of the same names: the first run is the left one's.
        return task - sum(0.1 * runs[0].mean() + 0.5 * runs[1].mean() for runs in found.values())

    assert_same(gradients(model, lambda: add_elbo(model(**batch), model)), gradients(model, by_hand))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        model(**batch).backward()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        add_elbo(model(**batch), model.left).backward()


def test_two_adapted_models_in_one_trainer(tmp_path: Path) -> None:
    model = randomised(_Towers()).train()
    rows = rows_for("vit", range(4))

    class Direct(ElboTrainerMixin, _Direct):
        pass

    (found,) = trainer_gradients(Direct, model, rows, 2, 2, tmp_path)
    batch = collated(rows)
    assert_same(found, gradients(model, lambda: add_elbo(model(**batch), model)))


class _Direct(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> Any:
        return (model(**inputs), None) if return_outputs else model(**inputs)


# --- Backwards, copies, failures, memory ----------------------------------------------------------------------------


def test_two_backwards_through_one_graph() -> None:
    model, batch = vit()

    def twice() -> None:
        loss = model(**batch).loss
        loss.backward(retain_graph=True)
        loss.backward()

    expected = expected_of(model, batch)
    assert_same({name: gradient / 2 for name, gradient in gradients(model, twice).items()}, expected)


@pytest.mark.parametrize("use_reentrant", [None, True])
def test_a_scaled_loss(use_reentrant: bool | None) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    if use_reentrant:
        checkpointed(model, use_reentrant)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = gradients(model, lambda: scaler.scale(model(**batch).loss))
    assert_same({name: gradient / 1024 for name, gradient in found.items()}, expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_record_for_themselves(clone: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = vit()
    loss = model(**batch).loss
    other = clone(model)
    assert elbo_terms(other) == {}
    expected = gradients(model, lambda: loss)
    assert_same(gradients(other, lambda: other(**batch).loss), expected)
    assert_same(gradients(model, lambda: model(**batch).loss), expected)


@pytest.mark.parametrize("which", [0, 1])
def test_a_forward_that_fails_leaves_nothing_behind(which: int) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.get_base_model().vit.layers[which].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    part = model.get_base_model().vit(batch["pixel_values"]).last_hidden_state.sum()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        part.backward()
    assert_same(gradients(model, lambda: model(**batch).loss), expected)


def test_dataparallel_is_refused() -> None:
    model, batch = vit()
    replica = model.get_base_model()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel.*torchrun"):
        replica(**batch)


def _graph_lives(model: nn.Module, step: Callable[[], Any]) -> bool:
    """Whether, after a step, noise that a layer keeps for its backward is still there."""
    seen: list[weakref.ref[Tensor]] = []
    original = fvae_lora.objective.standard_normal

    def spying(*args: Any) -> Tensor:
        noise = original(*args)
        seen.append(weakref.ref(noise))
        return noise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fvae_lora.objective, "standard_normal", spying)
        step()
    gc.collect()
    assert seen
    return any(reference() is not None for reference in seen)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_after_the_backward_the_graph_is_gone(checkpointing: bool | None) -> None:
    model, batch = vit()
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    assert not _graph_lives(model, lambda: model(**batch).loss.backward())
    assert not _graph_lives(model, lambda: add_elbo(own_loss(model, batch), model).backward())
    assert elbo_terms(model)
    kept: list[Tensor] = []

    def keeping_the_loss() -> None:
        kept.append(model(**batch).loss)
        kept[0].backward()

    gradients(model, keeping_the_loss)


def test_a_forward_without_backward_is_dropped_by_the_next() -> None:
    model, batch = vit()

    def unused() -> None:
        model(**without_labels(batch), output_hidden_states=True)
        model(**without_labels(batch), output_hidden_states=True)
        model.eval()(**batch)

    with pytest.warns(UserWarning, match=WAYS_OUT):
        assert not _graph_lives(model, unused)


def test_a_dropped_model_takes_its_graph_along() -> None:
    model, batch = vit()
    reference = weakref.ref(next(model.parameters()))
    model(**batch, output_hidden_states=True)
    del model
    gc.collect()
    assert reference() is None


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    monkeypatch.undo()  # the compiler has its own view of torch's functions
    monkeypatch.setattr(fvae_lora.objective, "draw", lambda mean, logvar, noise: mean)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(gradients(model, lambda: compiled(**batch).loss), expected)
    assert_same(gradients(model, lambda: add_elbo(own_loss(compiled, batch), compiled)), expected)
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        own_loss(compiled, batch).backward()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        compiled(**batch).logits.sum().backward()
