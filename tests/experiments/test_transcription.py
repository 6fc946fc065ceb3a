"""Words in recordings: a run, its score, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import Audio, Features, Value
from safetensors.torch import load_file
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from arguments import assert_refused
from by_hand import adapted
from finished_runs import assert_same_to_rounding, assert_saved
from fvae_lora import elbo_loss
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.run.state_cache import collate, use_cached_states
from fvae_lora_experiments.tasks import load_task, transcription
from fvae_lora_experiments.tasks.transcription import TranscriptionTask, word_error_rate
from hub import Hub, command_line
from spoken_words import WORDS, recorded, said, whisper, write_recordings

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper(tmp_path_factory.mktemp("models") / "tiny-whisper")


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": said(*WORDS[:6]), "validation": said(*WORDS[6:8]), "test": said(*WORDS[8:])}
    return write_recordings(tmp_path_factory.mktemp("data") / "words", splits)


@pytest.fixture
def transcribe(cli: Cli, writer: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def run(dataset: Path, *more: str | Path) -> tuple[int, str, str]:
        small = ["train.epochs=2", "train.batch_size=4", "adapter.r=4", "speech.max_new_tokens=20", "--quiet"]
        places = [] if "--out" in more else ["--out", tmp_path / "run"]
        places += [] if "--model" in more else ["--model", writer]
        return cli("train", "speech/whisper", *small, *places, "--dataset", dataset, *more)

    return run


def test_an_adapter_in_the_model_s_decoder_is_counted_as_what_is_exported_of_it(
    transcribe: Callable[..., tuple[int, str, str]], cli: Cli, recordings: Path, tmp_path: Path
) -> None:
    code, _, err = transcribe(recordings)
    assert code == 0, err
    code, _, err = cli("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert code == 0, err
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]
    exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert any(".decoder." in name for name in exported)
    assert counts["inference"] == sum(tensor.numel() for tensor in exported.values())


def test_words_from_recipe_to_report(
    transcribe: Callable[..., tuple[int, str, str]], cli: Cli, recordings: Path, tmp_path: Path
) -> None:
    for method in ("fvae-lora", "full"):
        folder = tmp_path / "runs" / f"{method}-seed1"
        code, _, err = transcribe(recordings, "--method", method, "--out", folder)
        assert code == 0, err
        record = json.loads((folder / "run.json").read_text())
        assert record["metric"] == {"name": "wer", "greater_is_better": False}
        assert record["dataset"]["splits"] == {"train": 6, "validation": 2, "test": 2}
        assert record["metrics"]["validation"].keys() == {"loss", "wer", "best_epoch"}
        assert record["metrics"]["test"].keys() == {"loss", "wer"}
        assert evaluate(folder, quiet=True) == record["metrics"]["test"]
    code, _, err = cli("report", tmp_path / "runs")
    assert code == 0, err
    assert "fvae-lora" in (tmp_path / "runs" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "linear-probe"])  # which is refused
def test_what_a_method_learns_of_words_is_saved(writer: Path, recordings: Path, tmp_path: Path, method: str) -> None:
    options = {"model": str(writer), "dataset": str(recordings), "method": method, "adapter.r": 4}
    options |= {"train.epochs": 1, "train.batch_size": 3, "train.learning_rate": 0.2, "speech.max_new_tokens": 8}
    options |= {"data.protocol": "reference-on-test"}
    assert_saved(run_recipe(load_recipe("speech/whisper", [], options), tmp_path, quiet=True))


@pytest.mark.slow
def test_words_by_their_names_on_the_hub(writer: Path, recordings: Path, cli: Cli, tmp_path: Path) -> None:
    shutil.copytree(writer, tmp_path / "hub" / "models" / "owner" / "tiny-whisper")
    words = tmp_path / "hub" / "datasets" / "owner" / "words"
    words.mkdir(parents=True)
    declared = Features({"audio": Audio(), "text": Value("string")}).arrow_schema  # which asks for a decoder
    for file in recordings.iterdir():
        rows = pyarrow.parquet.read_table(file)
        pyarrow.parquet.write_table(rows.replace_schema_metadata(declared.metadata), words / file.name)
    small = ["train.epochs=1", "train.batch_size=6", "adapter.r=4", "speech.max_new_tokens=8"]
    places = ["--model", "owner/tiny-whisper", "--dataset", "owner/words", "--out", tmp_path / "runs"]
    with Hub(tmp_path / "hub").serving() as hub:
        swept = ["--methods", "fvae-lora", "--seeds", "1", *places]
        done = command_line(hub.environment(tmp_path / "home"), "compare", "speech/whisper", *small, *swept)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "runs" / "fvae-lora-seed1" / "run.json").read_text())
    assert (record["model"]["name"], record["dataset"]["name"]) == ("owner/tiny-whisper", "owner/words")
    assert record["metrics"]["test"].keys() == {"loss", "wer"}
    code, _, err = cli("report", tmp_path / "runs")
    assert code == 0, err
    assert "| wer % ↓ |" in (tmp_path / "runs" / "report.md").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_words_are_written_in_the_precision_of_the_run(
    writer: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, method: str
) -> None:
    options = {"model": str(writer), "dataset": str(recordings), "method": method, "train.precision": precision}
    options |= {"train.epochs": 1, "train.batch_size": 6, "speech.max_new_tokens": 4}
    score, found = TranscriptionTask.generated_scores, set()

    def spied(task: TranscriptionTask, model: Any, *args: Any, **kwargs: Any) -> Any:
        halves = [name for name, _ in model.named_modules() if name.endswith("layers.0.fc1")]
        assert len(halves) == 2, "encoder and decoder"
        watches = [
            model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found.add((name, out.dtype)))
            for name in halves
        ]
        scores = score(task, model, *args, **kwargs)
        for watch in watches:
            watch.remove()
        return scores

    monkeypatch.setattr(TranscriptionTask, "generated_scores", spied)
    run_recipe(load_recipe("speech/whisper", [], options), tmp_path, quiet=True)
    assert len(found) == 2
    assert {dtype for _, dtype in found} == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def test_a_model_of_many_languages_is_told_which_one(
    transcribe: Callable[..., tuple[int, str, str]], recordings: Path, tmp_path: Path
) -> None:
    model = whisper(tmp_path / "many", multilingual=True)
    options = {"model": str(model), "dataset": str(recordings), "speech.max_new_tokens": 20, "speech.language": "de"}
    loaded, processor = load_task(load_recipe("speech/whisper", [], options)).load_model([])
    assert processor.tokenizer.decode(processor.tokenizer("ja").input_ids) == (
        "<|startoftranscript|><|de|><|transcribe|><|notimestamps|>ja<|endoftext|>"
    )
    assert (loaded.generation_config.language, loaded.generation_config.task) == ("de", "transcribe")
    assert_refused(transcribe(recordings, "--model", model, "speech.language=klingon"), "Unsupported language: klingon")
    assert transcribe(recordings, "--model", model, "--method", "lora")[0] == 0


@pytest.mark.parametrize(
    ("spoken", "written", "wer"),
    [
        (["folder seven"], ["Folder 7."], 0),
        (["three d audio enabled"], ["3D audio is able"], 2 / 4),
        (["folder box", "a b c"], ["", "a b c d"], 3 / 5),  # of all words, and not the mean over recordings
    ],
)
def test_the_word_error_rate(spoken: list[str], written: list[str], wer: float) -> None:
    assert word_error_rate(spoken, written, EnglishTextNormalizer({})) == pytest.approx(wer)


@pytest.mark.usefixtures("without_noise")
def test_the_silence_that_whisper_adds_is_not_in_the_elbo(writer: Path, recordings: Path) -> None:
    """Only the frames of the recordings count, however long the others of the batch are."""
    options = {"model": str(writer), "dataset": str(recordings), "speech.max_new_tokens": 20}
    task = load_task(load_recipe("speech/whisper", [], options))
    base, processor = task.load_model([])
    rows = task.datasets(task.split(task.open_source()), base, processor)["train"]
    lengths = [(int(rows[i]["attention_mask"].sum()) + 1) // 2 for i in range(3)]
    assert len(set(lengths)) == 3
    model = adapted(base.double(), target_modules=r".*\.encoder\..*\.(q_proj|k_proj)", lora_dropout=0.0)

    def elbo(*numbers: int) -> float:
        batch = task.collate([rows[i] for i in numbers])
        model(**batch | {"input_features": batch["input_features"].double()})
        with torch.no_grad():
            return float(elbo_loss(model))

    alone = sum(elbo(i) * n for i, n in enumerate(lengths)) / sum(lengths)
    assert elbo(0, 1, 2) == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((recorded("sit"), ""), "train.parquet, row 2: text is ''"),
        ((recorded("sit"), None), "train.parquet, row 2: text is None"),
        ((recorded("sit"), "!?"), "train.parquet, row 2: nothing is left of its text '!?' once it is normalised"),
        ((recorded("sit"), "sit " * 9), "train.parquet, row 2: its text has 38 tokens; the model reads 32 at most"),
        ((recorded("sit", seconds=2.5), "sit"), "train.parquet, row 2: 2.5 s long; the model hears 2 s at most"),
        (({"bytes": b"no sound", "path": None}, "sit"), "train.parquet, row 2: not a readable sound file"),
        (
            ({"bytes": None, "path": "/nowhere/a.wav"}, "sit"),
            "train.parquet, row 2, /nowhere/a.wav: not a readable sound file: No such file",
        ),
    ],
)
def test_a_recording_that_cannot_be_used_is_named(
    transcribe: Callable[..., tuple[int, str, str]], tmp_path: Path, row: tuple[dict[str, Any], str | None], says: str
) -> None:
    splits = {"train": [*said("yes"), row], "validation": said("no"), "test": said("sit")}
    assert_refused(transcribe(write_recordings(tmp_path / "words", splits)), says)
    assert not (tmp_path / "run").exists()


def test_a_table_s_row_without_a_sound_is_named(
    transcribe: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "train.wav").write_bytes(recorded("sit")["bytes"])
    rows = [{"audio": "train.wav", "text": "sit"}, {"audio": None, "text": "sit"}, {"audio": "no.wav", "text": "sit"}]
    file, lines = tmp_path / "train.jsonl", [json.dumps(row) + "\n" for row in rows]
    file.write_text("".join(lines))
    assert_refused(transcribe(tmp_path), f"{file}, row 2: not a readable sound file: no sound in this row")
    file.write_text(lines[0] * 9 + lines[2])
    assert_refused(transcribe(tmp_path), f"{file}, row 10, {tmp_path}/no.wav: not a readable sound file: No such file")
    file.write_text(lines[0] + lines[2][:20])
    assert_refused(transcribe(tmp_path), f"{file}, line 2: not JSON: ")


def test_paths_in_a_table_are_relative_to_its_folder(
    transcribe: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.wav").write_bytes(recorded("sit")["bytes"])
        (folder / f"{split}.csv").write_text(f"audio,text\n{split}.wav,sit\n")
    code, _, err = transcribe(folder, "--method", "lora")
    assert code == 0, err


def test_where_the_decoder_alone_is_adapted_the_encoder_runs_once(
    transcribe: Callable[..., tuple[int, str, str]],
    recordings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path / "cache"))
    forward, encoded = WhisperEncoderLayer.forward, list[int]()

    def counted(layer: WhisperEncoderLayer, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        encoded.append(len(states))
        return forward(layer, states, *args, **kwargs)

    monkeypatch.setattr(WhisperEncoderLayer, "forward", counted)
    for cached in ("false", "true"):
        encoded.clear()
        options = ["adapter.target_modules=[encoder_attn.q_proj]", f"train.cache_frozen={cached}", "train.log_every=1"]
        code, _, err = transcribe(recordings, *options, "--out", tmp_path / cached)
        assert code == 0, err
    assert_same_to_rounding(tmp_path / "false", tmp_path / "true")
    assert sum(encoded) == len(WORDS), "each recording once, though two epochs train, score and write"


def test_what_is_written_is_of_what_is_heard_and_not_of_the_cached_batch_before(
    writer: Path, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FVAE_LORA_CACHE", str(tmp_path))
    options = {"model": str(writer), "dataset": str(recordings), "method": "lora", "adapter.r": 4}
    recipe = load_recipe(
        "speech/whisper", ["adapter.target_modules=[encoder_attn.q_proj]", "speech.max_new_tokens=9"], options
    )
    task = load_task(recipe)
    model, processor = task.load_model([])
    rows = task.datasets(task.split(task.open_source()), model, processor)
    model = METHODS["lora"].apply(model, recipe).eval()
    encoder, heard = model.get_base_model().get_encoder(), rows["test"][0]["input_features"][None]
    with torch.no_grad():
        expected = encoder(heard).last_hidden_state
        contents = {"model": {"fingerprint": "a"}, "dataset": {"fingerprint": "b"}}
        record = Record.model_validate({"schema": 1, "state": "running", "method": "lora", "seed": 1} | contents)
        cached = use_cached_states(model, {"train": rows["train"]}, task, record, torch.device("cpu"), quiet=True)
        model(**collate(task, [cached["train"][0]]))
        torch.testing.assert_close(encoder(heard).last_hidden_state, expected)


def test_each_recording_has_its_own_text_though_the_longest_are_written_first(
    writer: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(writer), "dataset": str(recordings), "train.batch_size": 4, "speech.max_new_tokens": 9}
    task = load_task(load_recipe("speech/whisper", [], options))
    model, processor = task.load_model([])
    rows = task.datasets(task.split(task.open_source()), model, processor)["train"]
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn.out_proj.weight *= 100  # so that it listens
    found: list[str] = []
    monkeypatch.setattr(transcription, "word_error_rate", lambda _, written, __: found.extend(written) or 0.0)
    task.generated_scores(model, rows, rows, progress=False)
    alone = [model.generate(rows[i]["input_features"][None]) for i in range(len(rows))]
    assert found == [processor.decode(tokens[0], skip_special_tokens=True) for tokens in alone]
    assert len(set(found)) > 1


def test_what_does_not_transcribe_is_refused(
    transcribe: Callable[..., tuple[int, str, str]], recordings: Path, vit: Path, pictures: Path
) -> None:
    assert_refused(transcribe(recordings, "--model", vit), "cannot be loaded for transcription")
    assert_refused(
        transcribe(recordings, "--method", "linear-probe"), "a model that generates text has no head to train"
    )
    assert_refused(
        transcribe(recordings, "speech.max_new_tokens=31"), "speech.max_new_tokens: model", "30 at most, got 31"
    )
    assert_refused(
        transcribe(recordings, "data.group_column=text"), "data.group_column: this task's data have no groups"
    )
    assert_refused(transcribe(recordings, "train.cache_frozen=true"), "the first block is trained")
