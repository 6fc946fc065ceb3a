"""What the study of uncertainty measures is measured right: against cases by hand, and as the package itself does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from scipy.special import log_softmax, softmax
from torch import nn

from by_hand import Batch, adapted, collated, rows_for
from calibration import calibration_error, records, scores, temperature
from detection import both, distances, judged, with_words_shuffled
from fvae_lora import ForeignInputDetector, FVAELoraConfig, score_inputs
from fvae_lora.detector import Features
from readings import Run, adapter_dropout, joined, read, token_gaussians
from tiny import randomised, tiny_bert


def test_calibration_error_is_the_gap_of_each_bin_by_its_rows() -> None:
    confidence = np.array([0.62, 0.64, 0.91, 0.93, 0.95])  # bins from 9/15, 13/15 and 14/15
    right = np.array([True, False, True, True, False])
    wide = (abs(1 - 1.26) + abs(2 - 1.84) + abs(0 - 0.95)) / 5
    assert calibration_error(confidence, right) == pytest.approx(wide)
    assert calibration_error(confidence, right, bins=2) == pytest.approx(abs(3 - confidence.sum()) / 5)
    equal = (abs(2 - (0.62 + 0.64 + 0.91)) + abs(1 - (0.93 + 0.95))) / 5
    assert calibration_error(confidence, right, bins=2, equal_mass=True) == pytest.approx(equal)


def test_a_confidence_of_one_is_in_the_last_bin_and_perfect_ones_have_no_error() -> None:
    assert calibration_error(np.ones(4), np.ones(4, bool)) == 0
    assert calibration_error(np.ones(4), np.zeros(4, bool)) == 1


def test_scores_of_probabilities_are_those_by_hand() -> None:
    p, labels = np.array([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]), np.array([0, 1, 1])
    found = scores(p, labels)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-np.log([0.8, 0.7, 0.4]).mean())
    assert found["brier"] == pytest.approx((2 * 0.04 + 2 * 0.09 + 2 * 0.36) / 3)


def test_the_temperature_undoes_a_scale() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3))
    labels = np.array([generator.choice(3, p=p) for p in softmax(logits, -1)])
    found = temperature(5 * logits, labels)
    assert found == pytest.approx(5, rel=0.05)

    def nll(t: float) -> float:
        return float(-log_softmax(5 * logits / t, -1)[np.arange(len(labels)), labels].mean())

    assert nll(found) <= min(nll(0.99 * found), nll(1.01 * found))


def test_ensembles_are_of_each_seed_with_the_next_two_in_a_circle() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=40)
    runs = [
        {
            "data": "d", "method": "lora", "seed": seed,
            "test_logits": generator.normal(size=(40, 2)), "test_labels": labels,
            "validation_logits": generator.normal(size=(40, 2)), "validation_labels": labels,
        }
        for seed in (1, 2, 3, 4)
    ]  # fmt: skip
    found = [record for record in records(runs) if record["prediction"] == "ensemble of 3"]
    assert [record["seed"] for record in found] == [1, 2, 3, 4]
    p = np.mean([softmax(runs[member]["test_logits"], -1) for member in (2, 3, 0)], axis=0)
    assert found[2]["nll"] == pytest.approx(scores(p, labels)["nll"], rel=1e-5)


def test_judging_counts_what_passes_where_95_percent_of_the_tested_do() -> None:
    tested = np.arange(100.0)
    (found,) = judged({"training": tested, "held out": tested, "tested": tested, "far": np.full(10, 95.5)})
    assert found["foreign"] == "far"
    assert found["fpr95"] == 0
    assert found["auroc"] == pytest.approx(0.96)
    (found,) = judged({"training": tested, "held out": tested, "tested": tested, "near": np.array([93.5, 99.0])})
    assert found["fpr95"] == 0.5
    assert found["alarms"] == pytest.approx(0.05, abs=0.011)


def test_words_are_shuffled_whole_and_the_ends_stay() -> None:
    class Pieces:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [{3: "##ly"}.get(number, "word") for number in ids]

    item = {"input_ids": [0, 5, 6, 3, 7, 8, 1], "labels": 1}
    orders = set()
    for seed in range(20):
        ids = with_words_shuffled(item, np.random.default_rng(seed), Pieces())["input_ids"]
        assert (ids[0], ids[-1], sorted(ids)) == (0, 1, sorted(item["input_ids"]))
        assert ids[ids.index(3) - 1] == 6
        orders.add(tuple(ids))
    assert len(orders) > 5


def test_two_distances_together_are_each_in_its_own_units() -> None:
    generator = np.random.default_rng(0)
    first = {name: generator.chisquare(5, size=50) for name in ("held out", "tested")}
    second = {name: generator.chisquare(5, size=50) for name in ("held out", "tested")}
    scaled = {name: 1000 * scores for name, scores in second.items()}
    np.testing.assert_allclose(both(first, second)["tested"], both(first, scaled)["tested"])


def test_distances_know_the_training_rows_correlations() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2000, 1)) + 0.1 * generator.normal(size=(2000, 2))
    found = distances({"training": x, "along": np.array([[2.0, 2.0]]), "across": np.array([[1.0, -1.0]])})
    assert found["across"][0] > 20 * found["along"][0]


def run_of(model: PeftModel, has_decoder: bool = True) -> Run:
    """A run as far as reading rows needs one; its items are batches."""

    class Reading(SimpleNamespace):
        def batches(self, items: list[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
            for batch in items:
                yield batch, np.zeros(len(batch["input_ids"]))

    return cast(Run, Reading(model=model.eval(), has_decoder=has_decoder))


def test_the_study_scores_inputs_as_the_detector_does_but_for_the_shrinkage_formula() -> None:
    model = adapted("bert")
    training, tested = ([collated(rows_for("bert", lengths))] for lengths in ([3, 6, 4, 5, 7, 2] * 20, [3, 6, 1, 4, 5]))
    run = run_of(model)
    gaussians = token_gaussians(run, training)
    found = {"training": read(run, training, gaussians), "tested": read(run, tested, gaussians)}
    for name, terms in {"likelihood": ["log_likelihood"], "latents": ["z1_mean", "z2_mean"]}.items():
        detector = ForeignInputDetector.fit(model, training, tested, cast(Features, name))
        features = {key: joined([of_set[term] for term in terms]) for key, of_set in found.items()}
        expected = detector.score(**tested[0]).score.numpy()
        np.testing.assert_allclose(distances(features)["tested"], expected, rtol=0.02)


def test_reading_finds_logits_the_heads_input_and_layers_inputs_without_padding() -> None:
    model, rows = adapted("bert"), rows_for("bert", [3, 6, 4])
    batch = collated(rows, length=9)
    gaussians = token_gaussians(run_of(model), [collated(rows_for("bert", [9] * 20))])
    found = read(run_of(model), [batch], gaussians)
    alone = read(run_of(model, has_decoder=False), [collated([row]) for row in rows], gaussians)
    for name in ("logits", "state", "inputs", "tokens"):
        np.testing.assert_allclose(found[name], alone[name], rtol=1e-5, atol=1e-6)
    output = model(**batch, output_hidden_states=True)
    np.testing.assert_allclose(found["logits"], output.logits.detach(), rtol=1e-5)
    first = output.hidden_states[0].detach()[0, :3].mean(0)  # of a block's query and value, which read the same
    np.testing.assert_allclose(found["inputs"][0, : len(first)], first, rtol=1e-5, atol=1e-6)
    assert found["inputs"].shape == (3, 2 * len(first))
    scores = score_inputs(model, **batch)
    assert (found["least"] <= np.stack([layer.log_likelihood for layer in scores.values()], -1) + 1e-6).all()


def test_tokens_are_as_far_from_their_own_gaussian_as_they_vary_in_dimensions() -> None:
    model, lengths = adapted("bert"), [3, 6, 4, 9, 5] * 20
    batch = collated(rows_for("bert", lengths))
    far = read(run_of(model), [batch], token_gaussians(run_of(model), [batch]))["tokens"]
    np.testing.assert_allclose(np.average(far, axis=0, weights=lengths), [15, 15], rtol=1e-3)  # a layer norm takes one


@pytest.mark.parametrize("kind", ["lora", "dora", "fvae-no-elbo"])
def test_the_adapters_dropout_is_all_that_is_switched_on(kind: str) -> None:
    torch.manual_seed(0)
    common = {"r": 3, "target_modules": ["query", "value"], "lora_dropout": 0.5}
    if kind == "fvae-no-elbo":
        config: PeftConfig = FVAELoraConfig(**common, elbo_weight=0)
    else:
        config = LoraConfig(**common, use_dora=kind == "dora", init_lora_weights=False)
    model = randomised(get_peft_model(tiny_bert(hidden_dropout_prob=0.9), config)).eval()
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    with torch.no_grad():
        before = model(**batch).logits
        with adapter_dropout(model):
            assert not any(module.training for name, module in model.named_modules() if name.endswith("LayerNorm"))
            assert [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.training] == [0.5] * 4
            passes = torch.stack([model(**batch).logits for _ in range(3)])
        assert passes.std(0).min() > 0
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
    assert not any(module.training for module in model.modules())
