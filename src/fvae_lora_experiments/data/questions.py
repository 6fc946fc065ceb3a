"""Data sets of multiple-choice questions, as the instructions of commonsense_170k or as plain questions.

An instruction row is `{"instruction", "input", "output", "answer"}`; its instruction ends with the answers to choose
from, `Answer format: answer1/answer2/answer3`, one of which is `answer` and stands in `output`. A plain row is
`{"question", "choices", "answer"}` with the number of the right choice, from 0; it is worded as commonsense_170k words
its science questions. Either way a question becomes

    set           its test set; empty in train and validation
    instruction   the question with its options
    input         more of it, or empty
    options       the names of its options: answer1, answer2, ...
    answers       for each option the whole text of that answer: "the correct answer is answer1", ...
    answer        the number of the right option
    where         its file and line or row, for messages
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset, Features, List, Value, concatenate_datasets

from fvae_lora_experiments.data.files import (
    DESCRIPTIONS,
    FILLER_WORDS,
    SPLIT_NAMES,
    Notes,
    enumerate_names,
    has_suffix,
    refuse_duplicate_folders,
    split_of_folder,
    splits_of_file,
    stem,
    visible_files,
    words,
)
from fvae_lora_experiments.data.hub import fetch, usual_splits
from fvae_lora_experiments.data.json_rows import read_json_rows
from fvae_lora_experiments.errors import NoSuchDataError, UserError, first_line
from fvae_lora_experiments.places import is_local, local_copy

TEST_SETS = {
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "siqa",
    "social_i_qa": "siqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc-e": "arc-e",
    "arc-easy": "arc-e",
    "arc-c": "arc-c",
    "arc-challenge": "arc-c",
    "obqa": "obqa",
    "openbookqa": "obqa",
}
"""The customary test sets, by their names in file names (lower case)."""

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
FEATURES = Features(
    {
        "set": Value("string"),
        "instruction": Value("string"),
        "input": Value("string"),
        "options": List(Value("string")),
        "answers": List(Value("string")),
        "answer": Value("int64"),
        "where": Value("string"),
    }
)
ANSWER_WORDS = ("answer", "solution", "option", "ending")
KNOWN_FORMATS = "answer1/answer2/..., solution1/..., option1/..., ending1/... and true/false"
_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*\Z")

Rows = Iterable[tuple[str, Any]]
"""Rows as they were read, each after where it stands, for messages."""


def open_questions(
    name: str, config: str | None, test_sets: Sequence[str] | None, notes: Notes | None = None
) -> dict[str, Dataset]:
    """The official splits of a data set of questions: `train`, and `validation` and `test` where they exist.

    A single file is training data. In a folder, the path of a file says what it holds: `ARC-Easy.test.jsonl.gz`,
    `piqa/test.json`, `commonsense_170k.json`, `test-00000-of-00001.parquet`. Without the name of a split it is
    training data, unless it is named after one of `TEST_SETS`. All training data are joined; the test sets follow one
    another in `test`. A split on the hub may be named after a test set.

    Args:
        name: a file, a folder, or a name on the hub.
        config: the configuration of a data set on the hub.
        test_sets: the test sets to use, in this order; None for all.
        notes: gets where the splits come from, and what is left out.

    Raises:
        UserError: no such data; files whose split is unclear; a row that cannot be used; a test set that does not
            exist.
    """
    place = Path(name) if is_local(name) else local_copy(name, config)
    notes = Notes() if notes is None else notes
    tables = _from_disk(place, notes) if place else _from_hub(name, config, notes)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for split, test_set, table in tables:
        read = found.setdefault((split, test_set), [])
        read += [{"set": test_set} | question(row, where) for where, row in table]
    for part, rows in found.items():
        if not rows:
            raise UserError(f"dataset {name}: {_title(part)} is empty")
    parts = {part: Dataset.from_list(rows, features=FEATURES) for part, rows in found.items()}
    splits = {split: parts[split, ""] for split in ("train", "validation") if (split, "") in parts}
    if "train" not in splits:
        raise UserError(f"dataset {name}: no training data; it has {', '.join(map(_title, parts)) or 'nothing'}")
    tests = {test_set: rows for (split, test_set), rows in parts.items() if split == "test"}
    wanted = tests if test_sets is None else [TEST_SETS.get(test_set.lower(), test_set) for test_set in test_sets]
    for test_set in wanted:
        if test_set not in tests:
            raise UserError(f"dataset {name}: no test set {test_set}; it has {', '.join(tests) or 'none'}")
    for test_set in tests.keys() - set(wanted):
        notes.leave_out("not one of commonsense.test_sets", test_set, len(tests[test_set]))
    if wanted:
        splits["test"] = concatenate_datasets([tests[test_set] for test_set in wanted])
    return splits


def _title(part: tuple[str, str]) -> str:
    split, test_set = part
    return f"test set {test_set}" if test_set else split


def _from_disk(path: Path, notes: Notes) -> Iterator[tuple[str, str, Rows]]:
    if path.is_file():
        notes.sources["train"] = path.name
        yield "train", "", _read(path)
    elif path.is_dir():
        files = [
            p for p in visible_files(path, notes) if has_suffix(p, SUFFIXES) and p.name.lower() not in DESCRIPTIONS
        ]
        for file in set(visible_files(path, Notes())) - set(files):
            notes.leave_out("not a table", file.suffix.lower() or file.name)
        refuse_duplicate_folders(path, files)
        found = [(file, *_part_of_file(path, file)) for file in files]
        unnamed = {re.sub(r"\d+", "", stem(file.name)): file.name for file, split, _ in found if split is None}
        if len(unnamed) > 1:
            shown = enumerate_names(list(unnamed.values()))
            raise UserError(
                f"dataset {path}: {shown}: which is train, validation or test? Say so in their names, or put them into "
                "a folder train"
            )
        for split in ("train", "validation", "test"):
            if of_split := [str(f.relative_to(path)) for f, its, _ in found if (its or "train") == split]:
                notes.sources[split] = enumerate_names(of_split, of="files")
        for file, its, test_set in found:
            yield its or "train", test_set, _read(file)
    else:
        raise NoSuchDataError(f"dataset {path}: no such file or folder")


def _part_of_file(folder: Path, file: Path) -> tuple[str | None, str]:
    """The split, if there is one, and the test set in a file's path; its name takes precedence over its folders'."""
    inside = file.relative_to(folder)
    parents = [parent.name for parent in inside.parents if parent.name]
    named_splits = splits_of_file(inside.name)
    if len(named_splits) > 1:
        raise UserError(
            f"dataset {folder}: {inside}: its name gives several splits ({', '.join(sorted(named_splits))}); rename it"
        )
    sets = [TEST_SETS[word] for word in map(str.lower, [*_name_parts(inside.name), *parents]) if word in TEST_SETS]
    split = next(filter(None, [*named_splits, *map(split_of_folder, parents)]), "test" if sets else None)
    if split != "test":
        return split, ""
    own = inside.name.partition(".")[0]
    rest = [
        piece
        for piece in re.split(r"[-_]", own)
        if not FILLER_WORDS.union(SPLIT_NAMES, ["of"]).issuperset(words(piece))
    ]
    return split, next(iter(sets), ("-".join(rest) or "test") if splits_of_file(own) else own)


def _name_parts(name: str) -> list[str]:
    """Parts that may be a test set's name: `ARC-Easy.test.jsonl.gz` has ARC-Easy, `piqa_test.json` piqa."""
    return [*name.split("."), *re.split(r"[._]", stem(name)), stem(name).split("-")[0]]


def _from_hub(name: str, config: str | None, notes: Notes) -> Iterator[tuple[str, str, Rows]]:
    fetched = fetch(name, config, _parts_on_hub, notes)
    for own, (split, test_set) in _parts_on_hub(fetched).items():
        if own.lower() not in TEST_SETS:
            notes.sources[split] = f"split {own} on the hub"
        yield split, test_set, ((f"dataset {name}, split {own}, row {n}", row) for n, row in enumerate(fetched[own], 1))


def _parts_on_hub(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """The split and test set that each split on the hub is, by its name there; without those that are not used."""
    usual = usual_splits([name for name in names if name.lower() not in TEST_SETS])
    parts = {name: (split, "test" if split == "test" else "") for name, split in usual.items()}
    parts |= {name: ("test", TEST_SETS[name.lower()]) for name in names if name.lower() in TEST_SETS}
    return {name: parts[name] for name in names if name in parts}


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() != ".parquet":
        yield from read_json_rows(file)
        return
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from error
    yield from ((f"{file}, row {n}", row) for n, row in enumerate(rows, 1))


def question(row: Any, where: str) -> dict[str, Any]:
    """The question in a row of either format, without its `set`.

    Raises:
        UserError: a key that is missing or has an unusable value; an unknown answer format.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected keys and values (instruction, output, answer), got {row!r:.40}")
    return _multiple_choice(row, where) if "choices" in row else _instruction(row, where)


def _instruction(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    instruction, output, answer = (_text(row, key, where) for key in ("instruction", "output", "answer"))
    found = _ANSWER_FORMAT.search(instruction)
    options = found.group(1).split("/") if found else []
    if not _is_known(options):
        said = f"answer format {found.group(1)!r:.60} is not known" if found else "the instruction has no answer format"
        raise UserError(f"{where}: {said}; allowed at its end is `Answer format: ...` with {KNOWN_FORMATS}")
    if answer not in options:
        raise UserError(f"{where}: answer {answer!r:.60} is not one of {', '.join(options)}")
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise UserError(f"{where}: input: expected text, got {more!r:.40}")
    before, named, after = output.rpartition(answer)
    if not named:
        raise UserError(f"{where}: output {output!r:.60} does not name the answer {answer}")
    return {
        "instruction": instruction,
        "input": more,
        "options": options,
        "answers": [f"{before}{option}{after}" for option in options],
        "answer": options.index(answer),
        "where": where,
    }


def _is_known(options: list[str]) -> bool:
    numbered = any(options == [f"{kind}{n}" for n in range(1, len(options) + 1)] for kind in ANSWER_WORDS)
    return len(options) > 1 and (numbered or options == ["true", "false"])


def _multiple_choice(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    asked, choices, answer = _text(row, "question", where), row["choices"], row.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"{where}: choices: expected at least two non-empty texts, got {choices!r:.60}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(f"{where}: answer: expected a choice's number, 0 to {len(choices) - 1}, got {answer!r:.40}")
    options = [f"answer{n}" for n in range(1, len(choices) + 1)]
    numbered = " ".join(f"Answer{n}: {choice}" for n, choice in enumerate(choices, 1))
    return {
        "instruction": f"Please choose the correct answer to the question: {asked}\n\n{numbered}\n\n"
        f"Answer format: {'/'.join(options)}",
        "input": "",
        "options": options,
        "answers": [f"the correct answer is {option}" for option in options],
        "answer": answer,
        "where": where,
    }


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise UserError(f"{where}: no {key}; its keys are {', '.join(map(str, row))[:80] or 'none'}")
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key}: expected a non-empty text, got {value!r:.40}")
    return value
