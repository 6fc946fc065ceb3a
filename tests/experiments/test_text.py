"""Sentences and pairs of them: from tables to scores, and what is refused on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from sentences import sentences, write_encoder

Cli = Callable[..., tuple[int, str, str]]

SMALL = ("train.epochs=3", "train.batch_size=8", "train.learning_rate=0.05", "adapter.r=4", "text.max_length=20")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


def rows_of(per_class: int, seed: int) -> dict[str, list[str]]:
    texts = [sentences(label, per_class, seed) for label in (0, 1)]
    return {"text": [*texts[0], *texts[1]], "label": ["dull"] * per_class + ["fine"] * per_class}


def write_tables(folder: Path, suffix: str = "jsonl") -> Path:
    """Forty rows to train on and twenty to test on; parquet declares the classes, the other two have their names."""
    folder.mkdir()
    for seed, (split, per_class) in enumerate({"train": 20, "test": 10}.items()):
        rows, file = Dataset.from_dict(rows_of(per_class, seed)), str(folder / f"{split}.{suffix}")
        if suffix == "parquet":
            declared = Features({"text": Value("string"), "label": ClassLabel(names=["dull", "fine"])})
            rows.cast(declared).to_parquet(file)
        elif suffix == "csv":
            rows.to_csv(file)
        else:
            rows.to_json(file)
    return folder


@pytest.fixture
def train(cli: Cli, bert: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def run(dataset: Path, *more: str | Path) -> tuple[int, str, str]:
        options = ["--dataset", dataset, "--method", "lora", "--out", tmp_path / "run", "--quiet", *more]
        return cli("train", "text/default", *SMALL, "--model", bert, *options)

    return run


def record_in(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_a_folder_of_tables_runs_from_recipe_to_report(
    train: Callable[..., tuple[int, str, str]], cli: Cli, tmp_path: Path, suffix: str
) -> None:
    code, out, err = train(write_tables(tmp_path / "data", suffix))
    assert code == 0, err
    record = record_in(tmp_path / "run")
    assert record["metrics"]["test"]["accuracy"] > 0.9, "the label is a word of each sentence"
    assert record["dataset"]["classes"] == ["dull", "fine"]
    assert record["dataset"]["splits"] == {"train": 36, "validation": 4, "test": 20}
    assert "text · data · clean · tiny-bert" in out
    assert cli("report", tmp_path / "run")[0] == 0
    code, out, err = cli("evaluate", tmp_path / "run")
    assert code == 0, err
    assert out.count(f"{record['metrics']['test']['loss']:.6f}") == 2, "the adapter scores as the run did"
