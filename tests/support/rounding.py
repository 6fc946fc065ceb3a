"""Two runs that should be one, but for the order in which numbers are added."""

import json
from pathlib import Path
from typing import Any

import pytest


def assert_alike(first: Path, second: Path) -> dict[str, Any]:
    """Learning curves, ELBO terms and scores are the same to rounding; the second's record."""
    curves = [(run / "metrics.jsonl").read_text().splitlines() for run in (first, second)]
    for one, other in zip(*(_numbers([json.loads(line) for line in lines]) for lines in curves), strict=True):
        assert other == pytest.approx(one, rel=2e-3, abs=2e-5)
    records = [json.loads((run / "run.json").read_text()) for run in (first, second)]
    assert records[0]["parameters"] == records[1]["parameters"]
    return records[1]


def _numbers(tree: Any) -> list[float]:
    """The numbers in a tree, in its order."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _numbers(tree[key])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in _numbers(item)]
    return [tree] if isinstance(tree, int | float) else []
