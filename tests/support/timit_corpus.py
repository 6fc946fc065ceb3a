"""A small corpus in TIMIT's layout: spoken by espeak-ng, or by a voice that hums a tone for each phone.

And a tiny model that may learn it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

RATE = 16_000
Segments = list[tuple[int, int, str]]
Voice = Callable[[str, str], tuple[np.ndarray, Segments]]
"""Says a text as a speaker does: 16-bit samples, and begin, end and phone of each segment, in samples."""

SPEAKERS = {
    "TRAIN/DR1": ("FCJF0", "MCPM0"),
    "TRAIN/DR2": ("FAEM0", "MARC0"),
    "TEST/DR1": ("FAKS0", "MDAB0", "FELC0"),  # of development; of the core test, FELC0 as well
    "TEST/DR2": ("FPAS0", "FDAC1", "MPDF0", "MABW0"),  # MABW0 is of neither
}
SENTENCES = {
    "SA1": "A sentence that all of them read.",
    "SI648": "The judge wore a huge grey hat, and the boys were laughing.",
    "SX37": "Five cheap goats jumped over that muddy thing.",
    "SX127": "Measure your oil with care, you rude young man.",
}


def write_corpus(root: Path, say: Voice, container: str = "NIST", upper: bool = True, sentences: int = 4) -> Path:
    """Writes every speaker's first `sentences` below `root`, as NIST sphere or as RIFF ("WAV"); SA1 is the first."""
    case = str.upper if upper else str.lower
    for dialect, speakers in SPEAKERS.items():
        for speaker in speakers:
            folder = root / case(dialect) / case(speaker)
            folder.mkdir(parents=True)
            for name in list(SENTENCES)[:sentences]:
                samples, segments = say(SENTENCES[name], speaker)
                soundfile.write(folder / case(f"{name}.WAV"), samples, RATE, format=container, subtype="PCM_16")
                lines = "".join(f"{begin} {end} {phone}\n" for begin, end, phone in segments)
                (folder / case(f"{name}.PHN")).write_text(lines)
    return root


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


# --- A voice without a synthesiser ----------------------------------------------------------------------------------

HUMMED = {"a": "aa", "e": "eh", "i": "ih", "o": "ow", "u": "uw", "s": "s", "t": "t", "m": "m", "r": "r", ".": "h#"}


def hum(text: str, speaker: str) -> tuple[np.ndarray, Segments]:
    """A tone of 50 ms for each letter that has one, by the speaker's own pitch."""
    phones = ["h#", *(HUMMED[letter] for letter in text.lower() if letter in HUMMED)]
    pitch = 150 + 10 * (sum(map(ord, speaker)) % 7)
    length = RATE // 20
    tones = [np.sin(np.arange(length) * 2 * np.pi * pitch * (1 + 2 * i) / RATE) for i in range(len(HUMMED))]
    number = {phone: i for i, phone in enumerate(HUMMED.values())}
    samples = np.concatenate([tones[number[phone]] * (phone != "h#") for phone in phones])
    segments = [(i * length, (i + 1) * length, phone) for i, phone in enumerate(phones)]
    return (samples * 8000).astype(np.int16), segments


# --- espeak-ng ------------------------------------------------------------------------------------------------------

STOPS = {"b": "bcl b", "d": "dcl d", "g": "gcl g", "p": "pcl p", "t": "tcl t", "k": "kcl k"}
AFFRICATES = {"dZ": "dcl jh", "tS": "tcl ch"}
OF_ESPEAK = STOPS | AFFRICATES | {
    "t#": "dx", "?": "q", "f": "f", "v": "v", "T": "th", "D": "dh", "s": "s", "z": "z", "S": "sh", "Z": "zh", "h": "hh",
    "m": "m", "n": "n", "N": "ng", "l": "l", "r": "r", "r-": "r", "w": "w", "j": "y", "n-": "en", "@L": "el",
    "a": "ae", "aa": "ae", "a#": "ax", "A:": "aa", "A@": "aa r", "0": "aa", "O:": "ao", "O@": "ao r", "O2": "ao",
    "o@": "ao r", "V": "ah", "@": "ax", "@2": "ax", "@5": "uh", "3": "axr", "3:": "er", "E": "eh", "e@": "eh r",
    "I": "ih", "I2": "ix", "i@3": "ih r", "i@": "iy ax", "i": "iy", "i:": "iy", "U": "uh", "U@": "uh r", "u:": "uw",
    "eI": "ey", "aI": "ay", "OI": "oy", "aU": "aw", "oU": "ow", "_": "pau", "_:": "pau", "_!": "pau",
}  # fmt: skip
"""espeak-ng's names of American English phones in TIMIT's 61; where those are two, as a stop's closure and its burst,
they share the time equally. Silence at either end is h#."""

SILENCE = ("_", "_:")
LIBRARY = ctypes.util.find_library("espeak-ng")


def speak(text: str, speaker: str) -> tuple[np.ndarray, Segments]:
    """espeak-ng's American voice, higher for women, with the times at which it says that its phones begin.

    Raises:
        KeyError: a phone that `OF_ESPEAK` does not know.
    """
    return _spoken(text, "F" if speaker.startswith("F") else "M")


@cache
def _spoken(text: str, sex: str) -> tuple[np.ndarray, Segments]:
    samples, events, rate = _synthesised(text, 75 if sex == "F" else 40)
    resampled = soxr.resample(samples, rate, RATE)
    while events[-1][1] in SILENCE:
        end = events.pop()[0]
    begins = [0, *(round(sample * RATE / rate) for sample in (*(sample for sample, _ in events), end)), len(resampled)]
    names = ["h#", *(OF_ESPEAK[name] for _, name in events), "h#"]
    segments = []
    for (begin, end), phones in zip(pairwise(begins), map(str.split, names), strict=True):
        bounds = [begin + (end - begin) * i // len(phones) for i in range(len(phones) + 1)]
        segments += [(*times, phone) for times, phone in zip(pairwise(bounds), phones, strict=True)]
    return resampled, segments


class _Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng/speak_lib.h; the union at its end is a phone's name in 8 bytes here."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("type", "unique_identifier", "text_position", "length", "ms", "sample")),
        ("user_data", ctypes.c_void_p),
        ("phone", ctypes.c_char * 8),
    )


SYNCHRONOUS, PHONEME_EVENTS, PITCH, PHONEME, END, UTF8 = 2, 1, 3, 7, 0, 1


@cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """The library, started once, and its samples per second."""
    espeak = ctypes.CDLL(LIBRARY)
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, None, PHONEME_EVENTS)
    assert rate > 0
    assert espeak.espeak_SetVoiceByName(b"en-us") == 0
    return espeak, rate


def _synthesised(text: str, pitch: int) -> tuple[np.ndarray, list[tuple[int, str]], int]:
    """16-bit samples, the phones with the sample at which each begins, and samples per second."""
    espeak, rate = _espeak()
    assert espeak.espeak_SetParameter(PITCH, pitch, 0) == 0
    pieces: list[np.ndarray] = []
    events: list[tuple[int, str]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
    def receive(samples, number, event):  # type: ignore[no-untyped-def]
        if number > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(number,)).copy())
        i = 0
        while event[i].type != END:
            if event[i].type == PHONEME:
                events.append((event[i].sample, event[i].phone.decode()))
            i += 1
        return 0

    espeak.espeak_SetSynthCallback(receive)
    encoded = text.encode()
    assert espeak.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, UTF8, None, None) == 0
    return np.concatenate(pieces), events, rate
