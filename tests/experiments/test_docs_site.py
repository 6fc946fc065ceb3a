"""Every code block of the site is run at a tiny size, or checked for its names; what the pages quote is in the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from transformers import ViTConfig, ViTImageProcessor, ViTModel

import fvae_lora
from arguments import later_wins
from chatter import CHAT, make_llama, make_tokenizer, write_questions
from colours import SIDE, write_pictures
from fvae_lora_experiments.cli import app
from fvae_lora_experiments.methods import METHODS
from fvae_lora_experiments.recipe import load_recipe, shipped_recipes, shipped_studies
from fvae_lora_experiments.sweep.plan import parse_list, parse_seeds, parse_values
from sentences import sentences, write_encoder
from spoken_words import recorded, said, whisper, write_recordings
from timit_corpus import hum, wav2vec2, write_corpus
from tiny import batch_for, tiny_bert, tiny_llama

Cli = Callable[..., tuple[int, str, str]]
PROJECT = Path(__file__).parents[2]
BUILD = runpy.run_path(str(PROJECT / "docs" / "site" / "build.py"))
PAGES = sorted([*BUILD["pages"](), "README.md"])
OWN_PAGES = [page for page in PAGES if page.startswith("docs/")]
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)

VIT, LLAMA = "google/vit-base-patch16-224-in21k", "HuggingFaceTB/SmolLM2-135M-Instruct"
WHISPER, WAV2VEC2 = "openai/whisper-tiny.en", "facebook/wav2vec2-large"
SMALLER = {"num_train_epochs=30": "num_train_epochs=1", "(50_000,)": "(5_000,)"}
"""What makes the Python of a page take a second."""

EXTRA = {
    "text/default": ("text.max_length=20",),
    "speech/whisper": ("speech.max_new_tokens=8", "--model", WHISPER),
    "speech/timit": ("--model", WAV2VEC2),
    "commonsense/default": ("commonsense.max_new_tokens=4",),
}
"""What tiny models need."""

TINY_RUN = ("train.epochs=1", "train.batch_size=8", "adapter.r=4", "--quiet")


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """The blocks of a page in some languages: what each needs, and its code."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    return [(found["needs"] or "", found["code"]) for found in BLOCK.finditer(text) if found["language"] in languages]


def pages_with(*languages: str) -> list[str]:
    return [page for page in PAGES if blocks(page, *languages)]


def commands(code: str) -> list[list[str]]:
    """The command lines of this package in a shell script, without the program's name."""
    found = []
    for name, value in re.findall(r"(?:^|(?<= ))([A-Z]+)=(\S+)", code, re.M):
        code = code.replace(f"${name}", value)
    for line in code.replace("\\\n", " ").splitlines():
        if at := re.search(r"(?:^ *|--no-python |--wrap +\")fvae-lora (.+)$", line.split(" #")[0]):
            quoted = line[: at.start(1)].count('"') % 2
            words = shlex.split(at[1].rstrip('"') if quoted else at[1])
            found.append([word for word in words if word != "$@"])
    return found


def all_commands(page: str) -> list[list[str]]:
    return [words for _, code in blocks(page, "sh", "bash") for words in commands(code)]


def write_vit(folder: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(image_size=SIDE, patch_size=4, **shape)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def write_llama(folder: Path) -> None:
    make_llama(folder, hidden_size=64, intermediate_size=64)
    make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT)


STAND_INS: dict[str, Callable[[Path], Any]] = {
    VIT: write_vit,
    LLAMA: write_llama,
    "FacebookAI/roberta-base": write_encoder,
    WHISPER: whisper,
    "openai/whisper-small": partial(whisper, multilingual=True),
    WAV2VEC2: wav2vec2,
}
"""Tiny models in the place of those that the pages name."""


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model for the name of a real one; every other text stays."""
    folder = tmp_path_factory.mktemp("stand-ins")

    def place(name: str) -> str:
        if name not in STAND_INS:
            return name
        found = folder / name
        if not found.exists():
            STAND_INS[name](found)
        return str(found)

    return place


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the data that the pages speak of."""
    write_pictures(tmp_path / "flowers", 16)
    write_pictures(tmp_path / "new", 1, seed=1)
    (tmp_path / "new-pictures").mkdir()
    for i, picture in enumerate(sorted((tmp_path / "new").rglob("*.png")), 1):
        shutil.copy(picture, tmp_path / "new-pictures" / f"{i}.png")
    shutil.copy(tmp_path / "new-pictures" / "1.png", tmp_path / "new-pictures" / "1.jpg")
    write_pictures(tmp_path / "more", 30)
    (tmp_path / "birds" / "pictures").mkdir(parents=True)
    table = ["file_name,label,place"]
    for i, picture in enumerate(sorted((tmp_path / "more").rglob("*.png"))):
        shutil.copy(picture, tmp_path / "birds" / "pictures" / f"{i}.png")
        table.append(f"pictures/{i}.png,{picture.parent.name},{'land' if i % 2 else 'water'}")
    (tmp_path / "birds" / "metadata.csv").write_text("\n".join(table) + "\n")
    (tmp_path / "reviews").mkdir()
    for seed, split in enumerate(("train", "test")):
        texts = [{"text": t, "label": label} for label in (0, 1) for t in sentences(label, 12, seed)]
        (tmp_path / "reviews" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (tmp_path / "new-reviews.csv").write_text("text\n" + "\n".join(sentences(0, 2, 7)) + "\n")
    shutil.copytree(PROJECT / "tests/data/golden/tiny_bert/adapter", tmp_path / "reference-adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_questions_and_speech(folder: Path) -> None:
    """Data of tasks that only their own pages speak of."""
    write_questions(folder / "exam")
    asked = {"question": "Is it so?", "choices": ["yes", "no"]}
    (folder / "new-questions.jsonl").write_text(json.dumps(asked) + "\n")
    write_recordings(folder / "prompts", {"train": said("yes", "no") * 10, "test": said("yes", "no")})
    (folder / "new-recordings").mkdir()
    (folder / "new-recordings" / "1.wav").write_bytes(recorded("yes")["bytes"])
    write_corpus(folder / "timit", hum)


def given(page: str) -> dict[str, Any]:
    """What a page takes as given: a base model, batches, rows."""
    base = tiny_bert()
    if page == "docs/migration.md":
        base = base.from_pretrained(PROJECT / "tests/data/golden/tiny_bert/base_model")
    batch = {
        "input_ids": batch_for(base)["input_ids"] % base.config.vocab_size,
        "attention_mask": torch.ones(4, 6).long(),
    }
    batch["labels"] = torch.arange(4) % base.config.num_labels
    names: dict[str, Any] = {"base": base, "batch": batch, "batches": [batch, batch]}
    names |= {"rows": [{name: value[i] for name, value in batch.items()} for i in range(4)] * 2}
    return names | {"training_batches": [batch, batch], "held_out_batches": [batch]}


def run_python(page: str, wanted: Callable[[str], bool], stand_in: Callable[[str], str]) -> None:
    """Run the blocks of a page one after the other; each with a fresh base model unless the page made one."""
    names: dict[str, Any] = {"__name__": "__main__"}
    fresh = None
    for needs, code in blocks(page, "python"):
        if not wanted(needs):
            continue
        for name in STAND_INS:
            code = code.replace(name, stand_in(name)) if name in code else code
        for usual, smaller in SMALLER.items():
            code = code.replace(usual, smaller)
        if names.get("base") is fresh:
            names |= given(page)
            fresh = names["base"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, page, "exec"), names)


def modules_of(code: str) -> Iterator[tuple[str, list[str]]]:
    """What a block imports: modules, and the names from each."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_has_names_that_exist(page: str) -> None:
    for _, code in blocks(page, "python"):
        for module, names in modules_of(code):
            for name in names if is_installed(module) else ():
                assert hasattr(importlib.import_module(module), name), f"{page}: {module} has no {name}"
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in fvae_lora.__all__:
                parameters = inspect.signature(getattr(fvae_lora, node.func.id)).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - parameters.keys()
                    assert not unknown, f"{page}: {node.func.id} has no {unknown}"


IN_PYTHON = [page for page in pages_with("python") if page in OWN_PAGES and page != "docs/preference-training.md"]
AFTER_COMMANDS = "the run of the commands above"


@pytest.mark.parametrize("page", IN_PYTHON)
def test_the_python_of_a_page_runs(page: str, stand_in: Callable[[str], str], workshop: Path) -> None:
    for module in {module for _, code in blocks(page, "python") for module, _ in modules_of(code)}:
        if not is_installed(module):
            pytest.skip(f"{module} is not installed")
    if "bitsandbytes" in " ".join(needs for needs, _ in blocks(page, "python")):
        pytest.importorskip("bitsandbytes")
    run_python(page, lambda needs: needs != AFTER_COMMANDS, stand_in)


def click_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that a command line names, and its arguments."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", [page for page in PAGES if all_commands(page)])
def test_the_commands_of_a_page_are_ones_that_there_are(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("FVAE_LORA_DATA_ROOT", ".")  # --data-root sets it, and it shall not stay
    for words in all_commands(page):
        command, arguments = click_command(words)
        assert command.name == "recipes" or not hasattr(command, "commands"), f"{page}: no command {words[0]}"
        there = [
            "." if before == "--data-root" else word for before, word in zip(["", *arguments], arguments, strict=False)
        ]
        values = command.make_context(command.name, there).params
        for option in ("method", "methods"):
            for method in parse_list(option, values.get(option) or "fvae-lora"):
                assert method in METHODS, f"{page}: {words}"
        if values.get("seeds"):
            parse_seeds("--seeds", values["seeds"])
        for option in ("grid", "vary"):
            for key, tried in parse_values(f"--{option}", values.get(option) or []).items():
                for value in tried:
                    load_recipe("image/default", [f"{key}={json.dumps(value)}"], {"model": "any", "dataset": "any"})
        for name in (values.get("recipe") or "").split(","):
            if name in shipped_recipes() or (PROJECT / name).is_file():
                load_recipe(name, values.get("overrides") or [], {"model": "any", "dataset": "any"})
            else:
                made_by_a_command = name.endswith("best.yaml") or "$" in name
                assert not name or name in shipped_studies() or made_by_a_command, f"{page}: no recipe {name}"


@pytest.mark.parametrize("page", OWN_PAGES)
def test_the_commands_within_sentences_have_options_that_there_are(page: str) -> None:
    for span in re.findall(r"`fvae-lora ([^`]+)`", (PROJECT / page).read_text(encoding="utf-8")):
        command, words = click_command(shlex.split(span))
        assert words != shlex.split(span) or span.startswith("--"), f"{page}: no command {span}"
        known = {name for parameter in command.params for name in parameter.opts}
        unknown = {word for word in words if word.startswith("--")} - known - {"--version"}
        assert not unknown, f"{page}: {span}"


PROVIDED = (
    "",
    "the network, for the pretrained model, and better a GPU",
    "the network, for the pretrained model, and a GPU",
    "recordings, the network for the pretrained model, and better a GPU",
    "TIMIT, the network for the pretrained model, and a GPU",
    "the run of the commands above",
    "a finished run in runs/flowers",
)
"""What a block may need that the test below has, at a tiny size; a block that needs something else is not run."""

GUIDES = ("images", "texts", "questions", "speech", "groups", "comparing", "uncertainty", "export")
RUN_PAGES = [
    *("docs/start.md", "docs/migration.md", "docs/inspect.md", "docs/paper.md"),
    *(f"docs/guides/{name}.md" for name in GUIDES),
]


def blocks_to_run(page: str) -> list[list[list[str]]]:
    return [commands(code) for needs, code in blocks(page, "sh") if needs in PROVIDED and commands(code)]


def test_a_block_of_commands_that_is_not_run_says_what_it_needs() -> None:
    have_their_own_tests = {"docs/paper.md", "docs/reproduce.md"}
    assert {page for page in OWN_PAGES if blocks_to_run(page)} <= {*RUN_PAGES, *have_their_own_tests}


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_commands_of_a_page_run(page: str, stand_in: Callable[[str], str], workshop: Path, cli: Cli) -> None:
    base_of_reference = str(PROJECT / "tests/data/golden/tiny_bert/base_model")
    known = {VIT: base_of_reference} if page == "docs/migration.md" else {}
    if page in ("docs/inspect.md", "docs/guides/uncertainty.md", "docs/guides/export.md"):
        made = ("train", "image/default", "--model", stand_in(VIT), "--dataset", "flowers", "--out", "runs/flowers")
        assert cli(*made, *TINY_RUN)[0] == 0
    if page in ("docs/guides/questions.md", "docs/guides/speech.md"):
        write_questions_and_speech(workshop)
    for block in blocks_to_run(page):
        for words in block:
            more: tuple[str, ...] = ()
            if words[0] == "train":
                words, more = [*words[:2], *EXTRA.get(words[1], ()), *words[2:]], TINY_RUN
            if words[0] == "export" and "lora" in words:
                more = ("--max-error", "10")  # fitted to a handful of pictures
            code, _, error = cli(*later_wins([known.get(word) or stand_in(word) for word in (*words, *more)]))
            assert code == 0, f"{' '.join(words)}: {error}"
    run_python(page, lambda needs: needs == AFTER_COMMANDS, stand_in)


@pytest.mark.slow
def test_the_python_for_trl_runs(
    stand_in: Callable[[str], str], workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl")
    example = runpy.run_path(str(PROJECT / "examples" / "trl_sft.py"))
    rows = [{"prompt": "one two", "chosen": " three", "rejected": " nine"}] * 4
    own = {"base": tiny_llama(), "pairs": Dataset.from_list(rows), "tokenizer": example["tokenizer"]()}
    monkeypatch.setitem(globals(), "given", lambda _: own)
    monkeypatch.setattr(trl, "DPOConfig", partial(trl.DPOConfig, bf16=False, max_steps=1, report_to="none"))
    run_python("docs/preference-training.md", lambda _: True, stand_in)
    assert (workshop / "out").is_dir()


def test_the_data_of_a_page_is_readable() -> None:
    found = [code for page in OWN_PAGES for _, code in blocks(page, "json")]
    assert found
    for code in found:
        assert all(map(json.loads, code.splitlines()))


def templates() -> list[str]:
    """Every text in the code with a zero byte for each value that is put into it."""
    found = []
    for file in (PROJECT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_that_the_page_explains_are_in_the_code() -> None:
    text = (PROJECT / "docs" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(messages) > 50
    known = templates()
    for message in messages:
        parts = [re.escape(part) for part in message.split("…") if part]
        pattern = re.compile(".*".join(parts), re.S)
        assert any(pattern.search(template) for template in known), message


def test_the_lines_that_the_page_of_the_method_quotes_are_in_the_functions_it_names() -> None:
    text = (PROJECT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+? \| `(.+?)` \| \[\S+\]\(\.\./(\S+?)#(\S+?)\) \|$", text, re.M)
    assert len(rows) > 12
    for code, file, function in rows:
        where = BUILD["definition"](PROJECT / file, function)
        lines = (PROJECT / file).read_text(encoding="utf-8").splitlines()
        body = "\n".join(lines[where.lineno - 1 : where.end_lineno])
        assert code in body, f"{file}: {function}: {code}"


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: fvae_lora\.(?:trainer\.)?(\w+)$", (PROJECT / "docs/api.md").read_text(), re.M)
    assert sorted(shown) == sorted(fvae_lora.__all__)


def test_every_link_of_a_page_leads_somewhere(tmp_path: Path) -> None:
    """Also those to functions of the code; links to places within pages are checked where the site is built."""
    assembly = BUILD["Assembly"](tmp_path, formula=lambda text, **_: text)
    assembly.write()
    assert (tmp_path / "index.md").is_file()


def test_a_site_that_links_nowhere_or_fetches_from_elsewhere_is_refused(tmp_path: Path) -> None:
    good = '<h1 id="top">x</h1><a href="#top">a</a><a href="b.html#there">b</a><a href="https://arxiv.org">c</a>'
    (tmp_path / "a.html").write_text(good + '<img src="data:image/png;base64,AA"><link rel="icon" href="b.html">')
    (tmp_path / "b.html").write_text('<p id="there"><a href="a.html">a</a>')
    assert BUILD["problems"](tmp_path) == []
    bad = (
        '<a href="c.html">',
        '<a href="b.html#nowhere">',
        '<script src="https://x.org/x.js"></script>',
        '<img src="//x.org">',
    )
    for html in bad:
        (tmp_path / "a.html").write_text(html)
        assert len(BUILD["problems"](tmp_path)) == 1, html
    (tmp_path / "a.html").write_text(good)
    (tmp_path / "x.css").write_text("@font-face { src: url(https://x.org/font.woff2) }")
    assert BUILD["problems"](tmp_path) == ["x.css: fetches https://x.org/font.woff2"]


def test_the_navigation_has_every_page_of_the_docs() -> None:
    listed = re.findall(r'= "(\S+\.md)"', (PROJECT / "docs/site/zensical.toml").read_text())
    assert {BUILD["pages"]()[page] for page in OWN_PAGES} - set(listed) == set()
