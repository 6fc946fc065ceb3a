"""TIMIT as it is distributed: TRAIN and TEST, dialect, speaker, and a .WAV and a .PHN file for each sentence.

The customary experiment: without the SA sentences, which every speaker reads; trained on TRAIN; selected on 50 speakers
of TEST (400 sentences); tested on the core test set, 24 other speakers (192 sentences). The 61 phones of the labels are
folded to 39, without glottal stops (Lee and Hon 1989), both for training and for the score.
"""

from pathlib import Path

import soundfile
from datasets import ClassLabel, Dataset, Features, List, Value

from fvae_lora_experiments.data.audio_decoding import SOUND
from fvae_lora_experiments.data.encoded import cell_of
from fvae_lora_experiments.data.files import Notes, enumerate_names, refuse_duplicate_split, visible_files
from fvae_lora_experiments.errors import NoSuchDataError, UserError

_KEPT = [
    "aa", "ae", "ah", "aw", "ay", "b", "ch", "d", "dh", "dx", "eh", "er", "ey", "f", "g", "hh", "ih", "iy", "jh",
    "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh", "uw", "v", "w", "y", "z",
]  # fmt: skip
_SILENCES = ("bcl", "dcl", "gcl", "pcl", "tcl", "kcl", "h#", "pau", "epi")
_MERGED = {
    "ao": "aa", "ax": "ah", "ax-h": "ah", "axr": "er", "hv": "hh", "ix": "ih", "el": "l", "em": "m", "en": "n",
    "nx": "n", "eng": "ng", "zh": "sh", "ux": "uw",
}  # fmt: skip

FOLDED: dict[str, str | None] = (
    {phone: phone for phone in _KEPT} | _MERGED | dict.fromkeys(_SILENCES, "sil") | {"q": None}
)
"""Which of the 39 each of the 61 phones becomes; None is left out."""

PHONES = sorted({phone for phone in FOLDED.values() if phone is not None})
"""The 39, silence among them."""

CORE_TEST_SPEAKERS = frozenset([
    "mdab0", "mwbt0", "felc0", "mtas1", "mwew0", "fpas0", "mjmp0", "mlnt0", "fpkt0", "mlll0", "mtls0", "fjlm0",
    "mbpm0", "mklt0", "fnlp0", "mcmj0", "mjdh0", "fmgd0", "mgrt0", "mnjm0", "fdhc0", "mjln0", "mpam0", "fmld0",
])  # fmt: skip
"""Two men and a woman of each of the eight dialects."""

DEVELOPMENT_SPEAKERS = frozenset([
    "faks0", "fdac1", "fjem0", "mgwt0", "mjar0", "mmdb1", "mmdm2", "mpdf0", "fcmh0", "fkms0", "mbdg0", "mbwm0",
    "mcsh0", "fadg0", "fdms0", "fedw0", "mgjf0", "mglb0", "mrtk0", "mtaa0", "mtdt0", "mthc0", "mwjg0", "fnmr0",
    "frew0", "fsem0", "mbns0", "mmjr0", "mdls0", "mdlf0", "mdvc0", "mers0", "fmah0", "fdrw0", "mrcs0", "mrjm4",
    "fcal1", "mmwh0", "fjsj0", "majc0", "mjsw0", "mreb0", "fgjd0", "fjmg0", "mroa0", "mteb0", "mjfc0", "mrjr0",
    "fmml0", "mrws1",
])  # fmt: skip
"""Of the rest of TEST; the list is the one that Kaldi's recipe uses."""

FEATURES = Features(
    {"audio": SOUND, "label": List(ClassLabel(names=PHONES)), "speaker": Value("string"), "where": Value("string")}
)


def open_timit(name: str, notes: Notes | None = None) -> dict[str, Dataset]:
    """`train`, `validation` and `test`: rows of `audio`, `label` (its phones), `speaker` and `where`: the sound's file.

    Args:
        name: the folder that holds TRAIN and TEST; the case of names does not matter.
        notes: gets what is left out.

    Raises:
        UserError: no such folder, a split without a sentence, or a sentence whose labels are missing or wrong.
    """
    if not Path(name).is_dir():
        raise NoSuchDataError(
            f"dataset {name}: no such folder; TIMIT is read from the folder that holds TRAIN and TEST"
        )
    notes = Notes() if notes is None else notes
    sentences = {half: _sentences(Path(name), half, notes) for half in ("TRAIN", "TEST")}
    splits = {
        "train": sentences["TRAIN"],
        "validation": [file for file in sentences["TEST"] if _speaker(file) in DEVELOPMENT_SPEAKERS],
        "test": [file for file in sentences["TEST"] if _speaker(file) in CORE_TEST_SPEAKERS],
    }
    for split, files in splits.items():
        if not files:
            where = "TRAIN" if split == "train" else f"TEST of the customary {split} speakers"
            raise UserError(f"dataset {name}: no .WAV file in {where}; expected DIALECT/SPEAKER/SENTENCE.WAV there")
    return {split: _rows(files) for split, files in splits.items()}


def _sentences(folder: Path, half: str, notes: Notes) -> list[Path]:
    """The sound files of TRAIN or TEST, in order, without SA sentences and copies such as SX1.WAV.wav."""
    halves = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.upper() == half]
    if not halves:
        raise UserError(f"dataset {folder}: no {half} folder; expected TRAIN and TEST there, as TIMIT is distributed")
    if len(halves) > 1:
        refuse_duplicate_split(folder, half, enumerate_names([f"{p.name}/" for p in halves]))
    notes.sources["train" if half == "TRAIN" else "test"] = f"{halves[0].name}/"
    sounds = []
    for file in visible_files(halves[0], notes):
        if file.suffix.lower() == ".wav" and len(file.relative_to(halves[0]).parts) == 3:
            if file.name.upper().startswith("SA"):
                notes.leave_out("read by every speaker", "SA sentence")
            elif not Path(file.stem).suffix:
                sounds.append(file)
            else:
                notes.leave_out("a copy of another", file.suffix.lower())
    return sounds


def _speaker(file: Path) -> str:
    return file.parent.name.lower()


def _rows(files: list[Path]) -> Dataset:
    columns = {
        "audio": [cell_of(file) for file in files],
        "label": [read_phones(file) for file in files],
        "speaker": [_speaker(file) for file in files],
        "where": [str(file) for file in files],
    }
    return Dataset.from_dict(columns, features=FEATURES)


def read_phones(sound: Path) -> list[str]:
    """The folded phones of a sentence, from its .PHN file: lines of first sample, end, and phone.

    Args:
        sound: the .WAV file beside it.

    Raises:
        UserError: no such file; a line of another form; a phone that is not one of the 61; times out of order, or
            beyond the end of the sound; a sentence without phones.
    """
    file = next((path for path in (sound.with_suffix(".PHN"), sound.with_suffix(".phn")) if path.is_file()), None)
    if file is None:
        raise UserError(f"{sound.with_suffix('.PHN')}: missing; {sound.name} has no phones without it")
    try:
        samples = soundfile.info(sound).frames
    except soundfile.LibsndfileError as error:
        raise UserError(f"{sound}: not a readable sound file: {error.error_string}") from error
    phones, last = [], 0
    for number, line in enumerate(file.read_text(encoding="latin-1").splitlines(), start=1):
        match line.split():
            case [begin, end, phone] if begin.isdecimal() and end.isdecimal():
                pass
            case _:
                raise UserError(f"{file}, line {number}: expected first sample, end and phone, got {line!r}")
        if phone not in FOLDED:
            raise UserError(f"{file}, line {number}: {phone!r} is not one of TIMIT's {len(FOLDED)} phones")
        if not last <= int(begin) <= int(end) <= samples:
            problem = f"{begin} to {end} is not within {last} to {samples}, the rest of {sound.name}"
            raise UserError(f"{file}, line {number}: {problem}")
        last = int(begin)
        phones.append(FOLDED[phone])
    if not any(phones):
        raise UserError(f"{file}: no phones in it")
    return [phone for phone in phones if phone is not None]
