"""What the command line answers before torch is there: help, mistakes, recipes, reports, and what a shell completes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from fvae_lora_experiments.data.images import BUILT_IN
from fvae_lora_experiments.errors import did_you_mean
from fvae_lora_experiments.places import DATASETS

Cli = Callable[..., tuple[int, str, str]]

HEAVY = ("torch", "transformers", "peft", "fvae_lora", "sklearn", "optuna")
STUDY = Path(__file__).parents[2] / "studies" / "demo" / "runs.jsonl.gz"
RUNS = Path(__file__).parents[1] / "data" / "runs"
PROGRAM = """
import json, sys
from fvae_lora_experiments.cli import app
from fvae_lora_experiments.process import exit_code
for arguments in json.loads(sys.argv[1]):
    print("code:", exit_code(lambda: app(arguments, standalone_mode=False)), file=sys.stderr)
    print("modules:", *sys.modules, file=sys.stderr)
"""


def quickly(*lines: Sequence[str | Path], without: tuple[str, ...] = (*HEAVY, "datasets")) -> list[tuple[int, str]]:
    """For each command line its exit code and what it said of a mistake; nothing heavy may be imported by any."""
    program = [sys.executable, "-c", PROGRAM, json.dumps([[str(word) for word in line] for line in lines])]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *answers, _ = re.split(r"modules: (.*)\n", done.stderr)
    found = []
    for line, said, modules in zip(lines, answers[::2], answers[1::2], strict=True):
        assert not {*modules.split()} & {*without}, line
        message, _, code = said.partition("code: ")
        found.append((int(code), message))
    return found


def test_what_trains_nothing_answers_at_once(tmp_path: Path) -> None:
    answers = quickly(
        ["--help"],
        ["train", "--help"],
        ["compare", "--help"],
        ["predict", "--help"],
        ["inspect", "--help"],
        ["tune", "--help"],
        ["--version"],
        ["recipes"],
        ["recipes", "list"],
        ["recipes", "show", "--all"],
        ["recipes", "copy", "image/default", tmp_path / "mine.yaml"],
        ["report", STUDY, "--out", tmp_path],
        ["pack", RUNS, tmp_path / "mine.runs.jsonl.gz"],
        ["unpack", tmp_path / "mine.runs.jsonl.gz", tmp_path / "unpacked"],
    )
    assert answers == [(0, "")] * len(answers)


MISTAKES = {
    ("trian",): "No such command 'trian'. Did you mean 'train'?",
    ("train", "image/default", "--metod", "lora"): "No such option: --metod (Possible options: --method",
    ("train", "image/default", "--method", "lroa", "--model", "m", "--dataset", "d"): "; did you mean lora?",
    ("train", "image/eurosta"): "; did you mean image/eurosat?",
    ("train", "eurosat"): "; did you mean image/eurosat?",
    ("train", "image/eurosat", "train.epoch=3"): "; did you mean train.epochs?",
    ("train", "image/eurosat", "epochs=3"): "; did you mean train.epochs?",
    ("compare", "image/eurosat", "--methods", "lora,fvae_lora"): "; did you mean fvae-lora?",
    ("train", "image/default", "--model", "./no", "--dataset", "."): "model ./no: no such folder",
    ("train", "image/default", "--model", ".", "--dataset", "./no"): "dataset ./no: no such file or folder",
    ("compare", "image/default", "--model", ".", "--dataset", "./no"): "dataset ./no: no such file or folder",
    ("compare", "paper/imags"): "; did you mean paper/images?",
    ("compare", "paper/speech", "--out", "./no"): "timit is looked for as DIR/timit (--data-root DIR, or ",
    ("evaluate", "./no"): "no: no finished run",
    ("tune", "image/demo", "--trials", "0"): "--trials 0: expected at least 1",
    ("tune", "image/demo", "--knobs", "fvae.kl_weigth"): "; did you mean fvae.kl_weight?",
    ("tune", "image/default", "--model", ".", "--dataset", "./no"): "dataset ./no: no such file or folder",
    ("predict", "./no", "a.png"): "no: no finished run",
    ("inspect", "./no"): "no: neither a run with an adapter nor an adapter's folder",
    ("reproduce", "./no"): "./no: not a run (a folder with a run.json)",
    ("reproduce", f"{STUDY}:lora-sed1"): "; did you mean lora-seed1?",
}


def test_a_mistake_is_told_at_once_with_what_was_probably_meant() -> None:
    for (line, expected), (code, said) in zip(MISTAKES.items(), quickly(*MISTAKES), strict=True):
        assert code == 2, line
        assert re.fullmatch("fvae-lora: .*\n", said)
        assert expected in said


def test_what_is_wrong_with_the_data_is_told_before_torch_is_there(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,stars\ngood,1\nbad,0\n")
    (tmp_path / "runs").mkdir()
    table, folder = (("--model", tmp_path, "--dataset", tmp_path / name) for name in ("reviews.csv", "runs"))
    lines = (
        ["train", "text/default", *table],
        ["compare", "text/default", *table],
        ["train", "image/default", *folder],
    )
    of_train, of_compare, of_folder = quickly(*lines, without=HEAVY)
    assert of_train[0] == of_folder[0] == 2
    assert "no label column in split train; set data.label_column to one of text, stars" in of_train[1]
    assert of_compare == (2, of_train[1].replace("fvae-lora: ", "fvae-lora: fvae-lora-seed1: ", 1))
    assert "no images; it has nothing" in of_folder[1]


def test_a_finished_run_is_told_of_though_its_data_are_gone(cli: Cli, small: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.symlink_to(small[-1])
    train = ("train", "image/default", *small, "--dataset", data, "--method", "linear-probe", "--out", tmp_path / "r")
    assert cli(*train, "--quiet")[0] == 0
    data.unlink()
    assert cli(*train, "--quiet")[0] == 0


def test_the_version_is_the_packages(cli: Cli) -> None:
    assert cli("--version") == (0, f"fvae-lora {version('fvae-lora')}\n", "")


def test_names_that_are_always_there_are_those_that_can_be_opened() -> None:
    assert tuple(BUILT_IN) == DATASETS


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert did_you_mean("bananas", ["lora", "dora"]) == ""


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fvae-lora com", {"compare"}),
        ("fvae-lora train image/eu", {"image/eurosat", "image/eurosat-reference"}),
        ("fvae-lora train image/eurosat --method fvae", {"fvae-lora", "fvae-lora-reference", "fvae-no-elbo"}),
        ("fvae-lora compare image/eurosat --methods lora,pi", {"lora,pissa"}),
        ("fvae-lora train image/eurosat train.epo", {"train.epochs="}),
        ("fvae-lora train image/eurosat --met", {"--method"}),
    ],
)
def test_a_shell_is_told_what_a_word_may_become(line: str, offered: set[str]) -> None:
    words = line.split()
    asked = {"_FVAE_LORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    program = "import sys; sys.argv = ['fvae-lora']; from fvae_lora_experiments.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asked)
    assert set(done.stdout.split()) == offered, done.stderr


def test_completion_is_installed_for_bash(tmp_path: Path) -> None:
    shell = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    program = "import sys; sys.argv[0] = 'fvae-lora'; from fvae_lora_experiments.__main__ import main; main()"
    install = [sys.executable, "-c", program, "--install-completion", "bash"]
    done = subprocess.run(install, capture_output=True, text=True, env=os.environ | shell)
    assert done.returncode == 0, done.stderr
    asked = f"source {tmp_path}/.bashrc && complete -p fvae-lora"
    told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=os.environ | shell)
    assert "fvae" in told.stdout, told.stderr
