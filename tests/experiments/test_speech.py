"""Speech: phonemes on a corpus in TIMIT's layout, and words in recordings."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import timit_corpus
import torch
from datasets import Audio, Dataset, Features, Value
from hub import Hub, command_line
from rounding import assert_alike
from safetensors.torch import load_file
from saved import assert_saved
from timit_corpus import RATE, Voice, hum, speak, write_corpus
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from by_hand import adapted
from fvae_lora import elbo_loss
from fvae_lora_experiments.data.audio import read_sound
from fvae_lora_experiments.data.published.timit import (
    CORE_TEST_SPEAKERS,
    DEVELOPMENT_SPEAKERS,
    FOLDED,
    PHONES,
    open_timit,
    read_phones,
)
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.record import Record
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.run.state_cache import collate, use_cached_states
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task, transcription
from fvae_lora_experiments.tasks.phonemes import PhonemeTask, Sentences
from fvae_lora_experiments.tasks.transcription import TranscriptionTask, word_error_rate

Cli = Callable[..., tuple[int, str, str]]
needs_espeak = pytest.mark.skipif(
    timit_corpus.LIBRARY is None, reason="espeak-ng is not installed (apt-get install espeak-ng)"
)


def wav2vec2(folder: Path, norm: str = "layer") -> Path:
    """A tiny one, of 50 frames a second as the real ones."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    size |= {"initializer_range": 0.2}  # so that the frames differ
    convolutions = {"conv_dim": (8, 8, 8), "conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2ForCTC(
        Wav2Vec2Config(**size, **convolutions, **position, num_feat_extract_layers=3, feat_extract_norm=norm)
    ).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wav2vec2(tmp_path_factory.mktemp("models") / "tiny-wav2vec2")


@pytest.fixture(scope="session")
def hummed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "TIMIT", hum)


@pytest.fixture
def corpus(hummed: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(hummed, tmp_path / "TIMIT"))


@pytest.fixture
def phonemes(listener: Path, hummed: Path) -> Callable[..., Recipe]:
    """The shipped recipe at a size of a second; keyword arguments are dotted keys with two underscores."""

    def make(**changes: Any) -> Recipe:
        options = {"model": str(listener), "dataset": str(hummed), "train.epochs": 1, "train.batch_size": 4}
        return load_recipe("speech/timit", [], options | {k.replace("__", "."): v for k, v in changes.items()})

    return make


# --- The corpus -----------------------------------------------------------------------------------------------------


def test_the_61_phones_are_folded_to_the_customary_39() -> None:
    assert (len(FOLDED), len(PHONES)) == (61, 39)
    groups: dict[str | None, set[str]] = {}
    for phone, folded in FOLDED.items():
        groups.setdefault(folded, set()).add(phone)
    assert {folded: group for folded, group in groups.items() if len(group) > 1} == {
        "aa": {"aa", "ao"},
        "ah": {"ah", "ax", "ax-h"},
        "er": {"er", "axr"},
        "hh": {"hh", "hv"},
        "ih": {"ih", "ix"},
        "l": {"l", "el"},
        "m": {"m", "em"},
        "n": {"n", "en", "nx"},
        "ng": {"ng", "eng"},
        "sh": {"sh", "zh"},
        "uw": {"uw", "ux"},
        "sil": {"pcl", "tcl", "kcl", "bcl", "dcl", "gcl", "h#", "pau", "epi"},
    }
    assert groups[None] == {"q"}


def test_the_speakers_are_the_customary_ones() -> None:
    assert (len(CORE_TEST_SPEAKERS), len(DEVELOPMENT_SPEAKERS)) == (24, 50)
    assert not CORE_TEST_SPEAKERS & DEVELOPMENT_SPEAKERS
    assert sum(name.startswith("m") for name in CORE_TEST_SPEAKERS) == 16  # two men and a woman of eight dialects


@pytest.mark.parametrize("upper", [True, False])
@pytest.mark.parametrize("container", ["NIST", "WAV"])
def test_every_distribution_of_the_corpus_reads_the_same(
    tmp_path: Path, hummed: Path, container: str, upper: bool
) -> None:
    splits = open_timit(str(write_corpus(tmp_path / "timit", hum, container, upper)))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4 * 3, "validation": 3 * 3, "test": 3 * 3}
    assert set(splits["validation"]["speaker"]) == {"faks0", "fdac1", "mpdf0"}
    assert set(splits["test"]["speaker"]) == {"mdab0", "felc0", "fpas0"}  # and not mabw0
    for name, rows in open_timit(str(hummed)).items():
        assert splits[name]["label"] == rows["label"]
        for here, there in zip(splits[name], rows, strict=True):
            assert "SA1" not in here["audio"]["path"].upper()
            np.testing.assert_array_equal(read_sound(here, RATE), read_sound(there, RATE))


def test_copies_in_another_format_beside_the_originals_are_not_read_twice(corpus: Path) -> None:
    before = {name: len(rows) for name, rows in open_timit(str(corpus)).items()}
    for file in list(corpus.rglob("*.WAV")):
        shutil.copyfile(file, file.with_name(file.name + ".wav"))
    assert {name: len(rows) for name, rows in open_timit(str(corpus)).items()} == before


def test_the_phones_of_a_sentence(tmp_path: Path) -> None:
    sound = tmp_path / "SX1.WAV"
    soundfile.write(sound, np.zeros(400), RATE, format="NIST", subtype="PCM_16")
    (tmp_path / "SX1.PHN").write_text("0 100 h#\n100 150 q\n150 200 ix\n200 250 bcl\n250 300 b\n300 399 h#\n")
    assert read_phones(sound) == ["sil", "ih", "sil", "b", "sil"]


def test_sound_is_brought_to_the_rate_of_the_model() -> None:
    tone = np.sin(np.arange(8000) * 2 * np.pi * 440 / 8000)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone, np.zeros(8000)], axis=1), 8000, format="WAV", subtype="FLOAT")
    heard = read_sound({"audio": {"bytes": buffer.getvalue(), "path": None}}, 16_000)
    expected = np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000) / 2  # both channels
    assert heard.shape == (16_000,)
    np.testing.assert_allclose(heard[500:-500], expected[500:-500], atol=1e-3)


# --- A run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("say", "methods"),
    [(hum, ["lora", "full"]), pytest.param(speak, ["fvae-lora", "linear-probe"], marks=needs_espeak)],
    ids=["hummed", "espeak"],
)
def test_phonemes_from_recipe_to_report(
    cli: Cli, listener: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, say: Voice, methods: list[str]
) -> None:
    corpus = write_corpus(tmp_path / "TIMIT", say)
    small = ["train.epochs=2", "train.batch_size=4", "adapter.r=4", "--model", listener, "--dataset", corpus, "--quiet"]
    for method in methods:
        folder = tmp_path / "runs" / f"{method}-seed1"
        code, _, err = cli("train", "speech/timit", *small, "--method", method, "--out", folder)
        assert code == 0, err
        record = json.loads((folder / "run.json").read_text())
        assert record["metric"] == {"name": "per", "greater_is_better": False}
        assert record["dataset"]["classes"] == PHONES
        assert record["dataset"]["splits"] == {"train": 12, "validation": 9, "test": 9}
        assert record["dataset"]["validation_from"] == "3 of the 50 customary development speakers"
        assert record["dataset"]["test_from"] == "3 of the 24 speakers of the core test set"
        assert record["metrics"]["test"].keys() == {"loss", "per"}
        assert evaluate(folder, quiet=True) == record["metrics"]["test"]
    code, _, err = cli("report", tmp_path / "runs")
    assert code == 0, err
    table = (tmp_path / "runs" / "report.md").read_text()
    assert all(method in table for method in methods), table
    assert not [warning for warning in recwarn if "/peft/" in warning.filename]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_learns_of_phonemes_is_saved(
    phonemes: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("fvae_lora_experiments.data.published.timit.DEVELOPMENT_SPEAKERS", CORE_TEST_SPEAKERS)
    recipe = phonemes(method=method, train__batch_size=6, train__learning_rate=0.2, adapter__r=4)
    assert_saved(run_recipe(recipe, tmp_path, quiet=True))


@needs_espeak
def test_espeak_gives_phones_with_times() -> None:
    samples, segments = speak("Five cheap goats.", "FAKS0")
    assert [phone for _, _, phone in segments] == (
        ["h#", "f", "ay", "v", "tcl", "ch", "iy", "pcl", "p", "gcl", "g", "ow", "tcl", "t", "s", "h#"]
    )
    assert segments[0][0] == 0
    assert segments[-1][1] == len(samples)
    assert all(before[1] == after[0] for before, after in pairwise(segments))
    loud = {phone: np.abs(samples[begin:end].astype(float)).mean() for begin, end, phone in segments}
    assert min(loud["ay"], loud["iy"], loud["ow"]) > 5 * loud["h#"]  # so the times are those of the sound


# --- The score ------------------------------------------------------------------------------------------------------


class Frames:
    """As much of a split as a score needs."""

    def __init__(self, *frames: int):
        self.frames = list(frames)


@pytest.mark.parametrize(
    ("heard", "spoken", "per"),
    [
        ([[0, 3, 3, 0, 5, 0]], [[3, 5]], 0),
        ([[3, 0, 3, 3, 5, 0]], [[3, 3, 5]], 0),  # a blank parts two of a kind
        ([[3, 3, 3, 3, 5, 0]], [[3, 3, 5]], 1 / 3),  # without it they are one: a deletion
        ([[1, 2, 3, 4, 5, 6]], [[1, 9, 3, 4]], 3 / 4),  # a substitution and two insertions
        ([[0, 0, 0, 0, 0, 0]], [[1, 2]], 1),
        ([[1, 0, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0]], [[2, -100, -100, -100], [1, 2, 3, 4]], 1 / 5),  # of all phones
    ],
)
def test_the_phoneme_error_rate(
    phonemes: Callable[..., Recipe], heard: list[list[int]], spoken: list[list[int]], per: float
) -> None:
    found = PhonemeTask(phonemes()).scores(np.array(heard), np.array(spoken), Frames(*[6] * len(heard)))
    assert found == {"per": pytest.approx(per)}


def test_what_the_model_says_to_padding_is_not_heard(phonemes: Callable[..., Recipe]) -> None:
    heard = np.array([[1, 2, 7, 8], [1, 2, 3, 4]])
    found = PhonemeTask(phonemes()).scores(heard, np.array([[1, 2, -100], [1, 2, 3]]), Frames(2, 3))
    assert found == {"per": 0}


# --- Padding --------------------------------------------------------------------------------------------------------


def padded_and_alone(recipe: Recipe) -> tuple[float, float]:
    """The ELBO of a batch of unequal sentences, and the mean over the frames of each alone."""
    task = load_task(recipe)
    splits = task.split(task.open_source())
    base, extractor = task.load_model(splits.classes)
    rows = Sentences(splits.train, base, extractor)
    assert len(set(rows.frames[:3])) == 3
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # the attention's
            module.dropout = 0.0
    base.config.update({"apply_spec_augment": False})
    model = adapted(base.double(), target_modules=["q_proj", "k_proj"])

    def elbo(*numbers: int) -> float:
        batch = task.collate([rows[i] for i in numbers])
        model(**batch | {"input_values": batch["input_values"].double()})
        with torch.no_grad():
            return float(elbo_loss(model))

    alone = sum(elbo(i) * rows.frames[i] for i in range(3)) / sum(rows.frames[:3])
    return elbo(0, 1, 2), alone


@pytest.mark.usefixtures("without_noise")
def test_the_elbo_does_not_depend_on_padding(phonemes: Callable[..., Recipe]) -> None:
    padded, alone = padded_and_alone(phonemes())
    assert padded == pytest.approx(alone, rel=1e-6)


@pytest.mark.usefixtures("without_noise")
def test_a_first_convolution_normalised_over_time_sees_padding(phonemes: Callable[..., Recipe], tmp_path: Path) -> None:
    """The frames that count are the right ones there too; what is in them depends on the padding, a little."""
    padded, alone = padded_and_alone(phonemes(model=str(wav2vec2(tmp_path / "base", norm="group"))))
    assert padded != pytest.approx(alone, rel=1e-6)
    assert padded == pytest.approx(alone, rel=0.1)


# --- Bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(cli: Cli, listener: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    def run(dataset: Path, *more: str) -> tuple[int, str, str]:
        places = ["--model", listener, "--dataset", dataset, "--out", tmp_path / "run", "--quiet"]
        return cli("train", "speech/timit", "train.epochs=1", "--method", "lora", *more, *places)

    return run


def assert_refused(result: tuple[int, str, str], *says: str) -> None:
    code, _, err = result
    assert (code, err.count("\n")) == (2, 1), err
    for part in says:
        assert part in err


SENTENCE = Path("TRAIN/DR1/FCJF0/SX37.WAV")


def no_labels(sound: Path) -> None:
    sound.with_suffix(".PHN").unlink()


def labels(text: str) -> Callable[[Path], None]:
    def write(sound: Path) -> None:
        sound.with_suffix(".PHN").write_text(text)

    return write


def sound(content: bytes) -> Callable[[Path], None]:
    def write(sound: Path) -> None:
        sound.write_bytes(content)

    return write


def cut_off(sound: Path) -> None:
    sound.write_bytes(sound.read_bytes()[:3000])


def compressed(sound: Path) -> None:
    """As the header of a corpus that was packed with shorten says."""
    content = sound.read_bytes()
    coding = b"sample_coding -s26 pcm,embedded-shorten-v2.00"
    sound.write_bytes(content[:1024].replace(b"sample_coding -s3 pcm", coding)[:1024] + content[1024:])


def too_short(sound: Path) -> None:
    soundfile.write(sound, np.zeros(640), RATE, format="NIST", subtype="PCM_16")
    labels("0 100 aa\n100 200 b\n200 640 aa\n")(sound)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (no_labels, "SX37.PHN: missing"),
        (labels("0 10 h#\n10 20 xx\n"), "SX37.PHN, line 2: 'xx' is none of TIMIT's 61 phones"),
        (labels("0 10 h#\n10 aa\n"), "SX37.PHN, line 2: expected first sample, end and phone, got '10 aa'"),
        (labels("0 10 h#\n10 9999999 aa\n"), "SX37.PHN, line 2: 10 to 9999999 is not within"),
        (labels("10 20 h#\n0 10 aa\n"), "SX37.PHN, line 2: 0 to 10 is not within"),
        (labels(""), "SX37.PHN: no phones in it"),
        (sound(b"no sound"), "SX37.WAV: not a readable sound file: Format not recognised"),
        (cut_off, "is not within"),
        (compressed, "SX37.WAV: not a readable sound file: File contains data in an unimplemented format"),
        (too_short, "SX37.WAV: too short for the model: 3 phones in 1 frames, CTC needs 3"),
    ],
)
def test_a_sentence_that_cannot_be_used_is_named(
    train: Callable[..., tuple[int, str, str]], corpus: Path, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(corpus / SENTENCE)
    assert_refused(train(corpus), says, "FCJF0")
    assert not (corpus.parent / "run").exists()


def test_a_folder_that_is_no_timit_is_refused(train: Callable[..., tuple[int, str, str]], corpus: Path) -> None:
    assert_refused(train(corpus / "nowhere"), "no such folder")
    assert_refused(train(corpus / "TRAIN"), "no TRAIN folder; expected TRAIN and TEST there")
    shutil.rmtree(corpus / "TEST" / "DR2")
    shutil.rmtree(corpus / "TEST" / "DR1" / "FAKS0")
    assert_refused(train(corpus), "no .WAV file in TEST of the customary validation speakers")


def test_a_protocol_that_the_corpus_has_no_use_for_is_refused(
    train: Callable[..., tuple[int, str, str]], corpus: Path
) -> None:
    assert_refused(train(corpus, "data.protocol=reference"), "data.protocol: TIMIT has its own splits by speaker")
    assert_refused(
        train(corpus, "train.cache_frozen=true", "adapter.layers=[1]"), "train.cache_frozen: not supported for sentences"
    )
    assert_refused(train(corpus, "data.group_column=speaker"), "data.group_column: this task's data have no groups")


def test_a_model_that_does_not_read_samples_is_refused(cli: Cli, vit: Path, hummed: Path, tmp_path: Path) -> None:
    result = cli("train", "speech/timit", "--model", vit, "--dataset", hummed, "--out", tmp_path / "run", "--quiet")
    assert_refused(result, "cannot be loaded for phoneme recognition: vit is not of the kind of wav2vec2")


# --- Words ----------------------------------------------------------------------------------------------------------

WORDS = [
    "yes",
    "no",
    "two times",
    "Mister Mars, stir!",
    "roses",
    "a meteor",
    "sit",
    "tours",
    "must it rain?",
    "some ants",
]


def whisper(folder: Path, multilingual: bool = False) -> Path:
    """A tiny one that hears two seconds and writes letter by letter."""
    torch.manual_seed(0)
    tokenizer = WhisperTokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    names = ["startoftranscript", "en", "zh", "de", "translate", "transcribe", "notimestamps"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names]})
    number = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in [*names, "endoftext"]}
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    size |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_mel_bins": 8,
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), number["endoftext"])
    ends |= {"decoder_start_token_id": number["startoftranscript"]}
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            **size, **ends, vocab_size=len(tokenizer), max_source_positions=100, max_target_positions=32, init_std=0.2
        )
    )
    languages = {"lang_to_id": {"<|en|>": number["en"], "<|de|>": number["de"]}}
    languages |= {"task_to_id": {task: number[task] for task in ("translate", "transcribe")}}
    model.generation_config = GenerationConfig(
        **ends,
        is_multilingual=multilingual,
        no_timestamps_token_id=number["notimestamps"],
        max_length=32,
        **(languages if multilingual else {}),
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=2), tokenizer).save_pretrained(folder)
    return folder


def recorded(text: str, seconds: float = 0.0) -> dict[str, Any]:
    samples, _ = hum(text, "FAKS0")
    buffer = io.BytesIO()
    longer = np.pad(samples, (0, max(0, int(seconds * RATE) - len(samples))))
    soundfile.write(buffer, longer, RATE, format="WAV", subtype="PCM_16")
    return {"bytes": buffer.getvalue(), "path": None}


def write_recordings(folder: Path, rows: dict[str, list[tuple[dict[str, Any], str | None]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in rows.items():
        table = {"audio": [audio for audio, _ in pairs], "text": [text for _, text in pairs]}
        Dataset.from_dict(table).to_parquet(folder / f"{split}.parquet")
    return folder


def said(*texts: str) -> list[tuple[dict[str, Any], str | None]]:
    return [(recorded(text), text) for text in texts]


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
    assert_alike(tmp_path / "false", tmp_path / "true")
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
