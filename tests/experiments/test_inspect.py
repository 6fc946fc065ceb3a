"""`fvae-lora inspect`: what a run's autoencoders know, of its own data and of others, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from colours import write_pictures
from fvae_lora import export_for_inference, summarise_layers
from fvae_lora_experiments.inspect.inputs import Known, open_inputs
from fvae_lora_experiments.inspect.probes import Question, probe, project, question
from fvae_lora_experiments.inspect.source import find_source
from fvae_lora_experiments.predict.trained import load_run
from fvae_lora_experiments.recipe import check_recipe
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from fvae_lora_experiments.tasks.image import ImageTask
from sentences import sentences, write_encoder

Cli = Callable[..., tuple[int, str, str]]
FILES = {"inspection.json", "inspection.html"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_recipe: Callable[..., Recipe]) -> Path:
    """A run of FVAE-LoRA on images of three colours."""
    folder = tmp_path_factory.mktemp("runs") / "images"
    run_recipe(make_recipe(method="fvae-lora", train={"learning_rate": 0.01}), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on texts that are in groups; names of classes and groups are those of a joker."""
    place = tmp_path_factory.mktemp("texts")
    rows = [
        {"text": text, "label": ["<script>no</script>", "fine"][label], "group": f"<i>{i % 2}</i>"}
        for label in (0, 1)
        for i, text in enumerate(sentences(label, 24, 0))
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "task": "text",
        "method": "fvae-lora",
        "model": str(write_encoder(place / "bert")),
        "dataset": str(place / "train.jsonl"),
        "data": {"group_column": "group", "validation_share": 0.3},
        "text": {"max_length": 20},
        "train": {"epochs": 1, "batch_size": 8},
        "adapter": {"r": 4},
    }
    run_recipe(check_recipe(recipe, "test"), place / "<b>run", quiet=True)
    return place / "<b>run"


def inspected(cli: Cli, out: Path, *arguments: Any) -> tuple[dict[str, Any], str]:
    """What is written, and what is said."""
    code, said, err = cli("inspect", *arguments, "--out", out)
    assert (code, err) == (0, "")
    assert {file.name for file in out.iterdir()} == FILES
    assert "The page is" in said
    return json.loads((out / "inspection.json").read_text()), " ".join(said.split())


# --- What is measured -----------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_rows_of_the_split(cli: Cli, images: Path, tmp_path: Path) -> None:
    found, said = inspected(cli, tmp_path, images, "--split", "train")
    trained = load_run(images)
    inputs = open_inputs(find_source(images), trained, "train", 2000)
    expected = summarise_layers(trained.model, inputs.batches)
    assert [layer["name"] for layer in found["layers"]] == list(expected)
    assert found["data"]["count"] == inputs.count == 27
    for layer, summary in zip(found["layers"], expected.values(), strict=True):
        for name in ("tokens", "kl_z1", "log_likelihood", "gamma", "w2", "r2", "r2_z1", "r2_z2", "update_norm"):
            assert layer[name] == pytest.approx(getattr(summary, name)), name
        assert layer["z1"]["active"] == int((summary.z1_spread > found["active_above"]).sum())
        assert layer["z2"]["spread"] == pytest.approx(summary.z2_spread.tolist())
        assert layer["update_share"] == pytest.approx(summary.update_norm / summary.output_norm)
        scores = [layer[latent]["probes"]["label"]["mean"] for latent in ("z1", "z2")]
        assert all(0 <= score <= 1 for score in scores)
        assert len(layer["z1"]["projection"]["points"]) == 27
    assert found["probes"]["label"]["chance"] == pytest.approx(1 / 3)
    assert sorted(set(found["shown"]["label"])) == [0, 1, 2]
    assert "Linear probes" in said
    assert "0.q_proj" in said


def test_the_same_command_writes_the_same_files_beside_the_run(cli: Cli, images: Path, tmp_path: Path) -> None:
    run = shutil.copytree(images, tmp_path / "run")
    written = []
    for _ in range(2):
        assert cli("inspect", run)[0] == 0
        written.append([(run / name).read_bytes() for name in sorted(FILES)])
    assert written[0] == written[1]
    assert cli("report", tmp_path)[0] == 0


def test_groups_are_probed_and_names_are_shown_as_they_are(cli: Cli, grouped: Path, tmp_path: Path) -> None:
    found, said = inspected(cli, tmp_path, grouped, "--split", "train")
    assert found["probes"]["group"]["classes"] == ["<i>0</i>", "<i>1</i>"]
    assert {"label", "group"} == found["layers"][0]["z2"]["probes"].keys()
    assert "Group: balanced accuracy in %, 50.0 is a guess." in said
    page = (tmp_path / "inspection.html").read_text()
    assert "<script" not in page
    assert "<i>0" not in page
    assert "<b>run" not in page
    assert "&lt;b&gt;run" in page
    assert "z1 by group" in page
    assert 'src="' not in page
    assert str(grouped.parent) not in page


def test_rows_are_drawn_where_there_are_more(cli: Cli, images: Path, tmp_path: Path) -> None:
    found, said = inspected(cli, tmp_path, images, "--split", "train", "--rows", "3")
    assert found["data"]["count"] == 3  # fewer than units
    assert found["data"]["rows"] == "3 rows of the run's train split, drawn from 27"
    assert "No probes for the label: only 0 of 3 classes have 5 rows; 2 must have." in said
    assert found["layers"][0]["z1"]["probes"]["label"] is None


def test_batches_change_nothing(images: Path) -> None:
    trained = load_run(images)
    source = find_source(images)
    values = []
    for size in (4, 27):
        recipe = source.recipe.model_copy(update={"train": source.recipe.train.model_copy(update={"batch_size": size})})
        inputs = open_inputs(replace(source, recipe=recipe), trained, "train", 2000)
        values.append([summary.r2 for summary in summarise_layers(trained.model, inputs.batches).values()])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_how_far_it_is_can_be_seen_on_a_terminal_alone(
    cli: Cli, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("inspect", images, "--out", tmp_path)[2] == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "inspecting" in cli("inspect", images, "--out", tmp_path)[2]


# --- Other data, and an adapter alone -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_its_own_data_elsewhere_sees_the_same_split(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "copy")
    own, _ = inspected(cli, tmp_path / "a", images, "--split", "train")
    moved, _ = inspected(cli, tmp_path / "b", images, "--split", "train", "--dataset", tmp_path / "copy")
    assert moved["layers"] == own["layers"]


def test_other_data_may_have_other_classes(cli: Cli, images: Path, tmp_path: Path) -> None:
    for i in range(12):
        file = tmp_path / "data" / "abcd"[i % 4] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3)).astype("uint8")).save(file)
    found, _ = inspected(cli, tmp_path / "out", images, "--dataset", tmp_path / "data")
    assert found["data"]["rows"] == "all rows"
    assert found["probes"]["label"]["classes"] == ["a", "b", "c", "d"]


def test_data_without_labels_have_no_probes_and_it_says_so(
    cli: Cli, images: Path, pictures: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(pictures.glob("test/*/*"))):
        shutil.copy(file, flat / f"{i}.png")
    found, said = inspected(cli, tmp_path / "a", images, "--dataset", flat)
    assert found["probes"] == {}
    assert found["data"]["count"] == 12
    assert "No probes for a label: dataset" in said
    assert "neither folders nor a table give their classes" in said
    page = (tmp_path / "a" / "inspection.html").read_text()
    assert "No probes for a label" in page
    assert "z2 by row" in page
    (flat / "broken.png").write_bytes(b"no image")
    code, _, err = cli("inspect", images, "--dataset", flat, "--out", tmp_path / "b")
    assert code == 2
    assert err.startswith(f"fvae-lora: {flat / 'broken.png'}: ")
    assert not (tmp_path / "b").exists()


def test_a_table_without_labels_and_data_of_one_class(cli: Cli, grouped: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sentences(1, 9, 5)))
    found, said = inspected(cli, tmp_path / "a", grouped, "--dataset", tmp_path / "new.jsonl", "--rows", "7")
    assert found["data"]["count"] == 7
    assert "no label column in split train" in said
    write_pictures(tmp_path / "all", 5)
    (tmp_path / "one").mkdir()
    shutil.copytree(tmp_path / "all" / "red", tmp_path / "one" / "red")
    found, said = inspected(cli, tmp_path / "b", images, "--dataset", tmp_path / "one")
    assert (found["data"]["count"], found["probes"]) == (5, {})
    assert "split train has only one class: red" in said


def test_an_adapter_alone_needs_data(cli: Cli, images: Path, pictures: Path, vit: Path, tmp_path: Path) -> None:
    adapter = images / "adapter"
    code, _, err = cli("inspect", adapter)
    assert (code, err) == (
        2,
        f"fvae-lora: {adapter}: only an adapter, which does not name its data; give --dataset\n",
    )
    given = ("--model", vit, "--dataset", pictures, "--split", "test")
    found, _ = inspected(cli, tmp_path / "a", adapter, *given)
    of_run, _ = inspected(cli, tmp_path / "b", images, "--split", "test")
    for layer, expected in zip(found["layers"], of_run["layers"], strict=True):
        for name in ("tokens", "r2", "kl_z1", "update_norm"):  # the default recipe has another batch size
            assert layer[name] == pytest.approx(expected[name], rel=1e-4)
    for task, problem in {"images": "--task images: no such task; allowed are image, text", "image": None}.items():
        code, _, err = cli("inspect", adapter, *given, "--task", task, "--out", tmp_path / "c")
        assert code == (2 if problem else 0)
        assert (problem or "") in err


def test_a_truncated_adapter_is_one_line(cli: Cli, images: Path, pictures: Path, vit: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(images / "adapter", tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    code, out, err = cli("inspect", adapter, "--model", vit, "--dataset", pictures)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "adapter_model.safetensors" in err


# --- What is refused ------------------------------------------------------------------------------------------------


def test_what_has_no_autoencoder_is_refused(
    cli: Cli, images: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for method in ("lora", "full", "fvae-no-elbo"):
        settings = {"fvae": {"elbo_weight": 0.0}} if method == "fvae-no-elbo" else {}
        run_recipe(make_recipe(method=method, train={"epochs": 1}, **settings), tmp_path / method, quiet=True)
    export_for_inference(load_run(images).model, tmp_path / "small")
    refused = {
        "lora": "an adapter of type LORA; only FVAE_LORA has autoencoders to look into",
        "full": "neither a run with an adapter nor an adapter's folder",
        "fvae-no-elbo": "made with elbo_weight=0, so it has no autoencoder to look into",
        "small": "inference_only, without a decoder; give the adapter that it was exported from",
        "nothing": "neither a run with an adapter nor an adapter's folder",
    }
    for name, reason in refused.items():
        assert cli("inspect", tmp_path / name) == (2, "", f"fvae-lora: {tmp_path / name}: {reason}\n")
    (tmp_path / "small" / "adapter_config.json").write_text("[1")
    assert "adapter_config.json: not readable as JSON" in cli("inspect", tmp_path / "small")[2]


def test_options_that_do_not_go_together(cli: Cli, images: Path, tmp_path: Path) -> None:
    for arguments, problem in {
        ("--task", "image"): f"--task image: only for an adapter alone; {images} is a run",
        ("data.group_column=place",): "data.group_column=place: only with --dataset",
        ("--dataset", str(tmp_path / "no")): f"dataset {tmp_path / 'no'}: no such",
    }.items():
        code, _, err = cli("inspect", images, *arguments)
        assert code == 2
        assert problem in err


@pytest.mark.parametrize("where", ["reading", "probing", "writing"])
def test_ctrl_c_leaves_nothing_half_written(
    cli: Cli, images: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def stop(*_: Any, **__: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 or where != "reading":
            raise KeyboardInterrupt
        return collate(*_)

    collate = ImageTask.collate
    target = {"reading": "tasks.image.ImageTask.collate", "probing": "inspect.measure.probe"}
    monkeypatch.setattr(f"fvae_lora_experiments.{target[where]}" if where in target else "pathlib.Path.replace", stop)
    code, _, err = cli("inspect", images, "--split", "train", "--out", tmp_path / "out")
    assert code == 130
    assert "Traceback" not in err
    assert calls
    assert not list(tmp_path.rglob("*.*"))


# --- Probes and projections -----------------------------------------------------------------------------------------


def asked(labels: Any, classes: int = 3) -> Question:
    return question(Known(np.array(labels), [str(i) for i in range(classes)]))


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    noise = np.random.default_rng(0)
    labels = np.arange(300) % 3
    known = np.eye(3)[labels] + 0.1 * noise.normal(size=(300, 3))
    assert probe(known, asked(labels)).mean > 0.99  # type: ignore[union-attr]
    assert probe(noise.normal(size=(300, 8)), asked(labels)).mean == pytest.approx(1 / 3, abs=0.1)  # type: ignore[union-attr]
    rare = np.where(np.arange(300) < 280, 0, 1)  # balanced: always the same class is no more than a guess
    assert probe(noise.normal(size=(300, 8)), asked(rare, 2)).mean == pytest.approx(0.5, abs=0.2)  # type: ignore[union-attr]
    numbers = question(Known(known[:, 0].astype("float32"), []))
    assert probe(known, numbers).mean > 0.99  # type: ignore[union-attr]
    assert numbers.chance == 0


def test_a_probe_works_with_fewer_rows_than_units() -> None:
    noise = np.random.default_rng(0)
    labels = np.arange(12) % 2
    latents = np.hstack([5 * labels[:, None] + noise.normal(size=(12, 1)), 0.1 * noise.normal(size=(12, 63))])
    assert probe(latents, asked(labels, 2)) is not None


def test_nothing_is_probed_where_nothing_can_be() -> None:
    latents = np.random.default_rng(0).normal(size=(12, 4))
    assert asked([0] * 12).reason == "only 1 of 3 classes have 5 rows; 2 must have"
    assert probe(latents, asked([0] * 12)) is None
    assert probe(np.zeros((12, 4)), asked([0, 1] * 6)) is None  # collapsed
    assert probe(latents[:5], asked([0, 1] * 6)) is None  # rows of another tower
    assert question(Known(np.zeros(3, "float32"), [])).reason == "3 rows; 10 are needed"
    assert asked([0] * 6 + [1] * 5 + [2]).rows.sum() == 11
    padding = latents.copy()
    padding[:3] = np.nan
    assert probe(padding, asked([0, 1] * 6)) is None  # four rows of a class are left


def test_a_projection_shows_where_latents_vary_most() -> None:
    latents = np.random.default_rng(0).normal(size=(50, 5)) * [1, 9, 1, 4, 1]
    latents[7] = np.nan
    found = project(latents, np.arange(50))
    assert found is not None
    assert found.points[7] is None
    kept = np.array([p for p in found.points if p])
    assert abs(np.corrcoef(kept[:, 0], latents[np.arange(50) != 7, 1])[0, 1]) > 0.99
    assert 0.7 < found.explained[0] < 0.9
    assert project(np.zeros((5, 3)), np.arange(5)) is None
    one = project(np.arange(5.0)[:, None], np.arange(5))
    assert one is not None
    assert one.explained == (1.0, 0.0)
