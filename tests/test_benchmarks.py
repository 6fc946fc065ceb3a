"""The benchmarks run, at a tiny size: what they measure is read where it is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(*command: str) -> str:
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_gpus_script_runs_on_a_cpu_and_finds_every_way_right(tmp_path: Path) -> None:
    run(str(BENCHMARKS / "gpu.sh"), "--tiny", "--out", str(tmp_path / "gpu.json"))
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert {name: verdict for name, verdict in record["correctness"].items() if "WRONG" in verdict} == {}
    assert {row["method"] for row in record["cost"]} == {"lora", "dora", "fvae-lora, decoder 1 x 128"}


@pytest.mark.slow
def test_the_table_of_costs_has_a_target_and_says_what_misses(tmp_path: Path) -> None:
    size = ["--layers", "1", "--batch", "1", "--repeats", "2", "--threads", "1"]
    printed = run(sys.executable, str(BENCHMARKS / "cost.py"), *size, "--out", str(tmp_path / "cost.json"))
    assert "misses:" in printed
    rows = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["rows"]
    assert sum("target" in row for row in rows) == 6
    floors = {row["method"]: row["floor"] for row in rows if "floor" in row}
    assert floors["lora"] == 1 < floors["fvae-lora, decoder 1 x 128"] < floors["fvae-lora, decoder 3 x 128"] < 1.1


@pytest.mark.slow
def test_the_curve_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    size = ["--layers", "4", "--width", "64", "--length", "8", "--repeats", "1", "--threads", "1"]
    command = [sys.executable, str(BENCHMARKS / "curve.py"), *size, "--out", str(tmp_path / "curve.json")]
    printed = run(*command)
    record = json.loads((tmp_path / "curve.json").read_text(encoding="utf-8"))
    whole = record["rows"].copy()
    assert {row["method"] for row in whole} == {"lora", "fvae-lora, decoder 1 x 128", "dora", "pvera"}
    (tmp_path / "curve.json").write_text(json.dumps({**record, "rows": whole[:4]}), encoding="utf-8")
    assert run(*command).splitlines()[:5] == printed.splitlines()[:5]
    rows = json.loads((tmp_path / "curve.json").read_text(encoding="utf-8"))["rows"]
    assert rows[:4] == whole[:4]
    assert [row["point"] for row in rows] == [row["point"] for row in whole]
