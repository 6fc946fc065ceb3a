"""From a name on the hub to a report, without a network: a server beside the test speaks for the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import CLASSES, MODEL, Hub, write_data_sets

PROGRAM = "import sys; from fvae_lora.experiments.cli import main; sys.argv[0] = 'fvae-lora'; main()"
SMALL = ("train.epochs=1", "train.batch_size=8", "train.precision=fp32", "adapter.r=4")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, vit: Path) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    write_data_sets(folder)
    shutil.copytree(vit, folder / "models" / MODEL)
    with Hub(folder).serving() as serving:
        yield serving


def command_line(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_compare_from_names_on_the_hub_to_the_report(hub: Hub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home")
    out = tmp_path / "runs"
    methods = ("--methods", "lora,fvae-lora", "--seeds", "1", "--out", out)
    done = command_line(environment, "compare", "image/eurosat", *SMALL, *methods)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tanganke/eurosat · clean · " in done.stdout

    for method in ("lora", "fvae-lora"):
        record = json.loads((out / f"{method}-seed1" / "run.json").read_text())
        assert record["state"] == "complete"
        assert (record["model"]["name"], record["dataset"]["name"]) == (MODEL, "tanganke/eurosat")
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
from fvae_lora.experiments.data import split
from fvae_lora.experiments.recipe import load_recipe, shipped
from fvae_lora.experiments.tasks import load_task
found = {}
for name in shipped():
    if name not in ("image/default", "image/reference", "image/demo"):
        recipe = load_recipe(name)
        official = load_task(recipe).open_source()
        parts = split(official, recipe.data, recipe.seed)
        found[name] = [recipe.dataset, parts.sizes, parts.test_from, sorted(official)]
print(json.dumps(found))
"""


def test_the_recipes_of_all_six_data_sets_open_them_by_name(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | hub.environment(tmp_path / "home")
    program = [sys.executable, "-c", SPLITS_OF_ALL]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, *_ in found.values()} == set(CLASSES)
    assert len(found) == 2 * len(CLASSES)
    for recipe, (_, sizes, test_from, official) in found.items():
        assert official == ["test", "train"], "a corrupted copy or the extra images were taken for a split"
        if recipe == "image/svhn-reference":
            assert (sizes, test_from) == ({"train": 30, "validation": 12, "test": 12}, "the official test split")
        elif recipe.endswith("-reference"):
            assert sizes == {"train": 30, "validation": 6, "test": 6}
            assert test_from == "half of the official test split, seed 1"
        else:
            assert (sizes, test_from) == ({"train": 27, "validation": 3, "test": 12}, "the official test split")
