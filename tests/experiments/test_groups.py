"""Data with groups: how well each is predicted, where they come from, and what cannot be used."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image as Pil

from fvae_lora_experiments.data import accuracies, fingerprint, group_counts, open_images, split, unlike_published
from fvae_lora_experiments.data.groups import group_scores, weighted_as
from fvae_lora_experiments.data.image_decoding import image_content
from fvae_lora_experiments.data.spurious import CELEBA, SPUCO_ANIMALS, WATERBIRDS, Published
from fvae_lora_experiments.data.texts import open_texts
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.recipe import load_recipe
from fvae_lora_experiments.schema import DataSettings, TextSettings

Cli = Callable[..., tuple[int, str, str]]
GROUPED = DataSettings(group_column="group")
ROWS = {"train": (6, 2, 2, 6), "validation": (2, 2, 2, 2), "test": (3, 2, 2, 3)}
"""Rows of each group in the tiny data sets, by split."""


def rows() -> Iterator[tuple[int, str, int, int]]:
    """(number, split, class, attribute) of every row of a tiny data set of two classes and two attributes."""
    number = 0
    for part, counts in ROWS.items():
        for group, count in enumerate(counts):
            for _ in range(count):
                yield number, part, group // 2, group % 2
                number += 1


def write_picture(file: Path, number: int, label: int, attribute: int) -> None:
    """A noisy picture: its class is how red it is, its attribute how blue."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).normal((60 + 130 * label, 90, 60 + 130 * attribute), 40, (8, 8, 3))
    Pil.fromarray(np.clip(noise, 0, 255).astype("uint8")).save(file)


def write_waterbirds(folder: Path) -> Path:
    lines = ["img_id,img_filename,y,split,place,place_filename"]
    for number, part, label, place in rows():
        name = f"{label}.Bird/{number}.png"
        write_picture(folder / name, number, label, place)
        lines.append(f"{number},{name},{label},{list(ROWS).index(part)},{place},/o/{number}.jpg")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_celeba(folder: Path, suffix: str = ".txt", images: str = "img_align_celeba") -> Path:
    names = ["Bald", "Blond_Hair", "Male"]
    attributes, partitions = [], []
    for number, part, label, male in rows():
        write_picture(folder / images / f"{number:06}.png", number, label, male)
        attributes.append([f"{number:06}.png", "-1", str(2 * label - 1), f"{2 * male - 1:2}"])
        partitions.append([f"{number:06}.png", str(list(ROWS).index(part))])
    if suffix == ".csv":
        tables = [["image_id", *names], *attributes], [["image_id", "partition"], *partitions]
        attributes, partitions = ([[cell.strip() for cell in line] for line in table] for table in tables)
    else:
        attributes = [[str(len(attributes))], names, *attributes]
    separator = "," if suffix == ".csv" else " "
    for stem, table in (("list_attr_celeba", attributes), ("list_eval_partition", partitions)):
        (folder / f"{stem}{suffix}").write_text("".join(f"{separator.join(line)}\n" for line in table))
    return folder


def write_spuco_animals(folder: Path) -> Path:
    for number, part, label, attribute in rows():
        for half, classes, places in (
            ("spuco_birds", ["landbirds", "waterbirds"], ["land", "water"]),
            ("spuco_dogs", ["small_dogs", "big_dogs"], ["indoor", "outdoor"]),
        ):
            place = folder / half / part.replace("validation", "val") / classes[label] / places[attribute]
            write_picture(place / f"{number}.png", number, label, attribute)
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], Published]] = {
    "waterbirds": (write_waterbirds, WATERBIRDS),
    "celeba": (write_celeba, CELEBA),
    "spuco-animals": (write_spuco_animals, SPUCO_ANIMALS),
}


def write_parquet(
    folder: Path, group: Callable[[int, int], Any], feature: Any, parts: Sequence[str] = tuple(ROWS)
) -> Path:
    """The tiny data set as parquet files; `group` makes a row's group of its class and its attribute."""
    folder.mkdir()
    for part in parts:
        mine = [(n, label, attribute) for n, where, label, attribute in rows() if where == part]
        for number, label, attribute in mine:
            write_picture(folder / f"{number}.png", number, label, attribute)
        columns = {
            "image": [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n, _, _ in mine],
            "label": [label for _, label, _ in mine],
            "group": [group(label, attribute) for _, label, attribute in mine],
        }
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"]), "group": feature})
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{part}-0.parquet")
    return folder


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "grouped", lambda label, attribute: 2 * label + attribute, Value("int64"))


def grouped(groups: list[int], names: int = 2) -> Dataset:
    features = Features({"group": ClassLabel(names=[f"g{n}" for n in range(names)])})
    return Dataset.from_dict({"group": groups}, features=features)


def test_scores_of_groups_by_hand() -> None:
    correct = np.array([1, 1, 1, 0, 1, 0, 0, 0]).astype(bool)
    groups = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    scores = group_scores(correct, groups, ["x", "y", "z"])
    assert scores == {
        "accuracy": 0.5,
        "worst_group_accuracy": 0.0,
        "gap": 0.5,
        "accuracy_group_x": 0.75,
        "accuracy_group_y": 0.5,
        "accuracy_group_z": 0.0,
    }


def test_a_train_weighted_average_counts_groups_as_train_does() -> None:
    # three quarters and a quarter of train; 0.5 and 1.0 right on a test split of halves
    train, test = grouped([0, 0, 0, 1]), grouped([0, 0, 1, 1])
    correct = np.array([True, False, True, True])
    assert accuracies(correct, test)["accuracy"] == 0.75
    scores = accuracies(correct, weighted_as(train, test))
    assert scores["accuracy"] == pytest.approx(0.75 * 0.5 + 0.25 * 1.0)
    assert scores["gap"] == pytest.approx(0.625 - 0.5)


def test_without_groups_accuracy_is_the_only_score() -> None:
    assert accuracies(np.array([True, False]), Dataset.from_dict({"label": [0, 1]})) == {"accuracy": 0.5}


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """(correct, groups, names, weights of the groups): up to five groups, each with a row."""
    names = [f"g{n}" for n in range(draw(st.integers(1, 5)))]
    more = draw(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, len(names) - 1)))
    groups = np.concatenate([np.arange(len(names)), more])
    correct = draw(hnp.arrays(bool, groups.shape))
    weights = draw(hnp.arrays(np.float64, len(names), elements=st.floats(0.01, 100)))
    return correct, groups, names, weights


@given(predictions(), st.booleans())
def test_the_average_lies_between_the_worst_group_and_the_best(
    drawn: tuple[np.ndarray, np.ndarray, list[str], np.ndarray], is_weighted: bool
) -> None:
    correct, groups, names, weights = drawn
    scores = group_scores(correct, groups, names, weights[groups] if is_weighted else None)
    best = max(scores[f"accuracy_group_{name}"] for name in names)
    assert scores["worst_group_accuracy"] - 1e-12 <= scores["accuracy"] <= best + 1e-12
    assert scores["gap"] == scores["accuracy"] - scores["worst_group_accuracy"] >= -1e-12
    if not is_weighted:
        assert scores["accuracy"] == pytest.approx(correct.mean())
        shares = [np.mean(groups == number) * scores[f"accuracy_group_{name}"] for number, name in enumerate(names)]
        assert sum(shares) == pytest.approx(scores["accuracy"])


@given(predictions(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_the_numbering_of_groups_do_not_matter(
    drawn: tuple[np.ndarray, np.ndarray, list[str], np.ndarray], random: Any
) -> None:
    correct, groups, names, weights = drawn
    scores = group_scores(correct, groups, names, weights[groups])
    order, numbers = (random.sample(range(n), n) for n in (len(groups), len(names)))
    renamed = [names[numbers.index(n)] for n in range(len(names))]
    moved = group_scores(correct[order], np.array(numbers)[groups[order]], renamed, weights[groups][order])
    assert moved == pytest.approx(scores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_folder_is_known_by_its_files(layout: str, tmp_path: Path) -> None:
    write, published = LAYOUTS[layout]
    splits = open_images(str(write(tmp_path / "data")), GROUPED)
    halves = len(published.groups) // 4
    assert list(splits) == list(ROWS)
    for part, data in splits.items():
        assert data.features["label"].names == list(published.classes)
        assert group_counts(data) == dict(zip(published.groups, ROWS[part] * halves, strict=True))
        for row in data:
            class_name, attribute = published.groups[row["group"]].split("/")
            assert class_name == published.classes[row["label"]]
            red, _, blue = np.asarray(Pil.open(row["image"]["path"])).mean((0, 1))
            assert (red > 125) == bool(row["label"] % 2)
            assert (blue > 125) == (attribute in ("water", "male", "outdoor"))


@pytest.mark.parametrize("images", ["img_align_celeba/img_align_celeba", "Img/img_align_celeba"])
def test_celeba_as_csv_is_the_same_as_text(tmp_path: Path, images: str) -> None:
    text, csv = (write_celeba(tmp_path / "txt"), write_celeba(tmp_path / "csv", ".csv", images))
    marks = [fingerprint(open_images(str(folder), GROUPED), image_content) for folder in (text, csv)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    ("published", "sizes", "minority"),
    [  # rows per split, and the share of the smaller class in train, as the paper's table has them
        (WATERBIRDS, (4795, 1199, 5794), 0.232),
        (CELEBA, (162770, 19867, 19962), 0.15),
        (SPUCO_ANIMALS, (42000, 2100, 4000), 0.25),
    ],
)
def test_the_published_counts_are_those_of_the_papers_table(
    published: Published, sizes: tuple[int, ...], minority: float
) -> None:
    assert tuple(sum(counts) for counts in published.counts.values()) == sizes
    last_class = sum(published.counts["train"][-2:]) / sizes[0]
    assert last_class == pytest.approx(minority, abs=0.002)


@pytest.mark.parametrize("published", [WATERBIRDS, SPUCO_ANIMALS], ids=lambda published: published.name)
def test_a_whole_copy_is_used_without_a_word_and_another_is_named(published: Published) -> None:
    features = Features({"group": ClassLabel(names=list(published.groups))})
    splits = {
        part: Dataset.from_dict({"group": np.repeat(np.arange(len(counts)), counts)}, features=features)
        for part, counts in published.counts.items()
    }
    assert unlike_published(splits) is None
    note = unlike_published(splits | {"test": splits["test"].select(range(1, len(splits["test"])))})
    assert note is not None
    published_counts = "/".join(map(str, published.counts["test"]))
    assert re.fullmatch(
        rf"not the published {published.name}: rows per group are test [\d/]+ \(published {published_counts}\)", note
    )
    assert "validation absent (published" in str(unlike_published({"train": splits["train"], "test": splits["test"]}))


@pytest.mark.parametrize(
    ("group", "feature", "names"),
    [
        (lambda label, attribute: 10 * (2 * label + attribute), Value("int64"), ["0", "10", "20", "30"]),
        (lambda label, attribute: "dw"[attribute] + str(label), Value("string"), ["d0", "d1", "w0", "w1"]),
        (lambda _, attribute: attribute, ClassLabel(names=["dry", "wet"]), ["dry", "wet"]),
    ],
    ids=["integers", "strings", "classes"],
)
def test_groups_are_called_by_their_names_or_numbers(
    tmp_path: Path, group: Callable[[int, int], Any], feature: Any, names: list[str]
) -> None:
    splits = open_images(str(write_parquet(tmp_path / "p", group, feature)), GROUPED)
    assert all(data.features["group"].names == names for data in splits.values())
    for row in splits["test"]:
        red, _, blue = np.asarray(Pil.open(str(tmp_path / "p" / _file_of(row, tmp_path / "p")))).mean((0, 1))
        own = group(int(red > 125), int(blue > 125))
        assert names[row["group"]] == (feature.names[own] if isinstance(feature, ClassLabel) else str(own))


def _file_of(row: dict[str, Any], folder: Path) -> str:
    return next(file.name for file in folder.glob("*.png") if file.read_bytes() == row["image"]["bytes"])


def test_the_fingerprint_tells_other_groups_apart(tmp_path: Path) -> None:
    def mark(name: str, group: Callable[[int, int], int], settings: DataSettings) -> str:
        folder = tmp_path / name
        if not folder.exists():
            write_parquet(folder, group, Value("int64"))
        return fingerprint(open_images(str(folder), settings), image_content)

    ones, others = ("a", lambda a, b: 2 * a + b), ("b", lambda a, b: 2 * b + a)
    assert mark(*ones, GROUPED) != mark(*others, GROUPED)
    assert mark(*ones, DataSettings()) == mark(*others, DataSettings())


def test_splits_that_are_taken_from_train_hold_each_class_and_group_in_proportion() -> None:
    labels, groups = np.repeat([0, 0, 1, 1], [30, 10, 10, 30]), np.repeat([0, 1, 0, 1], [30, 10, 10, 30])
    features = Features({"label": ClassLabel(names=["a", "b"]), "group": ClassLabel(names=["dry", "wet"])})
    official = {"train": Dataset.from_dict({"label": labels, "group": groups}, features=features)}
    settings = DataSettings(group_column="group", test_share=0.2, validation_share=0.25, train_rows=24)
    parts = split(official, settings, 1)
    for data, counts in ((parts.test, [6, 2, 2, 6]), (parts.validation, [6, 2, 2, 6]), (parts.train, [9, 3, 3, 9])):
        assert np.bincount(2 * np.array(data["label"]) + np.array(data["group"])).tolist() == counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_recipe_to_report(cli: Cli, tmp_path: Path, vit: Path, layout: str) -> None:
    write, published = LAYOUTS[layout]
    data, out = write(tmp_path / "data"), tmp_path / "run"
    options = ["train.epochs=2", "train.batch_size=4", "adapter.r=2", "--model", vit, "--dataset", data]
    code, _, err = cli("train", f"spurious/{layout}", *options, "--method", "lora", "--out", out, "--quiet")
    assert code == 0, err
    record = json.loads((out / "run.json").read_text())

    halves = len(published.groups) // 4
    dataset = record["dataset"]
    assert dataset["groups"] == {
        part: dict(zip(published.groups, counts * halves, strict=True)) for part, counts in ROWS.items()
    }
    assert dataset["average"] == load_recipe(f"spurious/{layout}", [], {"dataset": "d"}).data.average
    assert dataset["note"].startswith(f"not the published {published.name}: rows per group are train 6/2/2/6")
    assert f"fvae-lora: warning: dataset {data}: {dataset['note']}\n" in err

    assert record["metric"] == {"name": "worst_group_accuracy", "greater_is_better": True}
    names = {f"accuracy_group_{name}" for name in published.groups}
    expected = {"loss", "accuracy", "worst_group_accuracy", "gap", *names}
    assert record["metrics"]["test"].keys() == expected
    assert record["metrics"]["validation"].keys() == expected | {"best_epoch"}
    for part in ("validation", "test"):
        scores = record["metrics"][part]
        by_group = {name: scores[f"accuracy_group_{name}"] for name in published.groups}
        assert scores["worst_group_accuracy"] == min(by_group.values())
        assert scores["gap"] == pytest.approx(scores["accuracy"] - min(by_group.values()))
        weights = dataset["groups"]["train" if dataset["average"] == "train-weighted" else part]
        total = sum(weights.values())
        assert scores["accuracy"] == pytest.approx(sum(weights[g] * by_group[g] for g in weights) / total)

    code, shown, err = cli("evaluate", out, "--dataset", data)
    assert code == 0, err
    assert len(shown.splitlines()) == len(expected)
    for line in shown.splitlines():
        name, again, recorded = re.fullmatch(r"(.+?) +(\d\.\d{6})  recorded (\d\.\d{6})", line).groups()  # type: ignore[union-attr]
        assert again == recorded == f"{record['metrics']['test'][name]:.6f}"
    code, _, err = cli("report", tmp_path)
    assert code == 0, err
    table = (tmp_path / "report.md").read_text()
    for name in ("worst_group_accuracy", "accuracy", "gap", *names):
        assert f"| {name.replace('_', ' ')} % |" in table
    assert f"Warning: {dataset['note']}." in table
    assert ("(train-weighted)" in table) == (dataset["average"] == "train-weighted")


@pytest.mark.parametrize("select_by", ["accuracy", "worst_group_accuracy"])
def test_the_epoch_is_selected_by_the_score_that_the_recipe_names(
    cli: Cli, tmp_path: Path, vit: Path, parquet: Path, select_by: str
) -> None:
    options = ["train.epochs=6", "train.batch_size=4", "train.learning_rate=0.02", f"data.select_by={select_by}"]
    options += ["image.augmentation=[]"]
    where = ["--method", "full", "--model", vit, "--dataset", parquet, "--out", tmp_path / "run", "--quiet"]
    assert cli("train", "spurious/default", *options, *where)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    events = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    validation = [event for event in events if event["event"] == "validation"]
    scores = [event[select_by] for event in validation]
    assert record["metric"]["name"] == select_by
    assert record["metrics"]["validation"]["best_epoch"] == scores.index(max(scores)) + 1
    assert len(set(scores)) > 1
    assert record["dataset"]["note"] is None


def test_a_group_column_is_not_used_unless_it_is_asked_for(cli: Cli, tmp_path: Path, vit: Path, parquet: Path) -> None:
    where = ["--method", "lora", "--model", vit, "--dataset", parquet, "--out", tmp_path / "run", "--quiet"]
    assert cli("train", "image/default", "train.epochs=1", *where)[0] == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["metrics"]["test"].keys() == {"loss", "accuracy"}
    assert not {"groups", "average", "note"} & record["dataset"].keys()


def spoil(file: str, pattern: str, replacement: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        changed = re.sub(pattern, replacement, text, count=1, flags=re.MULTILINE)
        assert changed != text
        (folder / file).write_text(changed)

    return change


def remove(*files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in files:
            (folder / name).unlink()

    return change


ATTRIBUTES, PARTITIONS = "list_attr_celeba.txt", "list_eval_partition.txt"


@pytest.mark.parametrize(
    ("layout", "change", "says"),
    [
        ("waterbirds", remove("0.Bird/2.png"), "metadata.csv, line 4: no image 0.Bird/2.png"),
        ("waterbirds", spoil("metadata.csv", r"^(1,.*?,0),0,", r"\1,3,"), "line 3: split is '3'; allowed are 0, 1, 2"),
        ("waterbirds", spoil("metadata.csv", r"^(1,.*?png),0,", r"\1,x,"), "metadata.csv, line 3: y is 'x'; allowed"),
        ("waterbirds", spoil("metadata.csv", r"^(1,.*?png),0,.*", r"\1"), "metadata.csv, line 3: split is None"),
        (
            "waterbirds",
            spoil("metadata.csv", r"(?s)(6,0.Bird/6.png,0),0,(.*7.png,0),0,", r"\1,2,\2,2,"),
            "no row of group landbird/water in split train",
        ),
        ("celeba", remove("img_align_celeba/000005.png"), f"{ATTRIBUTES}, line 8: no image 000005.png"),
        ("celeba", spoil(ATTRIBUTES, r"^000033.*\n", ""), f"{ATTRIBUTES}: 33 rows, and {PARTITIONS} has 34"),
        (
            "celeba",
            spoil(ATTRIBUTES, "^000004.png -1", "000004.png"),
            f"{ATTRIBUTES}, line 7: 2 attributes; expected 3",
        ),
        ("celeba", spoil(ATTRIBUTES, "^000004.png", "000044.png"), f"line 7: 000044.png, and {PARTITIONS} has 000004"),
        ("celeba", spoil(ATTRIBUTES, "Male", "Female"), f"{ATTRIBUTES}: no attribute Male"),
        ("celeba", spoil(ATTRIBUTES, "-1$", "0"), f"{ATTRIBUTES}, line 3: Male is '0'; allowed are -1, 1"),
        ("celeba", spoil(PARTITIONS, "^000003.png 0", "000003.png 3"), f"{PARTITIONS}, line 4: partition is '3'"),
        ("celeba", spoil(PARTITIONS, "^000003.png 0", "000003.png"), f"{PARTITIONS}, line 4: partition is ''"),
        (
            "spuco-animals",
            remove(*(f"spuco_dogs/val/big_dogs/indoor/{n}.png" for n in (20, 21))),
            "no row of group big_dogs/indoor in split validation",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_in_one_line(
    cli: Cli, tmp_path: Path, vit: Path, layout: str, change: Callable[[Path], None], says: str
) -> None:
    data = LAYOUTS[layout][0](tmp_path / "data")
    change(data)
    code, _, err = cli(
        "train", f"spurious/{layout}", "--model", vit, "--dataset", data, "--out", tmp_path / "run", "--quiet"
    )
    assert code == 2, err
    assert err.startswith("fvae-lora: ")
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("group", "feature", "says"),
    [
        (lambda a, b: None if a > b else 0, Value("int64"), "p/test-0.parquet, row 6: no group"),
        (
            lambda a, b: [a, b],
            [Value("int64")],
            r"test-0.parquet, row 1: group is \[0, 0\]; expected a name",
        ),
        (lambda a, b: a / 2, Value("float64"), "the groups in split test are neither integers, strings nor classes"),
        (lambda a, b: a, ClassLabel(names=["x", "y", "z"]), "no row of group z in split train"),
    ],
)
def test_groups_that_cannot_be_used(tmp_path: Path, group: Callable[[int, int], Any], feature: Any, says: str) -> None:
    folder = write_parquet(tmp_path / "p", group, feature)
    with pytest.raises(UserError, match=says):
        split(open_images(str(folder), GROUPED), GROUPED, 1)


def test_a_group_that_only_test_has_is_empty_in_train(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "p", lambda a, b: a, Value("int64"), parts=("train", "validation"))
    write_parquet(tmp_path / "q", lambda a, b: 2 * a, Value("int64"), parts=("test",))
    (tmp_path / "q" / "test-0.parquet").rename(folder / "test-0.parquet")
    with pytest.raises(UserError, match="no row of group 2 in split train"):
        split(open_images(str(folder), GROUPED), GROUPED, 1)


def test_a_group_that_is_declared_before_the_label_is_not_taken_for_it(tmp_path: Path) -> None:
    declared = {
        "group": ClassLabel(names=["dry", "wet"]),
        "text": Value("string"),
        "label": ClassLabel(names=["a", "b"]),
    }
    columns = {"group": [0, 1, 1], "text": ["x", "y", "z"], "label": [1, 0, 1]}
    Dataset.from_dict(columns, features=Features(declared)).to_parquet(tmp_path / "train.parquet")
    opened = open_texts(str(tmp_path), GROUPED, TextSettings())["train"]
    assert (opened["label"][:], opened["group"][:]) == ([1, 0, 1], [0, 1, 1])


def test_a_column_that_is_not_there(parquet: Path) -> None:
    with pytest.raises(UserError, match=r"no group column in split test; set data.group_column to one of image, label"):
        open_images(str(parquet), DataSettings(group_column="place"))


@pytest.mark.parametrize("override", ["data.average=train-weighted", "data.select_by=worst_group_accuracy"])
def test_scores_of_groups_need_groups(override: str) -> None:
    with pytest.raises(UserError, match=r"data\.(average|select_by): input needs data.group_column, got"):
        load_recipe("image/demo", [override])
