"""The ways in which an auxiliary loss vanishes silently or is mis-weighted, one after the other.

Wherever a loss comes out, its gradients must be those of the formula written out in ``by_hand``; wherever none can,
an error must name the ways out.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    Trainer,
)

import fvae_lora.objective
from by_hand import (
    Batch,
    Gradients,
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
from tiny import batch_for, randomised, tiny_bert, tiny_vit

pytestmark = pytest.mark.usefixtures("without_noise")
WAYS_OUT = r"add_elbo.*FVAELoraTrainer"
DOUBLE = torch.float64
TOLERANCE = {"llama": 1e-6, "t5": 1e-6}  # these round to fp32 inside, whatever their dtype


def vit() -> tuple[PeftModel, Batch]:
    model = adapted("vit")
    return model, batch_for(model.get_base_model())


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def expected_of(model: nn.Module, batch: Batch) -> Gradients:
    return gradients(model, lambda: loss_by_hand(model, [batch]))


# --- The model's own loss, whichever way the adapters came in -------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "task_type"),
    [
        ("vit", None),
        ("bert", None),
        ("bert", "SEQ_CLS"),
        ("llama", None),
        ("llama", "CAUSAL_LM"),
        ("gpt2", "CAUSAL_LM"),
    ],
)
def test_every_task_type(kind: str, task_type: str | None) -> None:
    model = adapted(kind, task_type=task_type)
    batch = batch_for(model.get_base_model())
    elbo, (output,) = elbo_by_hand(model, [batch])
    torch.testing.assert_close(model(**batch).loss, output.loss + elbo, rtol=1e-6, atol=0)
    assert_same(gradients(model, lambda: model(**batch).loss), expected_of(model, batch), TOLERANCE.get(kind, 1e-10))


@pytest.mark.parametrize(
    ("head", "task_type", "labels"),
    [
        (BertForTokenClassification, "TOKEN_CLS", {"labels": torch.arange(24).reshape(4, 6) % 3}),
        (
            BertForQuestionAnswering,
            "QUESTION_ANS",
            {"start_positions": torch.arange(4) % 2, "end_positions": torch.arange(4) % 3},
        ),
    ],
)
@pytest.mark.parametrize("return_dict", [True, False])
def test_heads_on_tokens(head: type[PreTrainedModel], task_type: str, labels: Batch, return_dict: bool) -> None:
    classes = 2 if task_type == "QUESTION_ANS" else 3
    model = adapted(head(tiny_bert(num_labels=classes).config).to(DOUBLE), task_type=task_type)
    batch = without_labels(batch_for(model.get_base_model())) | labels | {"return_dict": return_dict}
    expected = gradients(model, lambda: elbo_by_hand(model, [batch])[0] + model_loss_by_hand(model, batch))
    assert_same(gradients(model, lambda: model(**batch)[0]), expected)


def model_loss_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    with layers_by_hand():
        return model(**batch)[0]


def test_encoder_and_decoder() -> None:
    """Masks of the two sequences are the subject of ``test_masks``; here every token counts."""
    model = adapted("t5", task_type="SEQ_2_SEQ_LM")
    batch = collated(rows_for("t5", [6, 6, 6]))
    assert_same(gradients(model, lambda: model(**batch).loss), expected_of(model, batch), 1e-6)


def test_feature_extraction_has_no_loss_of_its_own() -> None:
    model = adapted(BertModel(tiny_bert().config).to(DOUBLE), task_type="FEATURE_EXTRACTION")
    batch = without_labels(batch_for(model.get_base_model()))

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return output.last_hidden_state.square().mean() + elbo

    found = gradients(model, lambda: add_elbo(model(**batch).last_hidden_state.square().mean(), model))
    assert_same(found, gradients(model, by_hand))


@pytest.mark.parametrize("inject", [False, True])
def test_injected_without_a_peft_model(inject: bool) -> None:
    base = tiny_vit(DOUBLE)
    if inject:
        inject_adapter_in_model(config("vit"), base)
    else:
        base.add_adapter(config("vit"))
    model, batch = randomised(base).train(), batch_for(base)

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return output.loss + elbo

    assert_same(gradients(model, lambda: model(**batch).loss), gradients(model, by_hand))


# --- What the model returns, and how it is called -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_tuples(kind: str) -> None:
    model = adapted(kind)
    batch = batch_for(model.get_base_model())
    found = gradients(model, lambda: model(**batch, return_dict=False)[0])
    assert_same(found, expected_of(model, batch))


@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_positional_labels(kind: str) -> None:
    model = adapted(kind)
    batch = batch_for(model.get_base_model())
    names = list(inspect.signature(model.get_base_model().forward).parameters)
    positional = [batch.get(name) for name in names[: names.index("labels") + 1]]
    rest = {name: value for name, value in batch.items() if name not in names[: names.index("labels") + 1]}
    found = gradients(model, lambda: model(*positional, **rest).loss)
    assert_same(found, expected_of(model, batch), TOLERANCE.get(kind, 1e-10))


class _Named(NamedTuple):
    loss: Tensor
    logits: Tensor


@dataclass
class _Plain:
    loss: Tensor
    logits: Tensor


class _Head(nn.Module):
    """A model of no library: its forward returns what it is told to."""

    def __init__(self, returns: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.returns = returns

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.out(self.lin(x).tanh())
        return logits if labels is None else self.returns(F.cross_entropy(logits, labels), logits)


def head(returns: Callable[[Tensor, Tensor], Any]) -> tuple[PeftModel, Batch]:
    base = _Head(returns).to(DOUBLE)
    model = randomised(get_peft_model(base, config("vit", target_modules=["lin"])))
    return model, {"x": torch.randn(5, 4, dtype=DOUBLE), "labels": torch.arange(5) % 3}


@pytest.mark.parametrize(
    ("returns", "loss_of"),
    [
        (lambda loss, logits: loss, lambda output: output),
        (lambda loss, logits: (loss, logits), lambda output: output[0]),
        (_Named, lambda output: output.loss),
        (lambda loss, logits: {"loss": loss, "logits": logits}, lambda output: output["loss"]),
    ],
)
def test_models_of_no_library(returns: Any, loss_of: Callable[[Any], Tensor]) -> None:
    model, batch = head(returns)

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return loss_of(output) + elbo

    assert_same(gradients(model, lambda: loss_of(model(**batch))), gradients(model, by_hand))


@pytest.mark.parametrize(
    ("returns", "loss_of"),
    [
        (_Plain, lambda output: output.loss),
        (lambda loss, logits: {"total": loss}, lambda output: output["total"]),
        (lambda loss, logits: (logits, loss), lambda output: output[1]),
        (lambda loss, logits: {"loss": loss.expand(2)}, lambda output: output["loss"].sum()),
    ],
)
def test_an_output_in_which_no_loss_is_found(returns: Any, loss_of: Callable[[Any], Tensor]) -> None:
    model, batch = head(returns)
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        loss_of(model(**batch)).backward()

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return loss_of(output) + elbo

    assert_same(gradients(model, lambda: add_elbo(loss_of(model(**batch)), model)), gradients(model, by_hand))


# --- Loops that compute their own loss ------------------------------------------------------------------------------


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(**without_labels(batch)).logits, batch["labels"])


def test_own_loop() -> None:
    model, batch = vit()
    expected = expected_of(model, batch)
    assert_same(gradients(model, lambda: add_elbo(own_loss(model, batch), model)), expected)
    assert_same(gradients(model, lambda: own_loss(model, batch) + elbo_loss(model)), expected)

    def elbo_first() -> Tensor:
        logits = model(**without_labels(batch)).logits
        elbo = elbo_loss(model)
        return F.cross_entropy(logits, batch["labels"]) + elbo

    assert_same(gradients(model, elbo_first), expected)


def test_own_loop_that_forgets() -> None:
    model, batch = vit()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        own_loss(model, batch).backward()


def test_own_loop_beside_the_loss_of_the_model() -> None:
    """The textbook way to weight classes: labels go in, and the loss that comes out is not used."""
    model, batch = vit()
    with pytest.raises(RuntimeError, match=r"without labels.*" + WAYS_OUT):
        F.cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1).backward()


def test_a_term_beside_the_loss_of_the_model() -> None:
    model, batch = vit()

    def found() -> Tensor:
        output = model(**batch)
        return output.loss + output.logits.square().mean()

    def by_hand() -> Tensor:
        elbo, (output,) = elbo_by_hand(model, [batch])
        return output.loss + output.logits.square().mean() + elbo

    assert_same(gradients(model, found), gradients(model, by_hand))


def test_an_elbo_that_was_asked_for_and_left_out() -> None:
    model, batch = vit()
    loss = own_loss(model, batch)
    elbo_loss(model)
    loss.backward()  # a backward of the ELBO could follow
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        model(**batch)
    model(**batch).loss.backward()


def test_task_and_elbo_in_two_backwards() -> None:
    model, batch = vit()

    def two() -> None:
        loss = own_loss(model, batch)
        elbo = elbo_loss(model)
        loss.backward(retain_graph=True)
        elbo.backward()

    assert_same(gradients(model, two), expected_of(model, batch))
    model(**batch)


def test_looking_at_the_elbo_is_not_using_it() -> None:
    model, batch = vit()
    loss = own_loss(model, batch)
    with torch.no_grad():
        assert elbo_loss(model) != 0
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        loss.backward()


def test_the_elbo_cannot_be_added_twice() -> None:
    model, batch = vit()
    loss = model(**batch).loss
    with pytest.raises(RuntimeError, match="contains the ELBO already"):
        add_elbo(loss, model)
    with pytest.warns(UserWarning, match="contains the ELBO already"):
        elbo_loss(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        elbo_loss(model)  # to log it is fine


def test_add_elbo_wants_a_scalar() -> None:
    """Added to a loss per row and summed, it would count once for each row."""
    model, batch = vit()
    logits = model(**without_labels(batch)).logits
    with pytest.raises(ValueError, match="scalar"):
        add_elbo(F.cross_entropy(logits, batch["labels"], reduction="none"), model)


@pytest.mark.parametrize("fields", [{}, {"elbo_token_fraction": 1e-9}])
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_an_elbo_whose_gradient_stops_at_the_input_trains_its_own_layer_alone(kind: str, fields: dict) -> None:
    model = adapted(kind, elbo_stop_gradient=True, **fields)
    batch = batch_for(model.get_base_model())

    def elbo() -> Tensor:
        model(**batch)
        return elbo_loss(model)

    assert {name.split(".")[-1].split("_")[0] for name in gradients(model, elbo)} == {
        "encoder1",
        "encoder2",
        "decoder",
        "log",
    }
    if not fields:
        expected = expected_of(model, batch)
        assert any(".fvae_lora_B." in name for name in expected)
        assert_same(gradients(model, lambda: model(**batch).loss), expected, TOLERANCE.get(kind, 1e-10))


def test_elbo_loss_is_what_the_hook_adds() -> None:
    model, batch = vit()
    with layers_by_hand():
        task = model(**batch).loss
    with_elbo = model(**batch).loss
    with torch.no_grad():
        torch.testing.assert_close(elbo_loss(model), with_elbo - task, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(elbo_loss(model), elbo_by_hand(model, [batch])[0], rtol=1e-12, atol=1e-14)


def test_a_part_of_the_model_called_by_itself() -> None:
    model, batch = vit()
    part, classifier = model.get_base_model().vit, model.get_base_model().classifier

    def logits() -> Tensor:
        return classifier(part(batch["pixel_values"]).last_hidden_state[:, 0])

    found = gradients(model, lambda: add_elbo(F.cross_entropy(logits(), batch["labels"]), model))
    assert_same(found, expected_of(model, batch))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        F.cross_entropy(logits(), batch["labels"]).backward()


def test_forward_called_past_the_hooks() -> None:
    model, batch = vit()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        model.get_base_model().forward(**batch).loss.backward()


# --- Modes in which there is no ELBO --------------------------------------------------------------------------------


def test_evaluation_has_no_elbo() -> None:
    model, batch = vit()
    model.eval()
    with layers_by_hand():
        task = model(**batch).loss
    assert model(**batch).loss == task
    assert elbo_loss(model) == 0
    assert not elbo_loss(model).requires_grad
    assert elbo_terms(model) == {}
    assert add_elbo(task, model) is task


def test_disabled_adapters_have_no_elbo() -> None:
    model, batch = vit()
    model(**batch).loss.backward()
    with model.disable_adapter():
        loss = model(**batch).loss
        torch.testing.assert_close(loss, own_loss(model, batch), rtol=0, atol=0)
        assert elbo_loss(model) == 0
        assert not elbo_loss(model).requires_grad


def test_evaluation_between_forward_and_backward() -> None:
    model, batch = vit()

    def with_evaluation() -> Tensor:
        loss = model(**batch).loss
        model.eval()
        with torch.no_grad():
            model(**batch)
        model.train()
        return loss

    assert_same(gradients(model, with_evaluation), expected_of(model, batch))


def test_training_mode_without_gradients() -> None:
    """As a reference in a preference trainer runs: its ELBO is nobody's, and its outputs are not noisy."""
    model, batch = vit()
    with layers_by_hand(), torch.no_grad():
        expected = model(**batch).loss
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, expected)
        loss = own_loss(model, batch)
        assert add_elbo(loss, model) is loss
        assert elbo_loss(model) == 0
    assert elbo_terms(model) == {}
    model(**batch).loss.backward()


def test_frozen_adapters_under_a_trained_head() -> None:
    model = adapted("vit", modules_to_save=["classifier"])
    batch = batch_for(model.get_base_model())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    found = gradients(model, lambda: model(**batch).loss)
    expected = gradients(model, lambda: loss_by_hand(model, [batch]))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-10) for name in expected)


def test_generate_in_training_mode() -> None:
    model = adapted("llama")
    batch = batch_for(model.get_base_model())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ELBO.*")
        model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
        found = gradients(model, lambda: model(**batch).loss)
    assert_same(found, expected_of(model, batch), 1e-6)


# --- An ELBO that nobody uses ---------------------------------------------------------------------------------------


def test_never_used_is_a_warning_once() -> None:
    model, batch = vit()
    model(**without_labels(batch))
    with pytest.warns(UserWarning, match=WAYS_OUT):
        model(**without_labels(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**without_labels(batch))
        model(**without_labels(batch))


# --- transformers' Trainer computes the loss itself -----------------------------------------------------------------


def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, label_smoothing=0.2, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.2}, {"compute_loss_func": smoothed}])
def test_a_loss_of_the_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    model, rows = adapted("vit"), rows_for("vit", range(8))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        trainer_gradients(Trainer, model, rows, 4, 2, tmp_path, **settings)

    def by_hand() -> Tensor:
        batch = collated(rows)
        elbo, (output,) = elbo_by_hand(model, [without_labels(batch)])
        return F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.2) + elbo

    expected = gradients(model, by_hand)
    for batch_size, accumulation in [(8, 1), (2, 4)]:
        (found,) = trainer_gradients(FVAELoraTrainer, model, rows, batch_size, accumulation, tmp_path, **settings)
        # transformers' label smoother sums in fp32
        assert_same(found, expected, 1e-6 if "label_smoothing_factor" in settings else 1e-10)


class _WeightsClasses(Trainer):
    """The example of transformers' documentation: labels go in, and the loss that comes out is not used."""

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class _WeightsClassesAndElbo(ElboTrainerMixin, _WeightsClasses):
    pass


def test_a_trainer_with_a_loss_of_its_own(tmp_path: Path) -> None:
    model, rows = adapted("vit"), rows_for("vit", range(8))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        trainer_gradients(_WeightsClasses, model, rows, 4, 2, tmp_path)

    def by_hand() -> Tensor:
        batch = collated(rows)
        elbo, (output,) = elbo_by_hand(model, [batch])
        weight = torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)
        return F.cross_entropy(output.logits, batch["labels"], weight, reduction="sum") / 8 + elbo

    (found,) = trainer_gradients(_WeightsClassesAndElbo, model, rows, 2, 4, tmp_path)
    assert_same(found, gradients(model, by_hand))


class _RunsTwice(Trainer):
    """Two forwards for one loss, of texts of unequal lengths, without labels."""

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = [model(**{name: inputs[name][i::2] for name in ("input_ids", "attention_mask")}) for i in range(2)]
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=inputs["input_ids"])
        loss = 100 * sum(output.logits.square().sum() for output in outputs)
        return (loss, outputs[0]) if return_outputs else loss


class _RunsTwiceWithElbo(ElboTrainerMixin, _RunsTwice):
    pass


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_trainer_that_runs_the_model_twice(tmp_path: Path, use_reentrant: bool | None) -> None:
    """All forwards of a micro-batch have one mean over their tokens, whatever ran without adapters in between."""
    model, rows = adapted("bert", modules_to_save=["classifier"]), rows_for("bert", [3, 8, 4, 5, 7, 2])
    batch = collated(rows)

    def by_hand() -> Tensor:
        halves = [{name: batch[name][i::2] for name in ("input_ids", "attention_mask")} for i in range(2)]
        elbo, outputs = elbo_by_hand(model, halves)
        return 100 * sum(output.logits.square().sum() for output in outputs) + elbo

    expected = gradients(model, by_hand)
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        trainer_gradients(_RunsTwice, model, rows, 6, 1, tmp_path)
    arguments: dict[str, Any] = {}
    if use_reentrant is not None:
        arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    (found,) = trainer_gradients(_RunsTwiceWithElbo, model, rows, 6, 1, tmp_path, **arguments)
    assert_same(found, expected)


def test_the_trainer_without_adapters_of_ours(tmp_path: Path) -> None:
    rows, model = rows_for("vit", range(4)), tiny_vit(DOUBLE)
    (stock,) = trainer_gradients(Trainer, model, rows, 2, 2, tmp_path)
    (ours,) = trainer_gradients(FVAELoraTrainer, model, rows, 2, 2, tmp_path)
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


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
