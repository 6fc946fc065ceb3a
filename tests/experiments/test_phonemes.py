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
import pytest
import soundfile
import torch

import timit_corpus
from arguments import assert_refused
from by_hand import adapted
from finished_runs import assert_saved
from fvae_lora import elbo_loss
from fvae_lora_experiments.data.audio_decoding import read_sound
from fvae_lora_experiments.data.timit import (
    CORE_TEST_SPEAKERS,
    DEVELOPMENT_SPEAKERS,
    FOLDED,
    PHONES,
    open_timit,
    read_phones,
)
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.run.runner import evaluate, run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks import load_task
from fvae_lora_experiments.tasks.phonemes import PhonemeTask, Sentences
from timit_corpus import RATE, Voice, hum, speak, wav2vec2, write_corpus

Cli = Callable[..., tuple[int, str, str]]
needs_espeak = pytest.mark.skipif(
    timit_corpus.LIBRARY is None, reason="espeak-ng is not installed (apt-get install espeak-ng)"
)


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
    monkeypatch.setattr("fvae_lora_experiments.data.timit.DEVELOPMENT_SPEAKERS", CORE_TEST_SPEAKERS)
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
        (labels("0 10 h#\n10 20 xx\n"), "SX37.PHN, line 2: 'xx' is not one of TIMIT's 61 phones"),
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
    assert_refused(train(corpus / "nowhere"), "no such file or folder")
    assert_refused(train(corpus / "TRAIN"), "no TRAIN folder; expected TRAIN and TEST there")
    shutil.rmtree(corpus / "TEST" / "DR2")
    shutil.rmtree(corpus / "TEST" / "DR1" / "FAKS0")
    assert_refused(train(corpus), "no .WAV file in TEST of the customary validation speakers")


def test_a_protocol_that_the_corpus_has_no_use_for_is_refused(
    train: Callable[..., tuple[int, str, str]], corpus: Path
) -> None:
    assert_refused(train(corpus, "data.protocol=reference"), "data.protocol: TIMIT has its own splits by speaker")
    assert_refused(
        train(corpus, "train.cache_frozen=true", "adapter.layers=[1]"),
        "train.cache_frozen: not supported for sentences",
    )
    assert_refused(train(corpus, "data.group_column=speaker"), "data.group_column: this task's data have no groups")


def test_a_model_that_does_not_read_samples_is_refused(cli: Cli, vit: Path, hummed: Path, tmp_path: Path) -> None:
    result = cli("train", "speech/timit", "--model", vit, "--dataset", hummed, "--out", tmp_path / "run", "--quiet")
    assert_refused(result, "cannot be loaded for phoneme recognition: vit is not of the kind of wav2vec2")
