"""The detector of foreign inputs: its moments, its p-values, its files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from by_hand import Batch, adapted, collated, config, rows_for
from fvae_lora import ForeignInputDetector, export_for_inference, score_inputs
from fvae_lora.detector import DESCRIPTION, NUMBERS, Features, fingerprint
from tiny import randomised, tiny_bert

DOUBLE = torch.float64


def images(rows: int, seed: int, size: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": size * torch.randn(rows, 3, 8, 8, generator=generator, dtype=DOUBLE)}


def batches(*rows: int, seed: int = 0) -> Iterator[Batch]:
    """An iterator: what is fitted sees each batch once."""
    for i, n in enumerate(rows):
        yield images(n, 100 * seed + i)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    torch.manual_seed(0)
    return adapted("vit")


def fitted(model: PeftModel, features: Features = "both") -> ForeignInputDetector:
    return ForeignInputDetector.fit(model, batches(20, 13), batches(10, 9, seed=1), features)


def features_by_hand(model: PeftModel, batch: Batch, features: str) -> Tensor:
    columns = []
    for scores in score_inputs(model, **batch).values():
        if features != "latents":
            columns.append(scores.log_likelihood[:, None])
        if features != "likelihood":
            columns += [scores.z1_mean, scores.z2_mean]
    return torch.cat(columns, -1)


@pytest.mark.parametrize("features", ["likelihood", "latents", "both"])
def test_the_distance_is_mahalanobis_with_shrunk_correlations(model: PeftModel, features: Features) -> None:
    training = torch.cat([features_by_hand(model, batch, features) for batch in batches(20, 13)])
    n, p = training.shape
    correlation = torch.corrcoef(training.T)
    s2 = correlation.square().sum()  # tr(S^2); tr(S) = p
    weight = min(1.0, float(((1 - 2 / p) * s2 + p**2) / ((n - 2 / p) * (s2 - p**2 / p))))
    assert 0 < weight < 1
    std = training.std(0)
    covariance = ((1 - weight) * correlation + weight * torch.eye(p, dtype=DOUBLE)) * torch.outer(std, std)
    new = features_by_hand(model, images(6, 77), features) - training.mean(0)
    expected = (new @ torch.linalg.inv(covariance) * new).sum(-1)
    torch.testing.assert_close(fitted(model, features).score(**images(6, 77)).score, expected, rtol=1e-6, atol=0)


def test_how_training_is_cut_into_batches_changes_nothing(model: PeftModel) -> None:
    rows = torch.cat([batch["pixel_values"] for batch in batches(20, 13)])
    found = [
        ForeignInputDetector.fit(model, ({"pixel_values": part} for part in rows.split(size)), batches(9, seed=1))
        for size in (33, 8, 1)
    ]
    scores = [detector.score(**images(5, 77)).score for detector in found]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-8, atol=0)


def test_p_values_count_the_held_out_inputs_that_are_as_far(model: PeftModel) -> None:
    detector = fitted(model)
    held_out = torch.cat([detector.score(**batch).score for batch in batches(10, 9, seed=1)])
    new = images(12, 77, size=1.3)
    found = detector.score(**new)
    expected = (1 + (held_out >= found.score[:, None]).sum(-1)) / (len(held_out) + 1)
    torch.testing.assert_close(found.p_value, expected.double())
    own = torch.cat([detector.score(**batch).p_value for batch in batches(10, 9, seed=1)])
    assert sorted(own.tolist()) == pytest.approx([i / 20 for i in range(2, 21)])  # each is as far as itself
    assert detector.score(pixel_values=torch.full((2, 3, 8, 8), 5.0, dtype=DOUBLE)).p_value.tolist() == [1 / 20] * 2


def test_false_alarms_are_as_rare_as_was_asked_for(model: PeftModel) -> None:
    detector = ForeignInputDetector.fit(model, batches(150), batches(999, seed=1), "likelihood")
    p = torch.cat([detector.score(**batch).p_value for batch in batches(500, 500, seed=2)])
    for level in (0.05, 0.2, 0.5):  # four standard errors of either sample
        error = 4 * (2 * level * (1 - level) / 1000) ** 0.5
        assert (p <= level).double().mean().item() == pytest.approx(level, abs=error)


def test_fewer_inputs_than_features_will_do(model: PeftModel) -> None:
    detector = ForeignInputDetector.fit(model, batches(2), batches(3, seed=1))
    assert detector.score(**images(4, 7)).score.isfinite().all()


def test_padding_and_the_rest_of_the_batch_do_not_count() -> None:
    model, rows = adapted("bert"), rows_for("bert", [3, 6, 1, 4, 5])
    detector = ForeignInputDetector.fit(model, [collated(rows)], [collated(rows[:2])])
    together = detector.score(**collated(rows, length=9)).score
    alone = torch.cat([detector.score(**collated([row])).score for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=0)


def test_an_input_of_padding_alone_is_foreign() -> None:
    model, batch = adapted("bert"), collated(rows_for("bert", [3, 6, 4]))
    detector = ForeignInputDetector.fit(model, [batch], [batch])
    empty = {name: value.clone() for name, value in batch.items()}
    empty["attention_mask"][1] = 0
    found = detector.score(**empty)
    assert found.score.isinf().tolist() == [False, True, False]
    assert found.p_value[1] == 1 / 4
    with pytest.raises(ValueError, match=r"an input has no finite features in bert\.encoder\.layer\.0"):
        ForeignInputDetector.fit(model, [empty], [batch])


# --- Its files ------------------------------------------------------------------------------------------------------


def test_saved_beside_the_adapter_it_comes_back(model: PeftModel, tmp_path: Path) -> None:
    detector = fitted(model)
    model.save_pretrained(tmp_path)
    detector.save(tmp_path)
    base = copy.deepcopy(model).unload()
    loaded = ForeignInputDetector.load(tmp_path, PeftModel.from_pretrained(base, tmp_path))
    found, expected = loaded.score(**images(5, 77)), detector.score(**images(5, 77))
    torch.testing.assert_close(found.score, expected.score)
    assert torch.equal(found.p_value, expected.p_value)
    assert {file.name for file in tmp_path.iterdir()} >= {NUMBERS, DESCRIPTION, "adapter_model.safetensors"}
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_no_input_is_stored(model: PeftModel, tmp_path: Path) -> None:
    """Moments, and one number for each held-out input."""
    sizes = []
    for rows in (40, 400):
        ForeignInputDetector.fit(model, batches(rows), batches(9, seed=1)).save(tmp_path)
        sizes.append(len((tmp_path / NUMBERS).read_bytes()))
    assert sizes[0] == sizes[1]


def test_a_detector_of_another_adapter_is_refused(model: PeftModel, tmp_path: Path) -> None:
    fitted(model).save(tmp_path)
    with pytest.raises(ValueError, match="of other weights than the model's active adapters have") as error:
        ForeignInputDetector.load(tmp_path, randomised(adapted("vit")))
    assert "\n" not in str(error.value)


def test_a_fingerprint_is_that_of_the_weights() -> None:
    model = adapted("bert", torch.float32)
    first = fingerprint(model)
    assert first == fingerprint(model.eval())
    rounded = fingerprint(model.to(torch.bfloat16))
    assert rounded == fingerprint(model.to(torch.float32)) != first
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "decoder_output_bias" in name)[0] += 1e-3
    assert fingerprint(model) != rounded


def test_nothing_half_written_stays_after_a_stop(
    model: PeftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        fitted(model).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_file_is_refused(model: PeftModel, tmp_path: Path, kept: int) -> None:
    fitted(model).save(tmp_path)
    contents = (tmp_path / NUMBERS).read_bytes()
    (tmp_path / NUMBERS).write_bytes(contents[:kept])
    with pytest.raises(ValueError, match=r"foreign_inputs\.safetensors is truncated, or does not belong to"):
        ForeignInputDetector.load(tmp_path, model)


def test_files_that_are_missing_or_something_else_are_refused(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"foreign_inputs\.json is not readable as JSON"):
        ForeignInputDetector.load(tmp_path, model)
    fitted(model).save(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(description | {"features": "pixels"}))
    with pytest.raises(ValueError, match=r"must name features \(likelihood, latents, both\)"):
        ForeignInputDetector.load(tmp_path, model)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description)[:-9])
    with pytest.raises(ValueError, match="is not readable as JSON"):
        ForeignInputDetector.load(tmp_path, model)
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    (tmp_path / NUMBERS).unlink()
    with pytest.raises(ValueError, match=r"foreign_inputs\.safetensors is not readable: No such file"):
        ForeignInputDetector.load(tmp_path, model)


# --- What it cannot be fitted to ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": []}, "training must have at least two inputs, not 0"),
        ({"training": [images(1, 0)]}, "training must have at least two inputs, not 1"),
        ({"held_out": []}, "held_out must have at least one input, not 0"),
        ({"features": "pixels"}, "features must be one of likelihood, latents, both, not 'pixels'"),
    ],
)
def test_too_little_to_fit(model: PeftModel, arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"training": batches(20), "held_out": batches(9, seed=1)}
    with pytest.raises(ValueError, match=message):
        ForeignInputDetector.fit(model, **good | arguments)


def test_an_adapter_for_inference_alone_is_refused_with_the_reason(model: PeftModel, tmp_path: Path) -> None:
    fitted(model).save(tmp_path)
    export_for_inference(model, tmp_path / "small")
    small = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "small")
    with pytest.raises(ValueError, match="'default' is inference_only: it has encoder 1's mean and B alone"):
        ForeignInputDetector.load(tmp_path, small)


def test_other_active_adapters_are_told_from_those_it_was_fitted_to() -> None:
    model = adapted("vit")
    detector = fitted(model)
    model.add_adapter("other", config("vit"))
    randomised(model)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="other adapters or layers are active"):
        detector.score(**images(2, 0))
    with pytest.raises(ValueError, match="has no FVAE-LoRA adapter"):
        ForeignInputDetector.fit(tiny_bert(), [], [])
