"""The ways in which an auxiliary loss vanishes silently or is mis-weighted, one after the other.

Wherever a loss comes out, its gradients must be those of the formula written out in ``by_hand``; wherever none can,
an error must name the ways out.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)

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
)
from fvae_lora import add_elbo, elbo_loss, elbo_terms
from loss_table import DOUBLE, TOLERANCE, WAYS_OUT, expected_of, own_loss, vit, without_labels
from tiny import batch_for, randomised, tiny_bert, tiny_vit

pytestmark = pytest.mark.usefixtures("without_noise")


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
