"""torch.compile: the adapted model is one graph, in training and at inference, and computes what it does without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fvae_lora.objective
from by_hand import adapted, assert_same, gradients, loss_by_hand
from fvae_lora import add_elbo, elbo_terms
from tiny import batch_for

KINDS = [pytest.param("vit"), *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "llama"))]
TOLERANCE = {"llama": 1e-6}  # rounds to fp32 inside, whatever its dtype


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is its mean; the compiler has its own view of torch's functions, hence ours are replaced."""
    monkeypatch.setattr(fvae_lora.objective, "draw", lambda mean, logvar, noise: mean)


def compiled(model: PeftModel, **options: Any) -> tuple[PeftModel, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, **options), counter


@pytest.mark.usefixtures("means")
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_one_graph_with_the_same_gradients(kind: str) -> None:
    """Also in the second and third step: what a step recorded must not have the next one compiled again."""
    model = adapted(kind)
    batch = batch_for(model.get_base_model())
    expected = gradients(model, lambda: loss_by_hand(model, [batch]))
    fast, counter = compiled(model)
    for _ in range(3):
        assert_same(gradients(model, lambda: fast(**batch).loss), expected, TOLERANCE.get(kind, 1e-10))
    assert counter.frame_count == 1
    terms = elbo_terms(model)
    model(**batch)
    for layer, of_layer in elbo_terms(model).items():
        assert terms[layer] == pytest.approx(of_layer, rel=1e-6)


@pytest.mark.usefixtures("means")
@pytest.mark.slow
def test_an_own_loop() -> None:
    model = adapted("vit")
    batch = batch_for(model.get_base_model())
    expected = gradients(model, lambda: loss_by_hand(model, [batch]))
    fast, counter = compiled(model)

    def own_loss() -> Tensor:
        return add_elbo(F.cross_entropy(fast(batch["pixel_values"]).logits, batch["labels"]), fast)

    assert_same(gradients(model, own_loss), expected)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("means")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_the_layers_break_no_graph_in_training(kind: str) -> None:
    """Compiled by itself the model inside, with every adapted layer, allows no break at all."""
    model = adapted(kind)
    batch = {name: value for name, value in batch_for(model.get_base_model()).items() if name != "labels"}
    inside = model.get_base_model().base_model
    fast = torch.compile(inside, backend="aot_eager", fullgraph=True)

    def loss(run: Any) -> Tensor:
        return add_elbo(run(**batch)[0].square().mean(), model)

    expected = gradients(model, lambda: loss(inside))
    assert_same(gradients(model, lambda: loss(fast)), expected, TOLERANCE.get(kind, 1e-10))


@pytest.mark.slow
def test_noise_is_drawn_anew_and_from_the_seed() -> None:
    model = adapted("vit")
    batch = batch_for(model.get_base_model())
    fast, _ = compiled(model)

    def seeded(run: Any, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(**batch).loss

    assert_same(gradients(model, lambda: seeded(fast, 3)), gradients(model, lambda: seeded(model, 3)))
    assert seeded(fast, 3).detach() != seeded(fast, 4).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_one_graph(kind: str) -> None:
    model = adapted(kind).eval()
    batch = batch_for(model.get_base_model())
    fast, counter = compiled(model, fullgraph=True)
    with torch.no_grad():
        expected = model(**batch)
        for _ in range(2):
            found = fast(**batch)
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.loss, expected.loss)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_training_as_a_full_graph_says_why_it_cannot() -> None:
    model = adapted("vit")
    fast, _ = compiled(model, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="train without fullgraph=True"):
        fast(**batch_for(model.get_base_model()))


@pytest.mark.usefixtures("means")
@pytest.mark.slow
def test_between_training_and_inference() -> None:
    """What training recorded is gone after a compiled forward in eval mode."""
    model = adapted("vit")
    batch = batch_for(model.get_base_model())
    fast, counter = compiled(model)
    expected = gradients(model, lambda: loss_by_hand(model, [batch]))
    for _ in range(2):
        assert_same(gradients(model, lambda: fast(**batch).loss), expected)
        assert elbo_terms(model)
        model.eval()
        with torch.no_grad():
            fast(**batch)
        assert not elbo_terms(model)
        model.train()
    assert counter.frame_count == 2
