"""A tiny ViT, a folder of tiny pictures, and runs that take a second."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from arguments import later_wins
from colours import SIDE, write_pictures
from fvae_lora_experiments.cli import app
from fvae_lora_experiments.process import exit_code, silence_libraries
from fvae_lora_experiments.recipe import check_recipe
from fvae_lora_experiments.schema import Recipe
from hub import MODEL, Hub, write_data_sets

SCRIPT = Path(__file__).parents[1] / "slurm" / "local-slurm.sh"


@pytest.fixture(autouse=True)
def _hushed() -> Iterator[None]:
    """Other tests want to hear what transformers says."""
    verbosity = transformers.logging.get_verbosity()
    silence_libraries()
    yield
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=SIDE,
        patch_size=4,
        num_labels=2,
        initializer_range=0.2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "colours"
    write_pictures(folder / "train", 10)
    write_pictures(folder / "test", 4, seed=1)
    return folder


@pytest.fixture(scope="session")
def make_recipe(vit: Path, pictures: Path) -> Callable[..., Recipe]:
    """A recipe of two epochs of four steps; keyword arguments are sections or values that differ."""

    def make(**changes: Any) -> Recipe:
        tree: dict[str, Any] = {"model": str(vit), "dataset": str(pictures), "method": "lora"}
        train = {"epochs": 2, "batch_size": 8, "log_every": 2} | changes.pop("train", {})
        adapter = {"r": 4} | changes.pop("adapter", {})
        return check_recipe(tree | {"train": train, "adapter": adapter} | changes, "test")

    return make


@pytest.fixture
def small(vit: Path, pictures: Path) -> list[str]:
    """The command line's version of `make_recipe`."""
    options = ["train.epochs=2", "train.batch_size=8", "adapter.r=4", "image.augmentation=[]"]
    return [*options, "--model", str(vit), "--dataset", str(pictures)]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, standard output, standard error).

    Of an option or a key that is given twice the last counts, unless it is to be taken as it stands (`exactly`).
    """

    def run(*arguments: str | Path, exactly: bool = False) -> tuple[int, str, str]:
        capsys.readouterr()
        given = [str(a) for a in arguments] if exactly else later_wins(arguments)
        code = exit_code(lambda: app(given, standalone_mode=False))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, vit: Path) -> Iterator[Hub]:
    """A stand-in for the hub that serves the benchmark's data sets and its model, tiny."""
    folder = tmp_path_factory.mktemp("hub")
    write_data_sets(folder)
    shutil.copytree(vit, folder / "models" / MODEL)
    with Hub(folder).serving() as serving:
        yield serving


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """SLURM on this machine, where it is installed."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("a real SLURM needs root and its packages: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run([SCRIPT, "start", folder, str(port)], check=True)
            yield
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True)
    shutil.rmtree(folder, ignore_errors=True)
