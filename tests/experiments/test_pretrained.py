"""Models, tokenizers and processors of others: what is wrong with one is one line, and nothing of it is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from chatter import make_llama, write_questions
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.models.pretrained import load_classifier, load_model, load_tokenizer, loading
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task
from sentences import sentences, write_encoder

Cli = Callable[..., tuple[int, str, str]]

ROLE = "for text classification"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return write_encoder(tmp_path / "bert")


def classifier(folder: Path | str) -> Any:
    with loading(str(folder), ROLE):
        return load_classifier(str(folder), AutoModelForSequenceClassification, ["dull", "fine"])[0]


def reason(function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as refusal:
        function(*arguments)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- Tokenizers -----------------------------------------------------------------------------------------------------

KINDS = [
    *("Albert", "Bert", "DebertaV2", "DistilBert", "GPT2", "GPTNeoX", "Gemma", "Llama", "MPNet", "Mistral"),
    *("ModernBert", "OPT", "Qwen2", "Roberta", "T5", "Whisper", "XLMRoberta", "XLNet"),
]


@pytest.mark.parametrize("beside", [[], ["tokenizer_config.json"]], ids=["nothing", "a configuration alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, kind: str, beside: list[str]) -> None:
    config: PreTrainedConfig = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    for file in beside:
        (tmp_path / file).write_text("{}")
    said = reason(load_tokenizer, str(tmp_path), ROLE)
    assert said.startswith(f"model {tmp_path}: no tokenizer there" if not beside else f"model {tmp_path}: ")


def write_tables(folder: Path, words: dict[str, str]) -> Path:
    folder.mkdir()
    for seed, split in enumerate(("train", "test")):
        rows = [
            {"text": " ".join(words.get(word, word) for word in text.split()), "label": ["dull", "fine"][label]}
            for label in (0, 1)
            for text in sentences(label, 20, seed)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_text_model_without_its_tokenizer_is_refused_before_any_training(
    cli: Cli, bert: Path, tmp_path: Path
) -> None:
    for file in bert.glob("tokenizer*"):
        file.unlink()
    data = write_tables(tmp_path / "data", {})
    code, _, err = cli("train", "text/default", "--model", bert, "--dataset", data, "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith(f"fvae-lora: model {bert}: no tokenizer there")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_knows_next_to_none_of_the_words_is_refused(cli: Cli, bert: Path, tmp_path: Path) -> None:
    from sentences import WORDS

    train = ("train", "text/default", "train.epochs=1", "text.max_length=20", "--model", bert, "--quiet")
    foreign = write_tables(tmp_path / "foreign", {word: f"{word}ski" for word in WORDS if word != "cast"})
    code, _, err = cli(*train, "--dataset", foreign, "--out", tmp_path / "run")
    assert code == 2
    assert "% of the training split's tokens are unknown to its tokenizer" in err
    assert not (tmp_path / "run").exists()
    half = write_tables(tmp_path / "half", {word: f"{word}ski" for word in WORDS[6:]})
    assert cli(*train, "--dataset", half, "--out", tmp_path / "run")[0] == 0, "many unknown words are no refusal"


@pytest.mark.parametrize("foreign", [False, True], ids=["no tokenizer", "another one"])
def test_a_model_that_answers_needs_its_own_tokenizer(tmp_path: Path, foreign: bool) -> None:
    make_llama(tmp_path / "llama")
    if foreign:
        write_encoder(tmp_path / "other")
        for file in (tmp_path / "other").glob("tokenizer*"):
            shutil.copy(file, tmp_path / "llama")
        vocabulary = tmp_path / "llama" / "tokenizer.json"
        tokenizer = json.loads(vocabulary.read_text())
        known = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = {w if w.startswith("[") else f"{w}ski": number for w, number in known.items()}
        vocabulary.write_text(json.dumps(tokenizer))
        config = tmp_path / "llama" / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "[SEP]"}))
    write_questions(tmp_path / "questions")
    places = {"model": str(tmp_path / "llama"), "dataset": str(tmp_path / "questions"), "method": "lora"}
    task = load_task(load_recipe("commonsense/default", options=places))

    def prepare() -> None:
        model, tokenizer = task.load_model([])
        task.datasets(task.split(task.open_source()), model, tokenizer)

    assert ("unknown to its tokenizer" if foreign else "no tokenizer there") in reason(prepare)


def test_a_model_that_transcribes_needs_its_own_tokenizer(tmp_path: Path) -> None:
    from spoken_words import recorded, whisper, write_recordings

    rows = {split: [(recorded("yes"), "yes"), (recorded("no"), "no")] for split in ("train", "validation", "test")}
    folder, data = whisper(tmp_path / "whisper"), write_recordings(tmp_path / "data", rows)
    places = {"model": str(folder), "dataset": str(data), "method": "lora"}
    recipe = load_recipe("speech/whisper", ["speech.max_new_tokens=8"], places)

    def prepare() -> None:
        task = load_task(recipe)
        model, processor = task.load_model([])
        task.datasets(task.split(task.open_source()), model, processor)

    prepare()
    vocabulary = folder / "tokenizer.json"
    tokenizer = json.loads(vocabulary.read_text())
    known = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word if len(word) > 1 else f"{word}~{word}": n for word, n in known.items()}
    vocabulary.write_text(json.dumps(tokenizer))
    assert "unknown to its tokenizer; does it belong to the model?" in reason(prepare)
    for file in [*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")]:
        file.unlink()
    assert "tokenizer" in reason(prepare)


# --- Padding --------------------------------------------------------------------------------------------------------

TWO = {"num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "Llama": TWO | {"hidden_size": 16, "intermediate_size": 16},
    "OPT": TWO | {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16},
}


@pytest.mark.parametrize("lacking", ["both", "config", "tokenizer", "neither"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_tells_texts_apart_whatever_its_batch_and_its_padding(
    tmp_path: Path, kind: str, lacking: str
) -> None:
    folder = write_encoder(tmp_path / "model", "roberta")  # for its tokenizer
    made: PreTrainedConfig = getattr(transformers, f"{kind}Config")(
        **DECODERS[kind], vocab_size=16, initializer_range=0.5, init_std=0.5, pad_token_id=0, eos_token_id=3
    )
    made.pad_token_id = None if lacking in ("both", "config") else 0
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    special = {"eos_token": "[SEP]", "padding_side": "left"}
    special |= {"pad_token": None} if lacking in ("both", "tokenizer") else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | special))
    places = {"model": str(folder), "dataset": str(write_tables(tmp_path / "data", {})), "method": "lora"}
    task = load_task(load_recipe("text/default", ["text.max_length=20"], places))
    splits = task.split(task.open_source())
    model, tokenizer = task.load_model(splits.classes)
    rows = task.datasets(splits, model, tokenizer)
    model.eval()
    items = [rows["train"][i] for i in range(8)]
    assert len({len(item["input_ids"]) for item in items}) > 3
    with torch.no_grad():
        together = model(**task.collate(items)).logits
        alone = torch.cat([model(**task.collate([item])).logits for item in items])
        texts = splits.train["text"][:8]
        plainly = [model(**tokenizer(text, return_tensors="pt")).logits for text in texts]  # nothing is padded
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, torch.cat(plainly))
    assert together.std(0).min() > 1e-3, "the texts differ"
    expected = {"padding": "the end token [SEP]"} if lacking in ("both", "tokenizer") else {}
    assert {key: value for key, value in task.facts(rows).items() if key == "padding"} == expected
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_a_run_of_a_decoder_without_padding_says_what_pads(cli: Cli, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", "roberta")
    made = transformers.LlamaConfig(**DECODERS["Llama"], vocab_size=16)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "[SEP]", "pad_token": None}))
    options = ["train.epochs=1", "train.batch_size=8", "text.max_length=20", "--quiet"]
    places = ["--model", folder, "--dataset", write_tables(tmp_path / "data", {}), "--out", tmp_path / "run"]
    code, _, err = cli("train", "text/default", *options, *places)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dataset"]["padding"] == "the end token [SEP]"
    code, out, err = cli("evaluate", tmp_path / "run")
    assert code == 0, err
    test = json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["test"]
    assert out.count(f"{test['loss']:.6f}") == 2


# --- Files that cannot be loaded ------------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def content(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(text.encode("latin-1"))


def cut(file: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut("model.safetensors", 200), "SafetensorError: "),
        (cut("model.safetensors", 0), "SafetensorError: "),
        (cut("model.safetensors", 9000), "SafetensorError: "),
        (content("model.safetensors", "hello " * 99), "SafetensorError: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (content("config.json", ""), "not a valid JSON file"),
        (content("config.json", "{"), "not a valid JSON file"),
        (content("config.json", "\xff\xfe"), "not a valid JSON file"),
        (content("config.json", "[]"), "Should have a `model_type` key"),
        (content("config.json", "3"), "TypeError: "),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (config(model_type="nope"), "model type `nope`"),
        (config(model_type=None), "cannot be loaded"),
        (config(hidden_size=12), "its weights do not fit its config.json: bert."),
        (config(intermediate_size=17), "its weights do not fit its config.json: bert.encoder.layer.0"),
        (config(num_hidden_layers="two"), "Validation error for field 'num_hidden_layers'"),
        (config(num_attention_heads=3), "not a multiple of the number of attention heads"),
        (config(hidden_act="nope"), "KeyError: 'nope'"),
        (config(vocab_size=-1), "negative dimension"),
        (config(id2label=[1, 2]), "AttributeError: "),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "optimum"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(bert: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(bert)
    said = reason(classifier, bert)
    assert said.startswith(f"model {bert}: ")
    assert says in said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "1.0"}'])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(bert: Path, file: str, text: str) -> None:
    content(file, text)(bert)
    if file == "tokenizer_config.json" and text.startswith("{") and text.endswith("}"):
        assert len(load_tokenizer(str(bert), ROLE)) >= 16, "it is known without"
    else:
        assert reason(load_tokenizer, str(bert), ROLE).startswith(f"model {bert}: cannot be loaded {ROLE}: ")


def test_a_model_that_is_neither_here_nor_to_be_had_is_said_to_be_so() -> None:
    nowhere = "no such folder, no such name in the cache, and the hub cannot be reached"
    assert reason(classifier, "no/model") == f"model no/model: {nowhere}"
    assert reason(load_tokenizer, "nomodel", ROLE) == f"model nomodel: {nowhere}"
    assert reason(classifier, "./nomodel") == "model ./nomodel: no such folder"


def test_an_adapter_is_no_model(bert: Path, tmp_path: Path) -> None:
    get_peft_model(AutoModel.from_pretrained(bert), LoraConfig(target_modules=["query"])).save_pretrained(
        tmp_path / "a"
    )
    with loading(str(tmp_path / "a"), ROLE):
        assert "holds an adapter" in reason(load_model, AutoModel, str(tmp_path / "a"))
    for file in (tmp_path / "a").iterdir():
        shutil.copy(file, bert)
    assert "holds an adapter (adapter_config.json); expected a whole model" in reason(classifier, bert)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (
            "adapter.layers=[7]",
            "adapter.layers: block 7 of ViTForImageClassification has nothing to adapt; allowed are 0 to 1",
        ),
        ("adapter.layers=[0,7]", "adapter.layers: block 7"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "fvae-lora", "vera", "adalora"])
def test_layers_that_the_model_does_not_have_are_refused(
    cli: Cli, small: list[str], tmp_path: Path, option: str, says: str, method: str
) -> None:
    code, _, err = cli("train", "image/default", *small, option, "--method", method, "--out", tmp_path / "run")
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("spoil", [cut("{}.safetensors", 100), lambda folder: (folder / "{}.safetensors").unlink()])
def test_a_run_whose_adapter_is_damaged_is_one_line(
    cli: Cli, small: list[str], tmp_path: Path, method: str, spoil: Callable[[Path], object]
) -> None:
    train = ("train", "image/default", *small[1:], "train.epochs=1", "--method", method, "--quiet")
    assert cli(*train, "--out", tmp_path / "run")[0] == 0
    (weights,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    weights.rename(weights.with_name("{}.safetensors"))
    spoil(weights.parent)
    if (weights.parent / "{}.safetensors").exists():
        (weights.parent / "{}.safetensors").rename(weights)
    code, _, err = cli("evaluate", tmp_path / "run")
    assert code == 2
    assert err.startswith(f"fvae-lora: {'model ' if method == 'full' else ''}{weights.parent}: ")
    assert err.count("\n") == 1


# --- Nothing is unpickled -------------------------------------------------------------------------------------------


class Owned:
    """What a pickle can do to somebody who reads it."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def as_pickle(folder: Path, parts: int = 1) -> dict[str, torch.Tensor]:
    """Writes a model's weights as pickles in place of safetensors, and gives them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        files = {name: f"pytorch_model-{i % parts + 1:05}-of-{parts:05}.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: weights[name] for name in names if files[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": files}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weights


@pytest.mark.parametrize(("parts", "name"), [(3, "plain"), (1, 'it\'s "my" model, $HOME')])
def test_a_pickle_is_refused_with_the_line_that_converts_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, name: str
) -> None:
    folder = bert.rename(tmp_path / name)
    weights = as_pickle(folder, parts)
    monkeypatch.setattr(pickle, "Unpickler", None)
    said = reason(classifier, folder)
    monkeypatch.undo()
    assert said.startswith(f"model {folder}: its weights are only there as a pickle, which is not read")
    line = said.partition("run ")[2]
    assert line.startswith("python -c ")
    activated = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(line, shell=True, check=True, env=os.environ | {"PATH": activated})
    model = classifier(folder)
    for key, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, weights[key])
        assert torch.equal(value, model.bert.state_dict()[key])
    assert AutoModel.from_pretrained(folder, use_safetensors=True)


def test_a_pickle_beside_safetensors_is_not_read(bert: Path, tmp_path: Path) -> None:
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin", "adapter.eng.bin"):
        (bert / file).write_bytes(pickle.dumps(Owned(tmp_path / "owned")))
    assert classifier(bert)
    load_tokenizer(str(bert), ROLE)
    assert not (tmp_path / "owned").exists()


def test_a_configuration_cannot_name_a_pickle(bert: Path) -> None:
    config(transformers_weights="adapter_model.bin")(bert)
    torch.save(load_file(bert / "model.safetensors"), bert / "adapter_model.bin")
    assert "names weights that are not safetensors" in reason(classifier, bert)


def test_a_pickle_on_the_hub_is_refused_with_the_lines_that_fetch_and_convert_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_pickle(bert)
    snapshot = tmp_path / "cache" / "models--owner--bert" / "snapshots" / ("0" * 40)
    shutil.copytree(bert, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert len(load_tokenizer("owner/bert", ROLE)) == 16, "it is found in the cache"
    said = reason(classifier, "owner/bert")
    assert said.startswith("model owner/bert: its weights are only there as a pickle, which is not read")
    assert "run hf download owner/bert --local-dir bert && python -c " in said
    assert said.endswith(" and give --model ./bert")


def test_code_that_comes_with_a_model_is_not_run(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked might say yes
    (bert / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'owned')!r})")
    theirs = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Model"}
    config(model_type="mine", auto_map=theirs)(bert)
    assert "contains custom code" in reason(classifier, bert)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        own = {"AutoTokenizer": ["mine.T", "mine.T"], "AutoProcessor": "mine.P", "AutoImageProcessor": "mine.I"}
        (bert / name).write_text(json.dumps({"auto_map": own, "tokenizer_class": "Mine"}))
    with pytest.raises(UserError):
        load_tokenizer(str(bert), ROLE)
    for task in ("image", "phonemes", "transcription"):
        places = {"task": task, "model": str(bert), "dataset": "x", "method": "lora"}
        assert reason(load_task(Recipe.model_validate(places)).load_model, ["a", "b"])
    assert not (tmp_path / "owned").exists()
