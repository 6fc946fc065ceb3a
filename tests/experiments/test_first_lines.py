"""What the README's first lines promise to somebody with a folder of images, and what names such folders may have."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from colours import write_pictures
from hub import PROGRAM, Hub

Cli = Callable[..., tuple[int, str, str]]
README = (Path(__file__).parents[2] / "README.md").read_text()
NASTY = {"blue": "a|b", "green": "<b>x\n---", "red": '=1+1 `"```'}


@pytest.mark.slow
def test_the_five_lines_of_the_readme_work_as_pasted(hub: Hub, tmp_path: Path) -> None:
    found = re.search(r"## Your own images\n.*?```sh\n(.*?)```", README, re.DOTALL)
    assert found
    lines = found[1].splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["pip", "install"],
        *(["fvae-lora", command] for command in ("check", "train", "predict", "push")),
    ]
    write_pictures(tmp_path / "flowers", 10)
    write_pictures(tmp_path / "new", 2, seed=1)
    (tmp_path / "new").rename(tmp_path / "new-pictures")
    functions = f'pip() {{ :; }}\nfvae-lora() {{ {sys.executable} -c "{PROGRAM}" "$@"; }}\nset -e\n'
    environment = os.environ | hub.environment(tmp_path / "home") | {"HF_TOKEN": "hf_may_write"}
    done = subprocess.run(
        ["bash", "-c", functions + found[1]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert len(list(csv.DictReader((tmp_path / "new.csv").open()))) == 6
    assert {"README.md", "adapter_model.safetensors"} <= {p.name for p in (hub.folder / "models/me/flowers").iterdir()}
    assert f"The adapter is at {hub.address}/me/flowers" in done.stdout


def test_a_run_on_classes_of_any_name_that_counts_them_alike_predicts_and_is_pushed(
    cli: Cli, vit: Path, tmp_path: Path
) -> None:
    write_pictures(tmp_path / "data", 10)
    for plain, nasty in NASTY.items():
        (tmp_path / "data" / plain).rename(tmp_path / "data" / nasty)
    options = ["train.max_steps=3", "train.batch_size=8", "train.class_weights=balanced", "train.sampling=balanced"]
    names = ["--model", vit, "--dataset", tmp_path / "data", "--method", "lora", "--out", tmp_path / "run"]
    code, _, error = cli("train", "image/default", *options, *names, "adapter.r=4", "--quiet")
    assert code == 0, error
    out = tmp_path / "o.csv"
    assert cli("predict", tmp_path / "run", tmp_path / "data", "--probabilities", "--out", out)[0] == 0
    rows = list(csv.DictReader(out.open()))
    in_a_line = {" ".join(name.splitlines()) for name in NASTY.values()}
    assert {key.removeprefix("probability_") for key in rows[0]} - {"input", "row", "label", "probability"} == in_a_line
    assert {row["label"] for row in rows} <= in_a_line
    assert all(sum(float(row[f"probability_{n}"]) for n in in_a_line) == pytest.approx(1, abs=1e-4) for row in rows)
    assert cli("predict", tmp_path / "run", tmp_path / "data", "--out", tmp_path / "o.jsonl")[0] == 0
    lines = map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines())
    assert {line["label"] for line in lines} <= {*NASTY.values()}

    code, _, error = cli("push", tmp_path / "run", "me/nasty", "--dry-run")
    assert (code, error) == (0, "")
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert ModelCard(card).data.eval_results
    (code_block,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    compile(code_block, "card", "exec")
    assert cli("report", tmp_path / "run", "--out", tmp_path / "told")[0] == 0
    assert "<b>x" not in (tmp_path / "told" / "report.html").read_text()
