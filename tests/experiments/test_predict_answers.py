"""`predict` and `inspect` where the answer is no class of a list: numbers, words, phonemes, options of a question."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jiwer
import pytest
import soundfile
from transformers import pipeline
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from chatter import make_llama, make_tokenizer, rows_of, write_questions
from fvae_lora_experiments.data.timit import open_timit
from fvae_lora_experiments.predict.trained import load_run
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import run_recipe
from sentences import sentences, write_encoder
from spoken_words import WORDS, recorded, said, whisper, write_recordings
from timit_corpus import hum, wav2vec2, write_corpus

Cli = Callable[..., tuple[int, str, str]]


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def trained(recipe: str, folder: Path, model: Path, dataset: Path, **more: Any) -> Record:
    options: dict[str, Any] = {"model": str(model), "dataset": str(dataset), "train.epochs": 1, "train.batch_size": 4}
    options |= {key.replace("__", "."): value for key, value in more.items()}
    return run_recipe(load_recipe(recipe, [], options), folder, quiet=True)


def inspected(cli: Cli, run: Path) -> dict[str, Any]:
    """What the autoencoders know of the run's training split."""
    code, _, err = cli("inspect", run, "--split", "train")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads((run / "inspection.json").read_text())
    assert all(layer["tokens"] and layer["kl_z1"] is not None for layer in found["layers"])
    return found


@pytest.mark.slow
def test_words_are_those_of_the_test(cli: Cli, tmp_path: Path) -> None:
    data = write_recordings(tmp_path / "data", {"train": said(*WORDS[:6]), "test": said(*WORDS[6:])})
    record = trained(
        "speech/whisper", tmp_path / "run", whisper(tmp_path / "whisper"), data, speech__max_new_tokens=20, adapter__r=4
    )
    code, out, err = cli("predict", tmp_path / "run", data / "test.parquet")
    assert (code, err) == (0, "")
    normalise = EnglishTextNormalizer({})
    wrong = jiwer.wer([normalise(text) for text in WORDS[6:]], [normalise(row["text"]) for row in table(out)])
    assert wrong == pytest.approx(record.metrics.test["wer"])
    (tmp_path / "long.wav").write_bytes(recorded("yes", 3)["bytes"])
    (tmp_path / "yes.wav").write_bytes(recorded(WORDS[6])["bytes"])
    code, one, err = cli("predict", tmp_path / "run", tmp_path / "long.wav", tmp_path / "yes.wav", "--on-error", "skip")
    assert (code, err) == (
        0,
        f"fvae-lora: left out: {tmp_path / 'long.wav'}: 3.0 s long; the model hears 2 s at most\n",
    )
    assert [row["text"] for row in table(one)] == [table(out)[0]["text"]]
    code, _, err = cli("predict", tmp_path / "run", data / "test.parquet", "--probabilities")
    assert code == 2
    assert "does not tell classes apart" in err
    loaded = load_run(tmp_path / "run")
    parts = {"tokenizer": loaded.processor.tokenizer, "feature_extractor": loaded.processor.feature_extractor}
    hear = pipeline("automatic-speech-recognition", model=loaded.unwrapped, **parts)
    samples, rate = soundfile.read(tmp_path / "yes.wav", dtype="float32")
    heard = hear({"raw": samples, "sampling_rate": rate}, generate_kwargs={"num_beams": 1})  # greedy, as in the test
    assert heard["text"].strip() == table(one)[0]["text"].strip()
    found = inspected(cli, tmp_path / "run")
    assert found["notes"] == ["No probes for a label: the task transcription has no classes."]
    assert {"encoder", "decoder"} <= {part for layer in found["layers"] for part in layer["name"].split(".")}
    for command in (("predict", tmp_path / "run", data / "test.parquet", "--foreign"), ("inspect", tmp_path / "run")):
        code, _, err = cli(*command, *(["--detector"] if command[0] == "inspect" else []))
        assert code == 2
        assert "this run (transcription) reads what is written beside what it is given" in err


@pytest.mark.slow
def test_phonemes_are_those_of_the_test(cli: Cli, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "TIMIT", hum)
    record = trained("speech/timit", tmp_path / "run", wav2vec2(tmp_path / "model"), corpus)
    test = open_timit(str(corpus))["test"]
    names = test.features["label"].feature.names
    spoken = [" ".join(names[phone] for phone in row["label"]) for row in test]
    code, out, err = cli("predict", tmp_path / "run", *(row["audio"]["path"] for row in test))
    assert (code, err) == (0, "")
    heard = [row["phonemes"] for row in table(out)]
    assert jiwer.wer(spoken, heard) == pytest.approx(record.metrics.test["per"])
    assert inspected(cli, tmp_path / "run")["notes"] == ["No probes for a label: the task phonemes has no classes."]
    assert cli("inspect", tmp_path / "run", "--detector")[0] == 0
    rows = table(cli("predict", tmp_path / "run", test[0]["audio"]["path"], "--foreign")[1])
    assert rows[0]["phonemes"] == heard[0]
    assert 0 < float(rows[0]["foreign_p_value"]) <= 1


def test_the_option_is_that_of_the_test_whether_or_not_the_answer_is_known(cli: Cli, tmp_path: Path) -> None:
    make_llama(tmp_path / "llama")
    make_tokenizer(tmp_path / "llama")
    write_questions(tmp_path / "data")
    trained("commonsense/default", tmp_path / "run", tmp_path / "llama", tmp_path / "data", adapter__r=4)
    loaded = load_run(tmp_path / "run")
    write = pipeline("text-generation", model=loaded.unwrapped, tokenizer=loaded.processor)
    assert write("What is hot?", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("What is hot?")
    rows = rows_of("ARC-Easy.test.jsonl")[:8]
    (tmp_path / "known.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unknown = [{"instruction": row["instruction"]} for row in rows]
    (tmp_path / "unknown.jsonl").write_text("\n".join(map(json.dumps, unknown)))
    assert inspected(cli, tmp_path / "run")["probes"] == {}
    code, out, err = cli("predict", tmp_path / "run", tmp_path / "known.jsonl")
    assert (code, err) == (0, "")
    assert {row["label"] for row in table(out)} <= {f"answer{n}" for n in range(1, 6)}
    assert cli("predict", tmp_path / "run", tmp_path / "unknown.jsonl")[1] == out.replace("/known", "/unknown")
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        json.dumps({"question": "What is hot?", "choices": ["ice", "fire", "snow"]}) + '\n{"question": "a"}'
    )
    ask = ("predict", tmp_path / "run", plain, "--probabilities", "--on-error", "skip", "--out")
    code, _, err = cli(*ask, tmp_path / "o.jsonl")
    assert code == 0
    assert err.startswith(f"fvae-lora: left out: {plain}, row 2: no instruction")
    (line,) = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert line["probability"] == max(line["probabilities"].values()) == line["probabilities"][line["label"]]
    code, _, err = cli(*ask, tmp_path / "o.csv")
    assert (code, err) == (2, "fvae-lora: --probabilities: questions differ in their options; give --out FILE.jsonl\n")


def test_a_regression_gives_numbers_also_of_lines_of_text(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for label in (0, 1) for text in sentences(label, 12, 0)]
    lines = [json.dumps({"text": text, "label": i / 10}) for i, text in enumerate(texts)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    sizes = {"text__metrics": ["pearson"], "text__max_length": 20, "adapter__r": 4}
    trained("text/default", tmp_path / "run", write_encoder(tmp_path / "bert"), tmp_path / "train.jsonl", **sizes)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(texts[:5]).encode() + b"\n\n\xff")))
    code, out, err = cli("predict", tmp_path / "run", "-", "--on-error", "skip")
    assert (code, err) == (0, "fvae-lora: left out: standard input, row 7: not UTF-8\n")
    rows = table(out)
    assert [(row["input"], row["row"]) for row in rows] == [("-", str(n)) for n in range(1, 6)]
    loaded = load_run(tmp_path / "run")
    regress = pipeline(
        "text-classification", model=loaded.unwrapped, tokenizer=loaded.processor, function_to_apply="none"
    )
    found = [regress(text)[0]["score"] for text in texts[:5]]
    assert [float(row["value"]) for row in rows] == pytest.approx(found, rel=1e-4)
    assert inspected(cli, tmp_path / "run")["probes"]["label"]["metric"] == "R²"
    assert "z1 by label" in (tmp_path / "run" / "inspection.html").read_text()
    code, _, err = cli("predict", tmp_path / "run", tmp_path / "train.jsonl", "--probabilities")
    assert (code, err) == (2, "fvae-lora: --probabilities: this run (text) does not tell classes apart\n")
