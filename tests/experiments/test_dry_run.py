"""`--dry-run`: what would run and what it would take, without a trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ViTConfig

from chatter import make_llama, make_tokenizer, write_questions
from fvae_lora_experiments.forecast import forecast
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.run.flops import kept_bytes, training_flops
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task
from sentences import sentences, write_encoder
from spoken_words import WORDS, said, whisper, write_recordings
from timit_corpus import hum, wav2vec2, write_corpus

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("method", "train"),
    [
        ("fvae-lora", {}),
        ("lora", {"max_steps": 6}),
        ("dora", {"batch_size": 4, "gradient_accumulation": 2}),
        ("pissa", {}),
        ("linear-probe", {}),
        ("full", {}),
    ],
)
def test_a_forecast_is_what_the_record_will_say(
    make_recipe: Callable[..., Recipe], tmp_path: Path, method: str, train: dict[str, Any]
) -> None:
    recipe = make_recipe(method=method, train=train)
    found = forecast(recipe)
    with sdpa_kernel(SDPBackend.MATH):  # a processor's own kernel is not counted in the record
        record = run_recipe(recipe, tmp_path, quiet=True)
    assert found.trainable == record.parameters.trainable
    assert found.flops == record.flops.train_total


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_forecast(make_recipe: Callable[..., Recipe], method: str) -> None:
    found = forecast(make_recipe(method=method))
    assert (found.steps, found.trainable > 0, (found.flops or 0) > 0) == (8, True, True)


@pytest.mark.parametrize("method", ["fvae-lora", "full"])
def test_texts_have_a_forecast(make_recipe: Callable[..., Recipe], tmp_path: Path, method: str) -> None:
    base = write_encoder(tmp_path / "bert", "bert")
    rows = [{"text": sentence, "label": n} for n in (0, 1) for sentence in sentences(n, 10, 0)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = {"model": str(base), "dataset": str(tmp_path / "train.jsonl")}
    recipe = make_recipe(task="text", method=method, text={"max_length": 8}, **names)
    found, record = forecast(recipe), run_recipe(recipe, tmp_path / "run", quiet=True)
    assert found.trainable == record.parameters.trainable
    assert found.flops == pytest.approx(record.flops.train_total, rel=0.3)  # which counts less of attention


@pytest.mark.parametrize("method", ["fvae-lora", "full"])
def test_memory_is_that_of_the_state_and_of_what_a_batch_keeps(make_recipe: Callable[..., Recipe], method: str) -> None:
    recipe = make_recipe(method=method, image={"size": 12}, adapter={"dropout": 0})  # whose mask differs by device
    task = load_task(recipe)
    splits = task.split(task.open_source())
    model, processor = task.load_model(splits.classes)
    rows = task.datasets(splits, model, processor)["train"]
    adapted = METHODS[method].apply(model, recipe)
    with sdpa_kernel(SDPBackend.MATH), kept_bytes(adapted) as kept:
        training_flops(adapted, task.collate([rows[i] for i in range(8)]))
    found = forecast(recipe)
    assert found.activations == kept() > 0
    total, trained = (
        sum(p.numel() for p in adapted.parameters() if p.requires_grad or every) for every in (True, False)
    )
    assert found.state == 4 * total + 12 * trained
    assert forecast(make_recipe(method=method, train={"batch_size": 4})).state == found.state


def test_the_weights_need_not_be_there(make_recipe: Callable[..., Recipe], vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    ViTConfig.from_pretrained(vit, hidden_size=768, intermediate_size=3072).save_pretrained(tmp_path / "vit")
    assert (forecast(make_recipe(model=str(tmp_path / "vit"))).flops or 0) > 10**9


def test_a_dry_run_of_train_writes_nothing(cli: Cli, small: list[str], tmp_path: Path) -> None:
    options = [*small, "--method", "lora", "--out", tmp_path / "run"]
    code, out, error = cli("train", "image/default", *options, "--dry-run")
    assert code == 0, error
    assert "Runs to do: 1; done already: 0" in out
    line = next(line.split() for line in out.splitlines() if line.startswith("lora"))
    assert line[2:5] == ["1", "8", "563"]  # runs, steps, trainable
    assert "--timed or --flops-per-second gives the hours" in out
    assert not (tmp_path / "run").exists()


@pytest.fixture
def of_task(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """A recipe of the task, a tiny model and a few rows."""
    model, data = tmp_path / "model", tmp_path / "data"
    if request.param == "phonemes":
        return "speech/timit", wav2vec2(model), write_corpus(data, hum)
    if request.param == "transcription":
        rows = {"train": said(*WORDS[:6]), "test": said(*WORDS[6:])}
        return "speech/whisper", whisper(model), write_recordings(data, rows)
    make_llama(model)
    make_tokenizer(model)
    write_questions(data)
    return "commonsense/default", model, data


@pytest.mark.parametrize("of_task", ["commonsense", "phonemes", "transcription"], indirect=True)
def test_every_task_has_a_dry_run(cli: Cli, of_task: tuple[str, Path, Path], tmp_path: Path) -> None:
    recipe, model, data = of_task
    more = ["speech.max_new_tokens=20"] if recipe == "speech/whisper" else []
    names = ("--model", model, "--dataset", data, "train.epochs=2", "train.batch_size=4", "adapter.r=4", *more)
    code, out, error = cli("train", recipe, *names, "--out", tmp_path / "run", "--dry-run")
    assert (code, error) == (0, "")
    cells = next(line.split() for line in out.splitlines() if line.startswith("fvae-lora"))
    assert int(cells[3]) > 0
    assert cells[-1][-1] in "kMG", "also where the loss looks at labels, which are not there"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_for_slurm_needs_none(
    cli: Cli, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    compare = ("compare", "image/default", *small, "--methods", "lora", "--out", tmp_path / "runs", "--dry-run")
    assert cli(*compare, "--launcher", "slurm", "--partition", "gpu")[0] == 0
    code, _, error = cli(*compare, "--partition", "gpu")
    assert (code, error) == (2, "fvae-lora: --partition: only with --launcher slurm\n")
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_compare_counts_what_is_left_and_gives_hours(cli: Cli, small: list[str], tmp_path: Path) -> None:
    options = [*small, "--methods", "lora,linear-probe", "--seeds", "1-3", "--out", tmp_path]
    assert (
        cli("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "lora-seed1", "--quiet")[0] == 0
    )
    before = sorted(tmp_path.rglob("*"))
    grid = ["--grid", "train.learning_rate=1e-3,1e-2"]
    code, out, error = cli("compare", "image/default", *options, *grid, "--dry-run", "--flops-per-second", "1e6")
    assert code == 0, error
    assert "Runs to do: 9; done already: 1" in out
    rows = {
        line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("lora", "linear-probe", "all"))
    }
    assert (rows["lora"][2], rows["linear-probe"][2], rows["all"][1]) == ("4", "5", "9")
    assert float(rows["all"][-1]) == pytest.approx(float(rows["lora"][-1]) + float(rows["linear-probe"][-1]), rel=0.02)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_few_steps_are_timed_for_the_hours(cli: Cli, small: list[str], tmp_path: Path) -> None:
    train = ("train", "image/default", *small, "--method", "lora", "--out", tmp_path / "run", "--dry-run")
    code, out, error = cli(*train, "--timed")
    assert (code, error) == (0, "")
    (cells,) = (line.split() for line in out.splitlines() if line.startswith("lora"))
    assert 0 < float(cells[-1]) < 1
    assert list(tmp_path.iterdir()) == []
    more = ("--flops-per-second", "1e12")
    assert cli(*train, "--timed", *more)[2] == "fvae-lora: --timed and --flops-per-second: give one of them\n"
    assert cli(*train[:-1], "--timed")[2] == "fvae-lora: --timed: only with --dry-run\n"


@pytest.mark.parametrize("options", [["--flops-per-second", "1e13"], ["--dry-run", "--flops-per-second", "0"]])
def test_a_throughput_without_a_dry_run_or_of_nothing_is_one_line(
    cli: Cli, small: list[str], options: list[str]
) -> None:
    code, _, error = cli("train", "image/default", *small, *options)
    assert (code, "expected a number above 0, and --dry-run" in error) == (2, True)


def test_a_dry_run_refuses_what_training_would(cli: Cli, small: list[str], tmp_path: Path) -> None:
    code, _, error = cli("train", "image/default", *small, "--dataset", tmp_path / "nowhere", "--dry-run")
    assert (code, "no such file or folder" in error) == (2, True)
