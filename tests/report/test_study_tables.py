"""What the tables of the studies on the plateau, few examples and factorisation compute, by hand at a small size."""

from __future__ import annotations

import math
import statistics

import pytest

import factorisation
import few_examples
import plateau


def test_the_plateau_is_the_range_around_the_best_within_two_points() -> None:
    scores = {1e-3: 0.79, 3e-3: 0.78, 1e-2: 0.80, 3e-2: 0.785, 1e-1: 0.50, 3e-1: 0.80 - 0.001}
    found = plateau.plateau(scores)
    assert (found.low, found.high, found.best, found.at_edge) == (1e-3, 3e-2, 0.80, True)
    assert found.decades == pytest.approx(math.log10(30))


def test_the_plateau_counts_a_score_exactly_two_points_below_and_stops_at_a_failed_run() -> None:
    found = plateau.plateau({1e-3: 0.58, 3e-3: 0.56, 1e-2: 0.50, 3e-2: None})
    assert (found.low, found.high) == (1e-3, 3e-3)
    stopped = plateau.plateau({1e-3: 0.1, 3e-3: 0.56, 1e-2: None, 3e-2: 0.56})
    assert (stopped.low, stopped.high, stopped.at_edge) == (3e-3, 3e-3, False)
    with pytest.raises(ValueError, match="no rate"):
        plateau.plateau({1e-3: None})


def test_the_plateaus_table_compares_with_lora_over_the_sets_of_both() -> None:
    def wide(high: float) -> plateau.Plateau:
        return plateau.Plateau(1e-3, high, 0.8, at_edge=high > 1e-2)

    found = {
        "LoRA": {"a": wide(1e-2), "b": wide(1e-2), "c": wide(1e-2)},
        "ours": {"a": wide(1e-1), "b": wide(1e-2)},
        "on one set alone": {"a": wide(1e-2)},
    }
    rows = plateau.plateau_table(found).splitlines()
    assert rows[-1] == "| ours | ≥ 2.0 (80.0) | 1.0 (80.0) | – | 1.50 | +0.50 ± 6.35 | 2 |"
    assert len(rows) == 4


def test_differences_between_methods_are_those_of_the_same_seed() -> None:
    def line(method: str, seed: int, accuracy: float) -> few_examples.Line:
        scores = dict.fromkeys(few_examples.SCORES, accuracy)
        return {"purpose": "result", "method": method, "rows": 5, "seed": seed, "chosen": scores, "last": scores}

    lora, ours, encoder = few_examples.COMPARED
    lines = [line(lora, 1, 0.70), line(lora, 2, 0.60), line(lora, 3, 0.1)]
    lines += [line(ours, 1, 0.72), line(ours, 2, 0.62), line(encoder, 1, 0.7), line(encoder, 2, 0.6)]
    first = few_examples.difference_table(lines).splitlines()[2]
    assert first.startswith(f"| 5 | {ours} − {lora} | +2.00 ± 0.00 | +2.00 ± 0.00 | +0.02")
    assert first.endswith("| 2 |")


def test_the_rate_is_the_lowest_within_a_standard_error_of_the_best_on_validation() -> None:
    def line(rate: float, accuracy: float) -> few_examples.Line:
        return {"settings": {"train.learning_rate": rate}, "validation": [[1, accuracy, 0.5], [2, accuracy - 0.1, 0.9]]}

    lines = [line(1e-3, 0.60), line(3e-3, 0.66), line(3e-3, 0.68), line(1e-2, 0.70), line(1e-2, 0.70)]
    assert few_examples.choose_rate(lines) == 3e-3  # an error of 0.5 / sqrt(200) = 0.035
    assert few_examples.choose_rate([*lines, line(3e-3, 0.60)]) == 1e-2


def _line(seed: int, label: tuple[float, float], attribute: tuple[float, float], variant: str) -> factorisation.Line:
    latents = {
        latent: {"label": label[number], "attribute": attribute[number]}
        for number, latent in enumerate(factorisation.LATENTS)
    }
    return {"variant": variant, "seed": seed, "layers": [latents, latents]}


def test_factorisation_is_positive_where_z1_has_the_label_and_z2_the_attribute() -> None:
    line = _line(1, (0.9, 0.6), (0.5, 0.7), "gradient stopped")
    assert factorisation.factorisation(line, statistics.fmean) == pytest.approx(0.5)
    turned = _line(1, (0.6, 0.9), (0.7, 0.5), "gradient stopped")
    assert factorisation.factorisation(turned, statistics.fmean) == pytest.approx(-0.5)


def test_the_table_of_probes_compares_a_variant_with_the_first_one_seed_by_seed() -> None:
    lines = [_line(seed, (0.9, 0.6), (0.5, 0.7), "gradient stopped") for seed in (1, 2)]
    lines += [_line(seed, (0.8, 0.6), (0.5, 0.7), "gradient stopped, delta 0") for seed in (1, 2)]
    row = factorisation.probe_table(lines, statistics.fmean).splitlines()[-1]
    assert "| 80.0 | 60.0 | +20.0 ± 0.0 | 50.0 | 70.0 | −20.0 ± 0.0 | +40.0 ± 0.0 | −10.0 ± 0.0 | 2 |" in row


def test_a_latent_of_which_no_unit_varies_has_no_probe_and_no_difference() -> None:
    line = _line(1, (0.9, 0.6), (0.5, 0.7), "gradient stopped")
    line["layers"] = [{"z1": {}, "z2": {"label": 0.6, "attribute": 0.7}}]
    assert factorisation.factorisation(line, max) is None
    assert "–" in factorisation.probe_table([line], max)
