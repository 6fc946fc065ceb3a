"""Questions with options: what is read, what is trained on, what is scored, and a run from recipe to report."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BloomForCausalLM, MambaForCausalLM, PreTrainedModel

from arguments import later_wins
from chatter import CHAT, REAL, make_llama, make_tokenizer, rows_of, write_questions
from finished_runs import assert_same_to_rounding, assert_saved
from fvae_lora import FVAELoraConfig, elbo_terms
from fvae_lora_experiments.data.questions import open_questions, question
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task
from fvae_lora_experiments.tasks.commonsense.answers import log_likelihoods, parse, write_answers
from fvae_lora_experiments.tasks.commonsense.prompts import prompt
from hub import Hub
from tiny import randomised

Cli = Callable[..., tuple[int, str, str]]
SETS = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-e", "arc-c", "obqa"]
SCORES = {"choice_accuracy", "generated_accuracy", "unparsable"}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_llama(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "questions"
    write_questions(folder)
    return folder


@pytest.fixture
def make(llama: Path, questions: Path) -> Callable[..., Recipe]:
    """The default recipe, for one epoch; overrides as on the command line."""

    def make(*overrides: str, **places: Any) -> Recipe:
        usual = ["train.epochs=1", "train.batch_size=8", "adapter.r=4"]
        options = {"model": str(llama), "dataset": str(questions)} | places
        return load_recipe("commonsense/default", later_wins([*usual, *overrides]), options)

    return make


def opened(recipe: Recipe) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The task, its model and tokenizer, and the splits as tokens."""
    task = load_task(recipe)
    model, tokenizer = task.load_model([])
    rows = task.datasets(task.split(task.open_source()), model, tokenizer)
    return task, model.eval(), tokenizer, rows


def adapted(model: Any) -> PeftModel:
    """With an FVAE-LoRA adapter that changes what the model says."""
    return randomised(get_peft_model(model, FVAELoraConfig(r=4, target_modules=["q_proj", "k_proj"]))).eval()


# What is read.


def test_the_real_rows_of_every_set_are_read_under_the_fields_names() -> None:
    splits = open_questions(str(REAL), None, SETS)
    assert list(dict.fromkeys(splits["test"]["set"])) == SETS
    assert Counter(splits["test"]["set"])["piqa"] == 40
    assert len(splits["train"]) == 120  # ARC-Challenge, ARC-Easy and OpenBookQA
    assert set(map(len, splits["test"]["options"])) == {2, 3, 4, 5}
    for row in splits["test"]:
        assert parse(row["answers"][row["answer"]], row["options"]) == row["answer"]


def test_a_file_alone_is_the_training_data_and_the_test_split_comes_from_it(tmp_path: Path, questions: Path) -> None:
    splits = open_questions(str(questions / "commonsense_170k.json"), None, None)
    assert splits.keys() == {"train"}
    assert len(splits["train"]) == 32


def test_a_plain_multiple_choice_set_is_asked_in_the_words_of_the_field() -> None:
    asked = rows_of("ARC-Easy.train.jsonl.gz")[20]
    head, choices, _ = asked["instruction"].split("\n\n")
    plain = {
        "question": head.removeprefix("Please choose the correct answer to the question: "),
        "choices": [part.split(" ", 1)[1].strip() for part in choices.replace(" Answer", "\nAnswer").split("\n")],
        "answer": int(asked["answer"][-1]) - 1,
    }
    assert question(plain, "here") == question(asked, "here")


def test_a_folder_of_parquet_files_runs(make: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} plus 1?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(8)]
    for split in ("train", "validation", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    recipe = make("commonsense.max_new_tokens=4", dataset=str(tmp_path), method="lora")
    record = run_recipe(recipe, tmp_path / "run", quiet=True)
    assert record.dataset.splits == {"train": 8, "validation": 8, "test": 8}
    assert record.metrics.test.keys() == {"loss", *SCORES}


def test_a_local_copy_takes_the_place_of_a_name_on_the_hub(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "owner" / "questions")
    monkeypatch.setenv("FVAE_LORA_DATA_ROOT", str(tmp_path))
    splits = load_task(make(dataset="owner/questions")).open_source()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 32, "test": 17}


@pytest.mark.slow
def test_model_and_questions_by_their_names_on_the_hub(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "hub" / "models" / "owner" / "tiny-llama")
    data = tmp_path / "hub" / "datasets" / "owner" / "questions"
    data.mkdir(parents=True)
    files = "".join(f"    - split: {split}\n      path: {split}.json\n" for split in ("train", "boolq", "notes"))
    (data / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    for split, rows in (("train", rows_of("openbookqa.train.jsonl.gz")[:16]), ("boolq", rows_of("boolq/test.json"))):
        (data / f"{split}.json").write_text(json.dumps(rows))
    (data / "notes.json").write_text(json.dumps([GOOD]))
    with Hub(tmp_path / "hub").serving() as hub:
        options = ["train.epochs=1", "commonsense.max_new_tokens=2", "--method", "lora", "--out", tmp_path / "run"]
        places = ["--model", "owner/tiny-llama", "--dataset", "owner/questions", "--quiet"]
        program = "import sys; from fvae_lora_experiments.cli import main; sys.argv[0] = 'fvae-lora'; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, "train", "commonsense/default", *map(str, options), *places],
            env=os.environ | hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["dataset"]["splits"] == {"train": 14, "validation": 2, "test": 6}


# What is trained on.


def test_the_loss_is_that_of_the_answer_alone(make: Callable[..., Recipe]) -> None:
    task, model, tokenizer, rows = opened(make())
    items = [rows["train"][i] for i in range(4)]
    batch = task.collate(items)
    for item, row in zip(items, rows["train"].rows, strict=False):
        trained = [token for token in item["labels"] if token != -100]
        assert tokenizer.decode(trained) == row["answers"][row["answer"]] + "</s>"
        assert tokenizer.decode(item["input_ids"]) == "<s>" + prompt(
            row["instruction"], "", "alpaca", tokenizer
        ) + tokenizer.decode(trained)
        assert item["labels"][-len(trained) :] == trained
    answer_alone = batch["labels"][:, 1:] != -100
    by_hand = []
    for item in items:  # one by one, without padding
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor(item["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1]
        by_hand.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
    out = model(**batch)
    assert out.loss.item() == pytest.approx(torch.cat(by_hand).mean().item(), rel=1e-5)

    # Logits are made for the longest answer and the token before it; their gradient is zero where nothing is predicted.
    assert out.logits.shape[1] == max(map(len, by_hand)) + 1
    (gradient,) = torch.autograd.grad(out.loss, out.logits)
    assert (gradient[:, :-1].abs().sum(-1) > 0).equal(answer_alone)
    assert not gradient[:, -1].any()


@pytest.mark.usefixtures("without_noise")
def test_padding_changes_no_elbo(make: Callable[..., Recipe]) -> None:
    task, model, _, rows = opened(make())
    model = adapted(model).train()
    items = sorted((rows["train"][i] for i in range(8)), key=lambda item: len(item["input_ids"]))

    def terms(batch: list[Any]) -> dict[str, dict[str, float]]:
        model(**task.collate(batch))
        return elbo_terms(model)

    short, long = items[0], items[-1]
    n, m = len(short["input_ids"]), len(long["input_ids"])
    assert n < m
    alone, other, both = terms([short]), terms([long]), terms([short, long])
    for layer, found in both.items():
        for term, value in found.items():
            expected = (n * alone[layer][term] + m * other[layer][term]) / (n + m)
            assert value == pytest.approx(expected, rel=1e-4), (layer, term)


def test_an_instruct_model_is_asked_in_its_own_chat_template(make: Callable[..., Recipe], tmp_path: Path) -> None:
    make_llama(tmp_path)
    make_tokenizer(tmp_path).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    _, _, tokenizer, rows = opened(make("commonsense.template=chat", model=str(tmp_path)))
    row = rows["test"].rows[0]
    assert tokenizer.decode(row["prompt_ids"]) == f"<user>{row['instruction']}<bot>"


# What is scored.


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("the correct answer is answer3", "answer1/answer2/answer3", 2),
        ("answer2\n\n### Instruction: answer1", "answer1/answer2", 1),
        ("solution1.", "solution1/solution2", 0),
        ("It is false, not true", "true/false", 1),
        ("ending4", "ending1/ending2/ending3/ending4", 3),
        ("answer4 or answer1", "answer1/answer2/answer3", None),  # names what there is not
        ("answer12", "answer1/answer2", None),
        ("Answer1: dry palms", "answer1/answer2", None),
        ("the second one", "answer1/answer2", None),
        ("", "answer1/answer2", None),
    ],
)
def test_a_written_answer_is_parsed_as_the_field_does(text: str, options: str, found: int | None) -> None:
    assert parse(text, options.split("/")) == found


def test_likelihoods_are_the_same_in_a_batch_alone_and_without_a_cache(make: Callable[..., Recipe]) -> None:
    _, model, _, rows = opened(make())
    model = adapted(model)
    some = rows["test"].rows.select([0, 6, 12, 16])  # four and two options, prompts of different lengths
    prompts, answers = some["prompt_ids"][:], some["answer_ids"][:]
    assert len(set(map(len, prompts))) > 1
    together = log_likelihoods(model, prompts, answers)
    for i, (asked, options) in enumerate(zip(prompts, answers, strict=True)):
        alone = log_likelihoods(model, [asked], [options])[0]
        assert torch.allclose(together[i, : len(options)], alone, atol=1e-4)
        assert together[i, len(options) :].isneginf().all()
        for option, value in zip(options, alone, strict=True):
            ids = torch.tensor([asked + option])
            with torch.no_grad():
                tokens = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            assert tokens[len(asked) - 1 :].sum().item() == pytest.approx(value.item(), abs=1e-3)


def test_answers_are_the_same_in_a_batch_alone_and_without_a_cache(make: Callable[..., Recipe]) -> None:
    _, model, tokenizer, rows = opened(make("commonsense.max_new_tokens=12"))
    model = adapted(model)
    prompts = rows["test"].rows["prompt_ids"][:][::3]
    assert len(set(map(len, prompts))) > 1
    together = write_answers(model, tokenizer, prompts)
    assert together == [write_answers(model, tokenizer, [asked])[0] for asked in prompts]
    assert len(set(together)) > 1
    with model.disable_adapter():
        assert together != write_answers(model, tokenizer, prompts)
    for asked, text in zip(prompts, together, strict=True):
        ids = torch.tensor([asked])
        for _ in range(12):
            best = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], 1)
            if best.item() == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids[0, len(asked) :], skip_special_tokens=True) == text


def test_scores_need_the_first_encoder_alone_and_are_not_random(make: Callable[..., Recipe]) -> None:
    task, model, _, rows = opened(make("commonsense.max_new_tokens=8"))
    model = adapted(model)
    before = task.generated_scores(model, rows["test"], rows["test"], progress=False)
    texts = write_answers(model, rows["test"].tokenizer, rows["test"].rows["prompt_ids"][:4])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("encoder2", "decoder", "logvar", "log_tau")):
                parameter.fill_(torch.nan)
    assert task.generated_scores(model, rows["test"], rows["test"], progress=False) == before
    assert write_answers(model, rows["test"].tokenizer, rows["test"].rows["prompt_ids"][:4]) == texts


def test_how_far_scoring_is_can_be_seen_on_a_terminal(
    make: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, model, _, rows = opened(make("commonsense.max_new_tokens=2"))
    for progress, terminal in ((False, True), (True, False), (True, True)):
        capsys.readouterr()
        monkeypatch.setattr(sys.stderr, "isatty", lambda there=terminal: there)
        task.generated_scores(model, rows["test"], rows["test"], progress)
        shown = capsys.readouterr().err
        assert ("likelihood of options:   0%" in shown) == (progress and terminal)
        assert ("writing answers:   0%" in shown) == (progress and terminal)


# A run.


def test_a_run_from_recipe_to_report(make: Callable[..., Recipe], cli: Cli, tmp_path: Path) -> None:
    record = run_recipe(
        make("train.epochs=2", "commonsense.max_new_tokens=8"), tmp_path / "runs" / "fvae-lora-seed1", quiet=True
    )
    assert record.metric.contents() == {"name": "choice_accuracy", "greater_is_better": True}
    assert record.metrics.validation.keys() == {"loss", "choice_accuracy", "best_epoch"}
    test = record.metrics.test
    sets = ("arc-e", "boolq", "hellaswag")
    assert test.keys() == {"loss", *SCORES} | {f"{name}_{score}" for name in sets for score in SCORES}
    for score in ("choice_accuracy", "generated_accuracy"):
        assert test[score] == pytest.approx(sum(test[f"{name}_{score}"] for name in sets) / 3)
    assert test["unparsable"] == sum(test[f"{name}_unparsable"] for name in sets) == 17  # untrained: it only stammers
    assert record.dataset.splits == {"train": 28, "validation": 4, "test": 17}

    assert evaluate(tmp_path / "runs" / "fvae-lora-seed1", quiet=True) == test
    code, out, err = cli("evaluate", tmp_path / "runs" / "fvae-lora-seed1")
    assert code == 0, err
    assert "hellaswag_unparsable" in out
    assert cli("report", tmp_path / "runs")[0] == 0
    table = (tmp_path / "runs" / "report.md").read_text()
    assert "fvae-lora" in table
    assert "unparsable" in table


def test_a_run_on_cached_states_is_the_run_without_to_rounding(
    make: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "cache"))
    settings = ["adapter.layers=[1]", "commonsense.max_new_tokens=4", "train.log_every=1"]
    run_recipe(make(*settings), tmp_path / "plain", quiet=True)
    run_recipe(make(*settings, "train.cache_frozen=true"), tmp_path / "cached", quiet=True)
    record = assert_same_to_rounding(tmp_path / "plain", tmp_path / "cached")
    assert evaluate(tmp_path / "cached", quiet=True) == record["metrics"]["test"]


def test_training_on_the_batches_teaches_the_format_of_the_answers(make: Callable[..., Recipe]) -> None:
    task, model, _, rows = opened(make("commonsense.test_sets=[arc-e, boolq]"))
    before = task.generated_scores(model, rows["test"], rows["test"], progress=False)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    batch = task.collate([rows["train"][i] for i in range(8)])
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.generated_scores(model, rows["test"], rows["test"], progress=False)
    assert before["arc-e_unparsable"] == 5
    assert after["arc-e_unparsable"] == 0
    assert after["boolq_unparsable"] == after["unparsable"] == 6, "`true` and `false` were never trained on"


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "linear-probe"])  # which is refused
def test_what_a_method_learns_of_questions_is_saved(make: Callable[..., Recipe], tmp_path: Path, method: str) -> None:
    short = ["train.batch_size=16", "train.learning_rate=0.02", "commonsense.max_new_tokens=4"]
    recipe = make(*short, "data.protocol=reference-on-test", method=method)
    assert_saved(run_recipe(recipe, tmp_path, quiet=True))


def test_in_bf16_the_frozen_weights_are_bf16_and_the_adapter_is_not(
    make: Callable[..., Recipe], tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make("train.precision=bf16", "commonsense.max_new_tokens=4")
    model = METHODS["fvae-lora"].apply(load_task(recipe).load_model([])[0], recipe)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    in_autocast = []

    def spied(*args: Any) -> list[str]:
        in_autocast.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return write_answers(*args)

    monkeypatch.setattr("fvae_lora_experiments.tasks.commonsense.task.write_answers", spied)
    record = run_recipe(recipe, tmp_path, quiet=True)
    assert set(in_autocast) == {torch.bfloat16}
    assert evaluate(tmp_path, quiet=True) == record.metrics.test
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16), str(tmp_path / "adapter")
    )
    assert {p.dtype for name, p in loaded.named_parameters() if "fvae_lora" in name} == {torch.float32}
    whole, _ = load_task(make("train.precision=bf16", method="full")).load_model([])
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_run_on_weights_of_4_bits(make: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    make_llama(tmp_path / "llama", hidden_size=64, intermediate_size=64)
    make_tokenizer(tmp_path / "llama")
    recipe = make("commonsense.load_in_4bit=true", model=str(tmp_path / "llama"))
    model, _ = load_task(recipe).load_model([])
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    record = run_recipe(recipe, tmp_path / "run", quiet=True)
    assert evaluate(tmp_path / "run", quiet=True) == record.metrics.test


# What is refused: one line, before any training.


@pytest.fixture
def refused(cli: Cli, llama: Path, questions: Path, tmp_path: Path) -> Callable[..., str]:
    def refused(*overrides: str, dataset: Path = questions, model: Path = llama) -> str:
        options = ["--model", model, "--dataset", dataset, "--out", tmp_path / "run", "--quiet"]
        code, _, err = cli("train", "commonsense/default", *overrides, *options)
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert not (tmp_path / "run").exists()
        return err

    return refused


GOOD = {
    "instruction": "Is it so?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}
PLAIN = {"question": "Is it so?", "choices": ["yes", "no"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (json.dumps(GOOD)[:50], "train.jsonl, line 2: not JSON"),
        ("[1]", "train.jsonl, line 2: expected keys and values"),
        (json.dumps({"instruction": GOOD["instruction"]}), "train.jsonl, line 2: no output; its keys are instruction"),
        (
            json.dumps(GOOD | {"instruction": " "}),
            "train.jsonl, line 2: instruction: expected a non-empty text",
        ),
        (json.dumps(GOOD | {"answer": 1}), "train.jsonl, line 2: answer: expected a non-empty text, got 1"),
        (json.dumps(GOOD | {"input": 7}), "train.jsonl, line 2: input: expected text, got 7"),
        (json.dumps(GOOD | {"answer": "maybe"}), "train.jsonl, line 2: answer 'maybe' is not one of true, false"),
        (json.dumps(GOOD | {"output": "yes"}), "train.jsonl, line 2: output 'yes' does not name the answer true"),
        (
            json.dumps(GOOD | {"instruction": "Is it?"}),
            "line 2: the instruction has no answer format; allowed",
        ),
        (
            json.dumps(GOOD | {"instruction": "Is it?\n\nAnswer format: A/B"}),
            "line 2: answer format 'A/B' is not known; allowed at its end is `Answer format: ...` with answer1/answer2",
        ),
        (json.dumps(PLAIN | {"answer": 2}), "train.jsonl, line 2: answer: expected a choice's number, 0 to 1, got 2"),
        (
            json.dumps(PLAIN | {"choices": ["yes", ""]}),
            "train.jsonl, line 2: choices: expected at least two non-empty texts",
        ),
        (json.dumps(PLAIN | {"question": ""}), "train.jsonl, line 2: question: expected a non-empty text"),
        (json.dumps({"choices": ["a", "b"]}), "train.jsonl, line 2: no question; its keys are choices"),
        (
            json.dumps(GOOD | {"instruction": "so " * 3000 + GOOD["instruction"]}),
            "tokens; the model reads 1024 at most",
        ),
    ],
)
def test_a_row_that_cannot_be_used(refused: Callable[..., str], tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "data").mkdir()
    more = [json.dumps(GOOD)] * 20
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([json.dumps(GOOD), line, *more]) + "\n")
    assert says in refused(dataset=tmp_path / "data")


def test_files_that_cannot_be_read(refused: Callable[..., str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, content, says in (
        ("train.json", b'[{"instruction": "a"},\n {"instr', "train.json, line 2: not JSON"),
        ("train.json", b"", "train is empty"),
        ("train.jsonl.gz", gzip.compress(json.dumps(GOOD).encode())[:-9], "train.jsonl.gz: cannot be read"),
        ("train.jsonl.gz", b"no gzip", "train.jsonl.gz: cannot be read"),
        ("train.jsonl", b"\xff\xfe", "train.jsonl, line 1: not JSON: 'utf-8' codec"),
        ("train.parquet", b"PAR1", "train.parquet: cannot be read"),
        ("piqa.jsonl", json.dumps(GOOD).encode(), "no training data; it has test set piqa"),
    ):
        (data / name).write_bytes(content)
        assert says in refused(dataset=data)
        (data / name).unlink()
    assert "no training data; it has nothing" in refused(dataset=data)
    assert "no such file or folder" in refused(dataset=tmp_path / "nowhere")


def test_a_test_set_that_is_not_there(refused: Callable[..., str]) -> None:
    err = refused("commonsense.test_sets=[boolq, social_i_qa]")
    assert "no test set siqa; it has arc-e, boolq, hellaswag" in err


def test_groups_of_questions(refused: Callable[..., str]) -> None:
    assert "data.group_column: this task's data have no groups" in refused("data.group_column=set")


def test_models_that_cannot_be_used(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vit: Path
) -> None:
    assert "the tokenizer has no chat template" in refused("commonsense.template=chat").replace("this model's", "the")
    assert "a model that generates text has no head to train" in refused("method=linear-probe")
    assert "cannot be loaded as a causal language model" in refused(model=vit)
    assert "commonsense.load_in_4bit: 4-bit weights cannot be trained" in refused(
        "commonsense.load_in_4bit=true", "method=full"
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert "commonsense.load_in_4bit: bitsandbytes is not installed" in refused("commonsense.load_in_4bit=true")


@pytest.mark.parametrize("kind", [BloomForCausalLM, MambaForCausalLM])
def test_a_model_without_positions_or_with_a_state(
    refused: Callable[..., str], tmp_path: Path, kind: type[PreTrainedModel]
) -> None:
    kind(kind.config_class(vocab_size=400, hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    need = "`position_ids`, `logits_to_keep` and a cache of keys and values alone"
    says = f"answers are scored with {need}; {kind.__name__} is of another"
    assert says in refused(model=tmp_path / "model")


def test_a_tokenizer_without_an_end_of_text(refused: Callable[..., str], tmp_path: Path) -> None:
    make_llama(tmp_path / "llama")
    make_tokenizer(tmp_path / "llama", eos_token=None)
    assert "its tokenizer has no token for the end of a text" in refused(model=tmp_path / "llama")
