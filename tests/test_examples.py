"""The scripts in ``examples/`` run as they are, and show a loss that contains the ELBO."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "accelerate_loop": "accelerate",
    "export_and_serve": "fvae_lora",
    "images": "datasets",
    "lightning_module": "lightning",
    "text_with_groups": "datasets",
    "trl_sft": "trl",
    "uncertainty": "fvae_lora",
}


def run(name: str, *arguments: str) -> str:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    found = [float(number) for number in re.findall(pattern + r"[:=]? (-?\d+\.\d+)", text)]
    assert found, text
    return found


def test_every_example_is_run_and_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
    listed = re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(NEEDS)


@pytest.mark.slow
def test_images() -> None:
    output = run("images", "--tiny")
    assert numbers("images left out", output)[-1] > 0.9
    assert "logits: 0.0\n" in output


@pytest.mark.slow
def test_text_with_groups() -> None:
    output = run("text_with_groups", "--tiny")
    ours, loras = numbers("worst_group_accuracy", output)
    assert min(ours, loras) > 0.5


@pytest.mark.slow
def test_export_and_serve() -> None:
    output = run("export_and_serve")
    small, kept, folded = numbers("largest difference", output)
    assert small == 0
    assert kept < 1e-3 < folded
    assert min(numbers("same next token", output)) > 0.95


@pytest.mark.slow
def test_uncertainty() -> None:
    output = run("uncertainty")
    like_training, stripes = numbers("at most 0.05 for", output)
    assert like_training < 0.2 < stripes


@pytest.mark.slow
def test_accelerate_loop() -> None:
    output = run("accelerate_loop")
    assert numbers("reconstruction", output)
    assert numbers("kl_z1", output)[-1] > 0
    assert numbers("accuracy on the training images", output)[-1] > 0.9


@pytest.mark.slow
def test_lightning_module() -> None:
    output = run("lightning_module")
    assert numbers("elbo_loss", output)
    assert numbers("value/reconstruction", output)[-1] < 0
    assert numbers("val_accuracy", output)[-1] > 0.9


@pytest.mark.slow
def test_trl_sft() -> None:
    """The loss of each logged step is the task's and the terms of the ELBO, as TRL's own metrics are beside them."""
    output = run("trl_sft")
    assert len(numbers(r"step \d+: loss", output)) == 6
    assert numbers("reconstruction", output)[-1] < 0
    assert "elbo/kl_z1" in output
    assert "task_loss" in output
