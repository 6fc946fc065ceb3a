"""What people expect of training: a step limit, classes of different sizes, scores by class, more epochs."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from torch.nn.functional import cross_entropy

from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.run.balance import BalancedSampler, weighted_loss, weights_of
from fvae_lora_experiments.run.class_scores import by_class
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.sweep.plan import parse_seeds

Cli = Callable[..., tuple[int, str, str]]


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


def validations(folder: Path) -> list[tuple[int, float]]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(event["step"], event["epoch"]) for event in events if event["event"] == "validation"]


@pytest.mark.parametrize(
    ("text", "seeds"), [("1-5", [1, 2, 3, 4, 5]), ("1-3,7", [1, 2, 3, 7]), ("3", [3]), ("1,2,42", [1, 2, 42])]
)
def test_seeds_are_numbers_and_ranges(text: str, seeds: list[int]) -> None:
    assert parse_seeds("--seeds", text) == seeds


@pytest.mark.parametrize("text", ["5-1", "1-99999999999"])
def test_a_range_of_seeds_that_is_empty_or_endless_is_one_line(cli: Cli, small: list[str], text: str) -> None:
    code, _, error = cli("compare", "image/default", *small, "--seeds", text)
    assert (code, error) == (2, f"fvae-lora: --seeds: {text}: expected a range of 1 to 1000 seeds, for example 1-5\n")


def test_training_ends_after_max_steps_with_a_scored_epoch(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    record = run_recipe(make_recipe(train={"max_steps": 6, "learning_rate": 0.02}), tmp_path, quiet=True)
    assert validations(tmp_path) == [(4, 1.0), (6, 1.5)]
    assert record.metrics.validation["best_epoch"] in (1, 2)
    assert record.flops.train_total == 6 * (record.flops.train_step or 0)


@pytest.mark.slow
def test_max_steps_may_be_more_than_the_epochs(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    run_recipe(make_recipe(train={"max_steps": 10, "patience": 9}), tmp_path, quiet=True)
    assert [step for step, _ in validations(tmp_path)] == [4, 8, 10]


def test_an_epoch_of_balanced_sampling_has_each_class_alike_and_is_the_same_again() -> None:
    labels = np.array([0] * 900 + [2] * 100)
    sampler = BalancedSampler(labels, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) == 1000
    assert abs(np.mean(labels[first] == 2) - 0.5) < 0.05
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = BalancedSampler(labels, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert list(BalancedSampler(labels, seed=4)) != first


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0, 0, 0, 1])
    assert weights_of("balanced", labels, ["a", "b"]) == pytest.approx([4 / 6, 2])
    assert weights_of("balanced", labels, ["a", "b", "nowhere"])[:2] == pytest.approx([4 / 6, 2])
    given = weights_of([1, 5], labels, ["a", "b"])
    assert given[1] / given[0] == pytest.approx(5)
    assert given[labels].mean() == pytest.approx(1)


def test_the_weighted_loss_of_micro_batches_is_that_of_their_batch() -> None:
    logits, labels = torch.randn(8, 3, requires_grad=True), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    weights = weights_of("balanced", labels.numpy(), ["a", "b", "c"])
    loss = weighted_loss(weights)
    whole = cross_entropy(logits, labels, weight=torch.tensor(weights, dtype=torch.float32))
    parts = [loss({"logits": logits[i : i + 2]}, labels[i : i + 2], 8) for i in (0, 2, 4, 6)]
    expected, found = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (whole, sum(parts)))
    assert torch.allclose(expected, found, atol=1e-6)


@pytest.fixture(scope="module")
def lopsided(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven times as many red pictures as blue or green ones in train."""
    folder = tmp_path_factory.mktemp("lopsided") / "data"
    shutil.copytree(pictures, folder)
    for colour in ("blue", "green"):
        for picture in (folder / "train" / colour).iterdir():
            if picture.stem not in "012":
                picture.unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fvae-lora", "lora"])
@pytest.mark.parametrize("balance", [{"class_weights": "balanced"}, {"sampling": "balanced"}])
def test_rare_classes_are_predicted_more_often_where_training_is_balanced(
    make_recipe: Callable[..., Recipe], lopsided: Path, tmp_path: Path, method: str, balance: dict[str, Any]
) -> None:
    def rare(name: str, **train: Any) -> int:
        settings = {"epochs": 3, "batch_size": 4, "learning_rate": 0.01} | train
        folder = tmp_path / name
        data = {"validation_share": 0.2}
        run_recipe(make_recipe(dataset=str(lopsided), method=method, train=settings, data=data), folder, quiet=True)
        rows = csv.DictReader((folder / "predictions.csv").open())
        return sum(row["predicted"] != "red" for row in rows)

    assert rare("balanced", **balance) > rare("plain")


def test_gradients_are_accumulated_alike_with_class_weights(
    make_recipe: Callable[..., Recipe], lopsided: Path, tmp_path: Path
) -> None:
    train = {"class_weights": [1, 2, 3], "epochs": 1, "log_every": 1}
    curves = []
    for size, batches in ((4, 1), (2, 2)):
        settings = train | {"batch_size": size, "gradient_accumulation": batches}
        folder, adapter = tmp_path / str(size), {"dropout": 0.0}
        run_recipe(
            make_recipe(dataset=str(lopsided), train=settings, adapter=adapter, data={"validation_share": 0.2}), folder
        )
        curves.append([json.loads(line) for line in (folder / "metrics.jsonl").open()])
    one, two = ([(e["loss"], e["grad_norm"]) for e in curve if e["event"] == "train"] for curve in curves)
    assert one[:-1] == [pytest.approx(pair, rel=1e-4) for pair in two[:-1]]  # the last step has fewer rows


@pytest.mark.parametrize(
    ("train", "line"),
    [
        ({"class_weights": [1.0, 2.0]}, "train.class_weights: expected a number for each of the 3 classes, got 2"),
        ({"class_weights": [0.0, 0.0, 0.0]}, "train.class_weights: expected a number above 0"),
    ],
)
def test_class_weights_that_do_not_fit_the_data_are_one_line(
    make_recipe: Callable[..., Recipe], tmp_path: Path, train: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        run_recipe(make_recipe(train=train), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"train": {"class_weights": "balancd"}}, r"train\.class_weights: "),
        ({"train": {"class_weights": [1.0, -1.0]}}, r"train\.class_weights: .* a number from 0 up"),
        ({"train": {"max_steps": 0}}, r"train\.max_steps: "),
        ({"train": {"report_to": ["tensorbord"]}}, r"train\.report_to\.0: "),
        ({"task": "transcription", "train": {"sampling": "balanced"}}, r"train\.sampling: .*transcription has no cla"),
        (
            {"task": "text", "text": {"metrics": ["pearson"]}, "train": {"class_weights": "balanced"}},
            r"train\.class_weights: a regression on numbers has no classes$",
        ),
    ],
)
def test_bad_settings_of_training_name_their_key(
    make_recipe: Callable[..., Recipe], settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=f"^test: {key}"):
        make_recipe(**settings)


def test_the_scores_of_each_class_are_those_of_scikit_learn() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    found = by_class(predicted, labels, ["cat", "dog", "emu", "never"])
    assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found.confusion == {"cat": {"cat": 2, "dog": 1}, "dog": {"cat": 1, "dog": 1}, "emu": {"cat": 1}, "never": {}}
    cat, never = found.classes["cat"], found.classes["never"]
    assert (cat.precision, cat.recall, cat.f1, cat.support) == pytest.approx((2 / 4, 2 / 3, 4 / 7, 3))
    assert (never.precision, never.recall, never.f1, never.support) == (0, 0, 0, 0)


def test_a_run_leaves_what_it_predicted_and_how_well_each_class_was(cli: Cli, small: list[str], tmp_path: Path) -> None:
    code, _, error = cli("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "run", "--quiet")
    assert code == 0, error
    rows = list(csv.DictReader((tmp_path / "run" / "predictions.csv").open()))
    assert [row["row"] for row in rows] == [str(i) for i in range(1, 13)]
    labels, predicted = ([row[column] for row in rows] for column in ("label", "predicted"))
    record = record_of(tmp_path / "run")
    accuracy = np.mean(np.array(labels) == np.array(predicted))
    assert accuracy == pytest.approx(record["metrics"]["test"]["accuracy"])
    names = record["dataset"]["classes"]
    matrix = [[record["by_class"]["confusion"][a].get(b, 0) for b in names] for a in names]
    assert matrix == confusion_matrix(labels, predicted, labels=names).tolist()

    code, _, error = cli("report", tmp_path)
    assert code == 0, error
    page = (tmp_path / "report.html").read_text()
    assert "How well each class was predicted" in page
    assert f"Macro F1 {100 * record['by_class']['macro_f1']:.2f}%" in page


def test_a_finished_run_goes_on_for_more_epochs_from_its_kept_checkpoint(
    cli: Cli, small: list[str], tmp_path: Path
) -> None:
    options = [*small, "--method", "fvae-lora", "--out", tmp_path / "run", "--quiet"]
    options += ["train.schedule=constant", "train.keep_checkpoints=true"]
    assert cli("train", "image/default", *options)[0] == 0
    code, _, error = cli("train", "image/default", *options, "train.epochs=3")
    assert code == 0, error
    assert [epoch for _, epoch in validations(tmp_path / "run")] == [1, 2, 3]
    extended = record_of(tmp_path / "run")
    assert (extended["state"], extended["extended_from"], extended["recipe"]["train"]["epochs"]) == ("complete", [2], 3)
    assert evaluate(tmp_path / "run", quiet=True) == extended["metrics"]["test"]

    # with a learning rate that does not depend on the length, it is the run of so many epochs to the bit
    alone = [*options, "train.epochs=3", "--out", tmp_path / "alone"]
    assert cli("train", "image/default", *alone)[0] == 0
    curves = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "alone")]
    assert curves[0] == curves[1]
    assert "extended_from" not in record_of(tmp_path / "alone")


def test_a_finished_run_without_checkpoints_is_not_overwritten_for_more_epochs(
    cli: Cli, small: list[str], tmp_path: Path
) -> None:
    options = [*small, "--method", "linear-probe", "--out", tmp_path / "run", "--quiet"]
    assert cli("train", "image/default", *options)[0] == 0
    before = (tmp_path / "run" / "run.json").read_bytes()
    code, _, error = cli("train", "image/default", *options, "train.epochs=5")
    assert code == 2
    assert error == (
        f"fvae-lora: {tmp_path / 'run'}: holds a finished run of 2 epochs without its checkpoints, which "
        "train.keep_checkpoints=true keeps; another --out gets a run of 5; nothing was changed\n"
    )
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    code, _, error = cli("train", "image/default", *options, "train.epochs=1")
    assert (code, "train.epochs is 2 there and 1 here" in error) == (2, True)
    assert cli("train", "image/default", *options, "train.keep_checkpoints=true")[0] == 0, "no number depends on it"
