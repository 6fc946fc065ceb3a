"""Sentences and pairs of them: from tables to scores, and what is refused on the way."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn import metrics
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from arguments import later_wins
from finished_runs import assert_same_to_rounding, assert_saved
from fvae_lora import elbo_loss, elbo_terms
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.tasks import Metric, load_task
from fvae_lora_experiments.tasks.text import TextTask
from hub import ENCODER, GLUE, Hub, write_glue
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


@pytest.mark.parametrize("method", ["fvae-lora", "linear-probe"])
def test_a_run_on_cached_states_is_the_run_without_to_rounding(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "cache"))
    data = write_tables(tmp_path / "data")
    for cached in ("false", "true"):
        options = ["adapter.layers=[1]", f"train.cache_frozen={cached}", "train.log_every=2"]
        code, _, err = train(data, *options, "--method", method, "--out", tmp_path / cached)
        assert code == 0, err
    flops = [record["flops"]["train_step"] for record in map(record_in, (tmp_path / "false", tmp_path / "true"))]
    assert flops[1] < flops[0]
    assert_same_to_rounding(tmp_path / "false", tmp_path / "true")


SCORES = {
    "cola": ["matthews", "accuracy"],
    "mrpc": ["f1", "accuracy"],
    "qnli": ["accuracy"],
    "rte": ["accuracy"],
    "sst2": ["accuracy"],
    "stsb": ["pearson", "spearman"],
    "wnli": ["accuracy"],
}
"""What GLUE reports of each task; the first selects the epoch. Accuracy is there for all classes."""


@pytest.fixture(scope="session")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """GLUE and an encoder, to be served or read."""
    folder = tmp_path_factory.mktemp("hub")
    write_glue(folder)
    write_encoder(folder / "models" / ENCODER, "roberta")
    return Hub(folder)


def outputs_of(adapter: Path, base: Path, rows: Dataset, columns: tuple[str, ...], labels: int) -> np.ndarray:
    """The logits (rows, labels) of a saved adapter, row by row, so without any padding."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        logits = [model(**tokenizer(*(row[c] for c in columns), return_tensors="pt")).logits[0] for row in rows]
    return torch.stack(logits).numpy()


OFFICIAL = {
    "accuracy": metrics.accuracy_score,
    "f1": metrics.f1_score,
    "matthews": metrics.matthews_corrcoef,
    "pearson": lambda labels, numbers: stats.pearsonr(labels, numbers).statistic,
    "spearman": lambda labels, numbers: stats.spearmanr(labels, numbers).statistic,
}


@pytest.mark.parametrize("name", SCORES)
def test_a_recipe_of_glue_reports_the_official_scores_on_the_official_validation_split(
    cli: Cli, glue: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FVAE_LORA_DATA_ROOT", "")  # what the option sets is gone after the test
    model, data = glue.folder / "models" / ENCODER, ("--data-root", glue.folder / "datasets")
    small = [*SMALL, "train.epochs=4", "train.learning_rate=0.02", "text.max_length=40", "--method", "fvae-lora"]
    run = tmp_path / "run"
    code, out, err = cli("train", f"glue/{name}", *small, "--model", model, *data, "--quiet", "--out", run)
    assert code == 0, err
    record = record_in(run)
    assert record["metric"] == {"name": SCORES[name][0], "greater_is_better": True}
    assert record["dataset"]["splits"] == {"train": 36, "validation": 4, "test": 12}
    assert record["dataset"]["test_from"] == "the official validation split"
    assert record["dataset"]["validation_from"].startswith("0.1 of train")
    columns, classes = GLUE[name]
    assert record["dataset"]["classes"] == list(classes)
    assert "text · nyu-mll/glue" in out

    file = glue.folder / "datasets/nyu-mll/glue" / name / "validation-00000-of-00001.parquet"
    rows = Dataset.from_parquet(str(file))
    outputs = outputs_of(run / "adapter", model, rows, columns, len(classes) or 1)
    predicted = outputs.argmax(1) if classes else outputs[:, 0]
    assert len(set(predicted)) > 1
    test = record["metrics"]["test"]
    expected = {score: OFFICIAL[score](rows["label"], predicted) for score in SCORES[name]}
    assert test == pytest.approx(expected | {"loss": test["loss"]}, abs=1e-4)
    if not classes:
        assert test["loss"] == pytest.approx(float(np.mean((predicted - rows["label"][:]) ** 2)), rel=1e-3)
    code, again, err = cli("evaluate", run, "--model", model, *data)
    assert code == 0, err
    assert again.count(f"{test['loss']:.6f}") == 2
    assert cli("report", run)[0] == 0
    assert all(f"{score} %" in (run / "report.md").read_text() for score in SCORES[name])


def test_scores_on_the_validation_split_that_selected_are_called_so(
    train: Callable[..., tuple[int, str, str]], glue: Hub, tmp_path: Path
) -> None:
    folder = glue.folder / "datasets" / "nyu-mll" / "glue" / "sst2"
    code, out, err = train(folder, "data.protocol=reported-on-validation", "text.columns=[sentence]")
    assert code == 0, err
    record = record_in(tmp_path / "run")
    assert "text · sst2 · reported-on-validation · tiny-bert" in out
    assert record["dataset"]["splits"] == {"train": 40, "validation": 12, "test": 12}
    assert record["dataset"]["validation_from"] == record["dataset"]["test_from"] == "the official validation split"
    assert record["metrics"]["validation"]["accuracy"] == record["metrics"]["test"]["accuracy"]


RUN_ALL = """
import sys
from fvae_lora_experiments.cli import main
for name in {names}:
    sys.argv = ["fvae-lora", "train", f"glue/{{name}}", *{options}, "--quiet", "--out", f"{out}/{{name}}"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, name
"""


@pytest.mark.slow
def test_glue_by_its_names_on_the_hub(glue: Hub, tmp_path: Path) -> None:
    options = later_wins([*SMALL, "train.epochs=1", "--method", "lora"])
    program = RUN_ALL.format(names=list(SCORES), options=options, out=tmp_path / "runs")
    with glue.serving():
        environment = os.environ | glue.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = {path.rpartition("glue/resolve/")[2].partition("/")[2] for path in glue.asked if path.endswith("parquet")}
    assert {name.partition("/")[0] for name in fetched} == set(SCORES)
    for name, scores in SCORES.items():
        record = record_in(tmp_path / "runs" / name)
        assert (record["dataset"]["name"], record["model"]["name"]) == ("nyu-mll/glue", ENCODER)
        assert record["dataset"]["splits"] == {"train": 36, "validation": 4, "test": 12}
        assert set(scores) < set(record["metrics"]["test"])


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["classes", "numbers"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_learns_of_texts_is_saved(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, method: str, labels: str
) -> None:
    folder, metrics = write_tables(tmp_path / "data"), ["text.metrics=[accuracy,f1]"]
    if labels == "numbers":
        metrics = ["text.metrics=[pearson,spearman]"]
        for file in folder.iterdir():
            file.write_text(file.read_text().replace('"dull"', "0.5").replace('"fine"', "4.5"))
    short = ["train.epochs=1", "train.batch_size=20", "data.protocol=reference-on-test"]
    code, _, err = train(folder, *short, *metrics, "--method", method)
    assert code == 0, err
    assert_saved(Record.model_validate(record_in(tmp_path / "run")))


def texts_task(model: Path, dataset: Path, *overrides: str) -> TextTask:
    recipe = load_recipe(
        "text/default", later_wins([*SMALL, *overrides]), {"model": str(model), "dataset": str(dataset)}
    )
    task = load_task(recipe)
    assert isinstance(task, TextTask)
    return task


def test_the_scores_of_classes_are_those_of_their_definitions(bert: Path) -> None:
    predicted, labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    hits, false_alarms, misses, rest = 3, 1, 2, 4
    task = texts_task(bert, bert, "text.metrics=[f1,matthews,accuracy]")
    rows = SimpleNamespace(rows=Dataset.from_dict({"label": labels}))
    assert task.metric == Metric("f1")
    assert task.scores(predicted, labels, rows) == pytest.approx(
        {
            "f1": 2 * hits / (2 * hits + false_alarms + misses),
            "matthews": (hits * rest - false_alarms * misses) / math.sqrt(4 * 6 * 5 * 5),
            "accuracy": 0.7,
        }
    )
    assert task.scores(np.zeros(10, int), labels, rows) == {"f1": 0, "matthews": 0, "accuracy": 0.5}


def test_the_scores_of_a_regression_are_those_of_their_definitions(bert: Path) -> None:
    predicted, labels = np.array([0.1, 0.4, 0.2, 3.0, 9.0]), np.array([0.0, 1.0, 2.0, 3.0, 5.0])
    task = texts_task(bert, bert, "text.metrics=[spearman,pearson]")
    ranks = np.array([0, 2, 1, 3, 4])
    assert task.metric == Metric("spearman")
    assert task.scores(predicted, labels, None) == pytest.approx(
        {"pearson": np.corrcoef(predicted, labels)[0, 1], "spearman": np.corrcoef(ranks, np.arange(5))[0, 1]}
    )
    assert task.scores(np.full(5, 0.3), labels, None) == {"spearman": 0, "pearson": 0}


def test_a_batch_is_padded_to_its_own_longest_row(bert: Path, tmp_path: Path) -> None:
    task = texts_task(bert, write_tables(tmp_path / "data"))
    splits = task.split(task.open_source())
    rows = task.datasets(splits, *task.load_model(splits.classes))["train"]
    lengths = [len(item["input_ids"]) for item in rows]
    assert min(lengths) < max(lengths)
    for chosen in ([0, 1], [2, 3, 4], range(10)):
        batch = task.collate([rows[i] for i in chosen])
        assert batch["input_ids"].shape == (len(chosen), max(lengths[i] for i in chosen))
        assert batch["attention_mask"].sum(1).tolist() == [lengths[i] for i in chosen]
        assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_the_second_text_of_a_pair_is_told_from_the_first(bert: Path, glue: Hub) -> None:
    task = texts_task(bert, glue.folder / "datasets/nyu-mll/glue/qnli", "text.columns=[question,sentence]")
    splits = task.split(task.open_source())
    item = task.datasets(splits, *task.load_model(splits.classes))["test"][0]
    first, second = (splits.test[0][column].split() for column in ("text", "text_pair"))
    assert item["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)


@pytest.mark.usefixtures("without_noise")
@pytest.mark.parametrize("method", ["fvae-lora", "fvae-lora-reference", "vae2lat"])
def test_neither_the_elbo_nor_its_gradients_depend_on_how_much_padding_a_batch_has(
    bert: Path, tmp_path: Path, method: str
) -> None:
    more = ["adapter.dropout=0", "fvae.encoder_dropout=0", "fvae.decoder_dropout=0", f"method={method}"]
    task = texts_task(bert, write_tables(tmp_path / "data"), *more)
    splits = task.split(task.open_source())
    base, tokenizer = task.load_model(splits.classes)
    rows = task.datasets(splits, base, tokenizer)["train"]
    adapted = METHODS[method].apply(base, task.recipe)
    for name, parameter in adapted.named_parameters():  # at the start the encoders' heads are zero
        if "fvae_lora_" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    adapted.train()
    config = adapted.base_model.model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    items = [rows[i] for i in range(6)]
    batch = task.collate(items)
    padded = tokenizer.pad(items, padding="max_length", max_length=30)
    wide = {key: torch.tensor(value) for key, value in padded.items()}
    assert wide["input_ids"].shape[1] == 30 > batch["input_ids"].shape[1]

    def measured(inputs: dict[str, torch.Tensor]) -> tuple[float, dict[str, dict[str, float]], list[torch.Tensor]]:
        adapted.zero_grad()
        adapted(**{key: value for key, value in inputs.items() if key != "labels"})
        loss = elbo_loss(adapted)
        loss.backward()
        return loss.item(), elbo_terms(adapted), [p.grad.clone() for p in adapted.parameters() if p.grad is not None]

    (narrow_loss, narrow_terms, narrow_grads), (wide_loss, wide_terms, wide_grads) = measured(batch), measured(wide)
    assert narrow_loss != 0
    assert wide_loss == pytest.approx(narrow_loss, rel=1e-5)
    for layer, terms in narrow_terms.items():
        assert wide_terms[layer] == pytest.approx(terms, rel=1e-5)
    assert len(narrow_grads) == len(wide_grads) > 10
    for one, other in zip(narrow_grads, wide_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_how_many_rows_are_cut_is_said_and_recorded(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tables(tmp_path / "data")
    assert train(folder, "train.epochs=1")[0] == 0
    assert "cut" not in caplog.text
    long = sum(len(json.loads(line)["text"].split()) + 2 > 9 for line in (folder / "test.jsonl").open())
    assert train(folder, "train.epochs=1", "text.max_length=9", "--out", tmp_path / "cut")[0] == 0
    assert 0 < long < 20
    assert f"split test: {long} of 20 rows are cut at 9 tokens" in caplog.text
    assert record_in(tmp_path / "run")["dataset"]["truncated"] == {"train": 0, "validation": 0, "test": 0}
    assert record_in(tmp_path / "cut")["dataset"]["truncated"]["test"] == long


def test_groups_of_texts_run_from_recipe_to_report(
    train: Callable[..., tuple[int, str, str]], cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for seed, (split, per_class) in enumerate({"train": 20, "validation": 4, "test": 10}.items()):
        rows = rows_of(per_class, seed) | {"domain": ["film", "book", "film", "film"] * (per_class // 2)}
        Dataset.from_dict(rows).to_csv(tmp_path / "data" / f"{split}.csv")
    grouped = ["data.group_column=domain", "data.select_by=worst_group_accuracy", "train.epochs=1"]
    code, _, err = train(tmp_path / "data", *grouped, "text.metrics=[f1]")
    assert code == 0, err
    record = record_in(tmp_path / "run")
    assert record["metric"]["name"] == "worst_group_accuracy"
    assert record["dataset"]["groups"]["test"] == {"book": 5, "film": 15}
    scores = record["metrics"]["test"]
    names = ["worst_group_accuracy", "accuracy", "gap", "accuracy_group_book", "accuracy_group_film"]
    assert scores.keys() == {"loss", "f1", *names}
    book, film = (scores[f"accuracy_group_{name}"] for name in ("book", "film"))
    assert scores["worst_group_accuracy"] == min(book, film)
    assert scores["accuracy"] == pytest.approx((5 * book + 15 * film) / 20)
    assert scores["gap"] == pytest.approx(scores["accuracy"] - min(book, film))
    assert cli("report", tmp_path)[0] == 0
    table = (tmp_path / "report.md").read_text()
    for name in names:
        assert f"| {name.replace('_', ' ')} % |" in table


def test_classes_can_be_declared(bert: Path, tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "data")
    opened = texts_task(bert, folder, "data.classes=[fine,dull]").open_source()
    assert opened["train"].features["label"].names == ["fine", "dull"]
    assert opened["train"]["label"][:] == [1] * 20 + [0] * 20


def change_line(file: str, number: int, change: Callable[[dict], dict | str]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        lines = (folder / file).read_text().splitlines()
        changed = change(json.loads(lines[number - 1]))
        lines[number - 1] = changed if isinstance(changed, str) else json.dumps(changed)
        (folder / file).write_text("\n".join(lines) + "\n")

    return spoil


def with_groups(train: Sequence[str | None], test: Sequence[str | None]) -> Callable[[Path], None]:
    """Gives the rows of each split these groups, by turns."""

    def spoil(folder: Path) -> None:
        for split, groups in (("train", train), ("test", test)):
            lines = zip((folder / f"{split}.jsonl").read_text().splitlines(), cycle(groups), strict=False)
            grouped = [json.dumps(json.loads(line) | {"group": group}) for line, group in lines]
            (folder / f"{split}.jsonl").write_text("\n".join(grouped))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "options", "says"),
    [
        (
            change_line("test.jsonl", 4, lambda row: row | {"text": ""}),
            [],
            "{}/test.jsonl, row 4: text is ''",
        ),
        (change_line("train.jsonl", 7, lambda row: row | {"text": " "}), [], "{}/train.jsonl, row 7: text is ' '"),
        (
            change_line("train.jsonl", 7, lambda row: row | {"text": 3}),
            [],
            "{}/train.jsonl, row 7: text is 3",
        ),
        (change_line("train.jsonl", 7, lambda row: {"label": "dull"}), [], "{}/train.jsonl, row 7: text is None"),
        (change_line("train.jsonl", 40, lambda row: json.dumps(row)[:9]), [], "{}/train.jsonl, line 40: not JSON: "),
        (change_line("test.jsonl", 1, lambda row: "{"), [], "{}/test.jsonl, line 1: not JSON: "),
        (
            change_line("test.jsonl", 2, lambda row: "[1]"),
            [],
            "{}/test.jsonl, line 2: expected keys and values, got",
        ),
        (
            lambda folder: (folder / "test.jsonl").write_bytes(b'\n{"text": "\xff", "label": "fine"}\n'),
            [],
            "{}/test.jsonl, line 2: not JSON: 'utf-8' codec can't decode byte 0xff",
        ),
        (
            change_line("test.jsonl", 3, lambda row: row | {"label": ["fine"]}),
            [],
            "{}/test.jsonl, row 3: label is ['fine']; expected a name or a number",
        ),
        (
            with_groups("xyz", "xy"),
            ["data.group_column=group", "data.validation_share=0.3"],
            "no row of group z in split test",
        ),
        (with_groups("xy", "xyz"), ["data.group_column=group"], "no row of group z in split train"),
        (with_groups("xy", ["x", None]), ["data.group_column=group"], "{}/test.jsonl, row 2: no group"),
        (
            change_line("test.jsonl", 20, lambda row: row | {"label": "fin"}),
            [],
            "{}/test.jsonl, row 20: label 'fin' is not one of dull, fine",
        ),
        (
            change_line("train.jsonl", 2, lambda row: row | {"label": "dul"}),
            ["data.classes=[dull,fine]"],
            "{}/train.jsonl, row 2: label 'dul' is not one of dull, fine",
        ),
        (change_line("train.jsonl", 2, lambda row: row | {"label": None}), [], "{}/train.jsonl, row 2: no label"),
        (
            lambda _: None,
            ["text.columns=[body]"],
            "dataset {}: no text column in split test; set text.columns to",
        ),
        (
            lambda _: None,
            ["text.columns=[text,other]"],
            "no text_pair column in split test; set text.columns to",
        ),
        (lambda _: None, ["data.label_column=score"], "no label column in split test; set data.label_column to one of"),
        (lambda _: None, ["text.metrics=[pearson]"], "{}/test.jsonl, row 1: label 'dull' is not a number"),
        (lambda _: None, ["text.metrics=[pearson,f1]"], "numbers have pearson and spearman: not both"),
        (
            lambda folder: [
                file.write_text(file.read_text().replace('"dull"', '0,"score":1').replace('"fine"', '1,"score":2'))
                for file in folder.iterdir()
            ],
            ["text.metrics=[pearson]", "data.group_column=score"],
            "data.group_column: groups are scored by accuracy, which a regression does not have",
        ),
        (
            lambda _: None,
            ["data.group_column=label"],
            "dataset {}: data.group_column: label is already the label column",
        ),
        (lambda _: None, ["text.metrics=[rouge]"], "text.metrics.0: input should be 'accuracy'"),
        (lambda _: None, ["text.max_length=41"], "text.max_length: model {model} reads 40 tokens at most, got 41"),
        (
            change_line("train.jsonl", 2, lambda row: row | {"label": "other"}),
            ["text.metrics=[f1]"],
            "text.metrics: f1 is for two classes; dataset {} has 3",
        ),
        (lambda folder: (folder / "train.jsonl").unlink(), [], "dataset {}: no train split; it has test"),
        (lambda folder: (folder / "train.jsonl").write_text(""), [], "{}/train.jsonl: the file is empty"),
        (
            lambda folder: [file.unlink() for file in folder.iterdir()],
            [],
            "dataset {}: no train split; it has nothing",
        ),
    ],
)
def test_bad_texts_are_named_by_file_and_row_before_any_training(
    train: Callable[..., tuple[int, str, str]],
    bert: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    options: list[str],
    says: str,
) -> None:
    folder = write_tables(tmp_path / "data")
    spoil(folder)
    code, _, err = train(folder, *options)
    assert code == 2, err
    assert err.startswith("fvae-lora: ")
    assert err.count("\n") == 1, err
    assert says.format(folder, model=bert) in err
    assert not (tmp_path / "run").exists()


def test_a_cell_too_many_is_named_once(
    train: Callable[..., tuple[int, str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tables(tmp_path / "data", "csv")
    with (folder / "test.csv").open("a") as file:
        file.write("a film,dull,3\n")
    reader = logging.getLogger("datasets")
    reader.addHandler(caplog.handler)
    code, _, err = train(folder)
    reader.removeHandler(caplog.handler)
    assert (code, err.count("\n")) == (2, 1)
    assert "test.csv: cannot be read as csv: " in err
    assert "in line 22" in err
    assert not caplog.text


def test_a_label_beyond_the_declared_classes_of_a_parquet_file(bert: Path, tmp_path: Path) -> None:
    """In the second file of its split."""
    (tmp_path / "data").mkdir()
    declared = Features({"text": Value("string"), "label": ClassLabel(names=["dull", "fine"])}).arrow_schema
    for number, labels in enumerate(([0, 1, 0], [1, 0, 2, 1])):
        table = pa.table({"text": ["a film"] * len(labels), "label": pa.array(labels)}).cast(declared)
        pq.write_table(table, tmp_path / "data" / f"train-{number}.parquet")
    with pytest.raises(UserError, match=r"train-1\.parquet, row 3: label 2 is not one of dull, fine$"):
        texts_task(bert, tmp_path / "data").open_source()


def test_a_cell_of_a_csv_file_that_reads_like_nothing_is_a_text(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\nNA,a\nnull,b\nNone,a\n")
    opened = texts_task(bert, tmp_path).open_source()
    assert opened["train"]["text"][:] == ["NA", "null", "None"]


def test_a_model_that_lacks_more_than_its_head_is_refused(
    train: Callable[..., tuple[int, str, str]], bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    code, _, err = train(write_tables(tmp_path / "data"), "--model", tmp_path / "bert")
    assert code == 2, err
    assert "lacks bert.pooler.dense.bias, bert.pooler.dense.weight, and only the head may be new" in err
