"""The page on searches has every knob with its range, and its commands are ones that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fvae_lora_experiments.tune.space import KNOBS

PAGE = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text(encoding="utf-8")


def test_every_knob_is_on_the_page_with_its_range() -> None:
    listed = dict(re.findall(r"^\| `((?:train|adapter|fvae)\.\w+)` \| ([^|]+) \|", PAGE, re.MULTILINE))
    assert listed == {key: str(knob) for key, knob in KNOBS.items()}


COMMANDS = re.findall(r'fvae-lora (tune [^"\n]*)', "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)))


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_can_be_given(command: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    """All but the number of trials is as on the page, and it is the number alone that is refused."""
    assert cli(*shlex.split(command), "--trials", "0") == (2, "", "fvae-lora: --trials 0: expected at least 1\n")


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 4
