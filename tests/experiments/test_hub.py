"""From a name on the hub to a report, without a network: a server beside the test speaks for the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fvae_lora_experiments.data import fingerprint, open_images
from fvae_lora_experiments.data.image_decoding import image_content
from fvae_lora_experiments.schema import DataSettings
from hub import CLASSES, MODEL, SMALL, Hub, command_line


@pytest.mark.slow
def test_compare_from_names_on_the_hub_to_the_report(hub: Hub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home")
    out = tmp_path / "runs"
    methods = ("--methods", "lora,fvae-lora", "--seeds", "1", "--out", out)
    done = command_line(environment, "compare", "image/eurosat", *SMALL, *methods)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tanganke/eurosat · clean · " in done.stdout

    local = open_images(str(hub.folder / "datasets/tanganke/eurosat"), DataSettings())
    for method in ("lora", "fvae-lora"):
        record = json.loads((out / f"{method}-seed1" / "run.json").read_text())
        assert record["state"] == "complete"
        assert (record["model"]["name"], record["dataset"]["name"]) == (MODEL, "tanganke/eurosat")
        assert record["dataset"]["fingerprint"] == fingerprint(local, image_content)
        assert record["dataset"]["classes"] == CLASSES["tanganke/eurosat"]
        assert record["dataset"]["splits"] == {"train": 27, "validation": 3, "test": 12}
    assert any(path.startswith("datasets/tanganke/eurosat/resolve") for path in hub.asked)

    # what was fetched serves again, without a hub
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    scored = command_line(offline, "evaluate", out / "lora-seed1")
    assert scored.returncode == 0, scored.stderr
    figure = f"{json.loads((out / 'lora-seed1' / 'run.json').read_text())['metrics']['test']['loss']:.6f}"
    assert scored.stdout.count(figure) == 2


SPLITS_OF_ALL = """
import json
from fvae_lora_experiments.data import split
from fvae_lora_experiments.recipe import load_recipe, shipped_recipes
from fvae_lora_experiments.tasks import load_task
found = {}
for name in shipped_recipes():
    if name.startswith("image/") and name not in ("image/default", "image/reference", "image/demo"):
        recipe = load_recipe(name)
        official = load_task(recipe).open_source()
        parts = split(official, recipe.data, recipe.seed)
        found[name] = [recipe.dataset, parts.sizes, parts.test_from, sorted(official)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_recipes_of_all_six_data_sets_open_them_by_name(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | hub.environment(tmp_path / "home")
    program = [sys.executable, "-c", SPLITS_OF_ALL]
    hub.asked.clear()
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, *_ in found.values()} == set(CLASSES)
    fetched = [path.rpartition("/")[2] for path in hub.asked if path.endswith(".parquet")]
    assert {file.partition("-")[0] for file in fetched} == {"train", "test"}, "what no run uses was fetched"
    assert len(found) == 2 * len(CLASSES)

    # what was fetched serves again, without a hub
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    again = subprocess.run(program, env=offline, capture_output=True, text=True, timeout=200)
    assert json.loads(again.stdout.splitlines()[-1]) == found, again.stderr

    for recipe, (_, sizes, test_from, official) in found.items():
        assert official == ["test", "train"], "a corrupted copy or the extra images were taken for a split"
        if recipe == "image/svhn-reference":
            assert (sizes, test_from) == ({"train": 30, "validation": 12, "test": 12}, "the official test split")
        elif recipe.endswith("-reference"):
            assert sizes == {"train": 30, "validation": 6, "test": 6}
            assert test_from == "half of the official test split, seed 1"
        else:
            assert (sizes, test_from) == ({"train": 27, "validation": 3, "test": 12}, "the official test split")


WHOLE = "import datasets; print(sorted(datasets.load_dataset('ufldl-stanford/svhn', 'cropped_digits')))"


@pytest.mark.slow
def test_other_programs_and_this_one_get_on_with_each_others_caches(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | hub.environment(tmp_path / "home")

    def said(program: str, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment | more, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    ours = OPENED.format(name="ufldl-stanford/svhn", config="cropped_digits")
    whole = "['extra', 'test', 'train']"
    assert said(WHOLE) == whole
    assert said(ours, HF_HUB_OFFLINE="1") == "['test', 'train']"  # fetched by another program
    assert said(ours) == "['test', 'train']"
    assert said(WHOLE, HF_HUB_OFFLINE="1") == whole


OPENED = """
from fvae_lora_experiments.data import open_images
from fvae_lora_experiments.schema import DataSettings
print(sorted(open_images("{name}", DataSettings(config="{config}"))))
"""


@pytest.mark.parametrize("place", ["ufldl-stanford/svhn", "svhn"])
def test_a_local_copy_takes_the_hubs_place(
    hub: Hub, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of the repository, with the splits and configurations that no run uses."""
    shutil.copytree(hub.folder / "datasets/ufldl-stanford/svhn", tmp_path / place)
    (tmp_path / place / "full_numbers").mkdir()
    (tmp_path / place / "full_numbers" / "train-00000-of-00001.parquet").write_bytes(b"not to be opened")
    monkeypatch.setenv("FVAE_LORA_DATA_ROOT", str(tmp_path))
    found = open_images("ufldl-stanford/svhn", DataSettings(config="cropped_digits"))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 30, "test": 12}


def test_a_run_on_a_local_copy_keeps_the_name_of_the_hub(
    cli: Callable[..., tuple[int, str, str]],
    vit: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FVAE_LORA_DATA_ROOT", "")  # what the option sets is gone after the test
    shutil.copytree(pictures, tmp_path / "copies" / "tanganke" / "dtd")
    where = (
        "--model",
        vit,
        "--data-root",
        tmp_path / "copies",
        "--method",
        "lora",
        "--out",
        tmp_path / "run",
        "--quiet",
    )
    code, _, error = cli("train", "image/dtd", *SMALL, *where)
    assert code == 0, error
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["dataset"]["name"], record["recipe"]["dataset"]) == ("tanganke/dtd", "tanganke/dtd")
    assert record["dataset"]["fingerprint"] == fingerprint(open_images(str(pictures), DataSettings()), image_content)
    assert cli("evaluate", tmp_path / "run", "--data-root", tmp_path / "copies")[0] == 0

    code, _, error = cli("evaluate", tmp_path / "run", "--data-root", tmp_path / "nowhere")
    assert (code, error) == (2, f"fvae-lora: --data-root {tmp_path / 'nowhere'}: no such folder\n")
