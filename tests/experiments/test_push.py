"""A run's adapter on the hub: its card, and how it gets there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from fvae_lora_experiments.card import card
from fvae_lora_experiments.errors import UserError
from fvae_lora_experiments.push import collect
from fvae_lora_experiments.run.record import parse_record
from fvae_lora_experiments.run.runner import run_recipe
from fvae_lora_experiments.schema import Recipe
from hub import READ_ONLY, Hub, command_line
from sentences import sentences, write_encoder

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def done(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_recipe(make_recipe(method="fvae-lora", train={"epochs": 1}), folder, quiet=True)
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return shutil.copytree(done, tmp_path / "run")


def code_of(text: str) -> str:
    found = re.search(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def test_the_card_has_what_the_hub_reads_and_the_results_of_the_record(done: Path) -> None:
    record = parse_record((done / "run.json").read_bytes())
    found = ModelCard.load(done / "adapter" / "README.md")
    assert found.data.pipeline_tag == "image-classification"
    assert found.data.library_name == "peft"
    assert found.data.metrics == ["accuracy"]
    assert {"fvae-lora", record.method} == set(found.data.tags)
    assert found.data.get("license") is None
    assert found.data.get("base_model") is None, "a folder here is no model on the hub"
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", record.metrics.test["accuracy"])
    assert f"| {100 * record.metrics.test['accuracy']:.2f} |" in found.text


def test_the_card_names_model_and_data_of_the_hub(done: Path) -> None:
    record = parse_record((done / "run.json").read_bytes())
    names = {"model": "google/vit-base", "dataset": "tanganke/dtd"}
    moved = record.model_copy(update={"recipe": record.recipe | names})
    data = ModelCard(card(moved, done / "adapter")).data
    assert (data.base_model, data.datasets) == ("google/vit-base", ["tanganke/dtd"])
    assert data.eval_results[0].dataset_type == "tanganke/dtd"


@pytest.fixture
def pasted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path, Path], str]:
    """Runs the code of a card in the adapter's folder, beside the base model, and gives what it prints."""

    def execute(adapter: Path, base: Path) -> str:
        (adapter / base.name).symlink_to(base)  # where the code looks for it
        monkeypatch.chdir(adapter)
        capsys.readouterr()
        exec(compile(code_of((adapter / "README.md").read_text()), "card", "exec"), {})
        return capsys.readouterr().out

    return execute


@pytest.mark.parametrize("method", ["fvae-lora", "lora", "linear-probe", "full"])
def test_the_code_of_the_card_works_as_pasted(
    make_recipe: Callable[..., Recipe], vit: Path, tmp_path: Path, method: str, pasted: Callable[[Path, Path], str]
) -> None:
    run_recipe(make_recipe(method=method, train={"epochs": 1}), tmp_path / "run", quiet=True)
    readme = tmp_path / "run" / "adapter" / "README.md"
    assert ModelCard.load(readme).data.library_name == ("transformers" if method == "full" else "peft")
    assert ("import fvae_lora" in readme.read_text()) == (method == "fvae-lora")
    assert re.fullmatch(r"(blue|green|red) [01]\.\d{3}\n", pasted(readme.parent, vit))


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_the_code_of_a_card_for_texts_works_as_pasted(
    make_recipe: Callable[..., Recipe], tmp_path: Path, columns: list[str], pasted: Callable[[Path, Path], str]
) -> None:
    base = write_encoder(tmp_path / "bert", "bert")
    rows = [{"text": sentence, "other": "good", "label": n} for n in (0, 1) for sentence in sentences(n, 10, 0)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"validation_share": 0.2, "test_share": 0.2}
    train = {"epochs": 1, "batch_size": 8}
    text = {"columns": columns, "max_length": 8}
    names = {"model": str(base), "dataset": str(tmp_path / "train.jsonl")}
    run_recipe(make_recipe(task="text", train=train, data=data, text=text, **names), tmp_path / "run", quiet=True)
    adapter = tmp_path / "run" / "adapter"
    assert re.fullmatch(r"[01] [01]\.\d{3}\n", pasted(adapter, base))
    assert ("other half" in (adapter / "README.md").read_text()) == (len(columns) == 2)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Hub(tmp_path_factory.mktemp("hub")).serving() as serving:
        yield serving


@pytest.fixture
def online(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process asks the stand-in, as somebody who may write there."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_may_write")


def test_push_makes_a_private_repository_with_the_adapter_and_its_card(
    cli: Cli, hub: Hub, online: None, copied: Path
) -> None:
    code, out, error = cli("push", copied, "me/mine")
    assert code == 0, error
    assert f"The adapter is at {hub.address}/me/mine" in out
    assert "The base model is a local folder" in out
    assert "me/mine" in hub.private
    there = hub.folder / "models" / "me/mine"
    assert {p.name for p in there.iterdir()} == {p.name for p in (copied / "adapter").iterdir()}
    for file in (copied / "adapter").glob("*.safetensors"):
        assert (there / file.name).read_bytes() == file.read_bytes()
    assert 'adapter = "me/mine"\n' in code_of((there / "README.md").read_text())
    assert cli("push", copied, "me/mine")[0] == 0, "again"


def test_a_public_repository_needs_to_be_meant(cli: Cli, hub: Hub, online: None, copied: Path) -> None:
    assert cli("push", copied, "me/public", "--public")[0] == 0
    assert "me/public" not in hub.private
    code, _, error = cli("push", copied, "me/public")
    assert (code, error) == (2, "fvae-lora: me/public: is already public; give --public to upload to it\n")


@pytest.mark.parametrize(
    ("token", "line"),
    [
        (READ_ONLY, r"me/new: the hub refused \(403\): .*no right to write.*"),
        ("", r"me/new: (the hub refused \(401\)|not logged in).*"),
    ],
)
def test_a_hub_that_refuses_is_one_line(
    cli: Cli, online: None, copied: Path, token: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, error = cli("push", copied, "me/new")
    assert code == 2
    assert re.fullmatch(f"fvae-lora: {line}\n", error), error


@pytest.mark.parametrize(
    ("action", "status"), [("create", 402), ("create", 500), ("preupload", 403), ("commit", 409), ("commit", 500)]
)
def test_a_hub_that_refuses_one_step_is_one_line(
    cli: Cli, hub: Hub, online: None, copied: Path, action: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "refuses", {action: status})
    code, _, error = cli("push", copied, "me/refused")
    assert (code, error) == (2, f"fvae-lora: me/refused: the hub refused ({status}): Not today\n")


@pytest.mark.parametrize("setting", [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)])
def test_a_hub_that_is_not_there_is_one_line(
    cli: Cli, online: None, copied: Path, setting: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"huggingface_hub.constants.{setting[0]}", setting[1])
    code, _, error = cli("push", copied, "me/new")
    assert code == 2
    assert re.fullmatch("fvae-lora: me/new: the hub cannot be reached: .*\n", error), error


@pytest.mark.slow
def test_what_was_pushed_is_used_from_the_hub_by_the_code_of_its_card(
    hub: Hub, copied: Path, vit: Path, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_may_write"}
    pushed = command_line(environment, "push", copied, "me/used")
    assert pushed.returncode == 0, pushed.stderr
    (tmp_path / vit.name).symlink_to(vit)
    code = code_of((hub.folder / "models" / "me/used" / "README.md").read_text())
    program = [sys.executable, "-c", code]
    done = subprocess.run(
        program, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True, timeout=200
    )
    assert re.fullmatch(r"(blue|green|red) [01]\.\d{3}\n", done.stdout), done.stderr


def test_a_dry_run_shows_what_would_go_up(cli: Cli, copied: Path) -> None:
    code, out, error = cli("push", copied, "me/mine", "--dry-run")
    assert code == 0, error
    assert "me/mine (private) would receive:\n" in out
    for file in (copied / "adapter").iterdir():
        assert f"  {file.name}  " in out


@pytest.mark.parametrize("name", ["mine", "a/b/c", "me/..mine", "me/mi ne", "/mine"])
def test_a_name_that_is_none_is_one_line(cli: Cli, copied: Path, name: str) -> None:
    code, _, error = cli("push", copied, name)
    assert (code, error) == (2, f"fvae-lora: {name}: not the name of a repository; expected OWNER/NAME\n")


@pytest.mark.parametrize("state", ["failed", "running"])
def test_a_run_that_is_not_finished_is_not_pushed(cli: Cli, copied: Path, state: str) -> None:
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"state": state}))
    code, _, error = cli("push", copied, "me/mine", "--dry-run")
    assert (code, error) == (2, f"fvae-lora: {copied}: no finished run; its state is {state}\n")


@pytest.mark.parametrize("text", ["trained in /data/shared/models/vit", "see file:///x", "~/models/vit"])
def test_nothing_that_tells_of_a_machine_goes_up(copied: Path, text: str) -> None:
    readme = copied / "adapter" / "README.md"
    readme.write_text(f"{readme.read_text()}\n{text}\n")
    with pytest.raises(UserError, match=r"README\.md: line \d+: .* reveals where the run was done"):
        collect(copied, "me/mine")


def test_a_path_in_a_configuration_or_in_the_weights_does_not_go_up(copied: Path) -> None:
    config = next((copied / "adapter").glob("*config.json"))
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": "/data/models/vit"}, indent=1))
    with pytest.raises(UserError, match=r"config\.json: line"):
        collect(copied, "me/mine")
    config.write_text(before)
    weights = next((copied / "adapter").glob("*.safetensors"))
    save_file(load_file(weights), weights, {"from": "/data/models/vit"})
    with pytest.raises(UserError, match="safetensors: line"):
        collect(copied, "me/mine")


def test_a_card_that_was_edited_goes_up_as_it_is_and_one_of_peft_is_replaced(copied: Path) -> None:
    readme = copied / "adapter" / "README.md"
    readme.write_text(readme.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    assert ModelCard(_readme(copied)).data.license == "mit"
    readme.write_text("---\nbase_model: x\n---\n# Model Card for Model ID\n[More Information Needed]\n")
    assert "More Information" not in _readme(copied)
    assert "## Results" in _readme(copied)


def _readme(path: Path) -> str:
    contents = collect(path, "me/mine").files["README.md"]
    assert isinstance(contents, bytes)
    return contents.decode()


def test_names_that_a_user_gave_are_escaped_in_the_card(done: Path) -> None:
    contents = json.loads((done / "run.json").read_text())
    hostile = 'x"; import os #\n```\n# |<script>'
    contents["dataset"] |= {"name": hostile, "classes": [hostile, "b", "c"]}
    text = card(parse_record(contents), done / "adapter")
    code = code_of(text)
    assert "import os" not in [line.strip() for line in code.splitlines()]
    compile(code, "card", "exec")
    prose = text.replace(code, "").partition("\n---\n")[2]
    assert "<script>" not in prose
    assert prose.count("\n# ") == 1
    assert ModelCard(text).data.eval_results[0].dataset_name == parse_record(contents).dataset.name
