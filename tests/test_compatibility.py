"""Every yes and no in the table of docs/compatibility.md is true."""

from __future__ import annotations

import warnings

import pytest

from compatibility import FEATURES, METHODS, PAGE, Feature, block, table
from fvae_lora.config import PEFT_SAVES_BIASES

# The table is that of today's peft.
pytestmark = pytest.mark.skipif(not PEFT_SAVES_BIASES, reason="the table is of peft 0.21")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_cell_of_the_table(feature: Feature, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method not in feature.no:
            feature.probe(METHODS[method])
            return
        with pytest.raises(Exception):  # noqa: B017, PT011
            feature.probe(METHODS[method])


def test_what_fvae_lora_refuses_it_refuses_in_one_line() -> None:
    for feature in FEATURES:
        if "FVAE-LoRA" in feature.no:
            with pytest.raises((ValueError, AttributeError, TypeError, NotImplementedError)) as error:
                feature.probe(METHODS["FVAE-LoRA"])
            assert "\n" not in str(error.value), feature.name


def test_the_page_holds_the_table() -> None:
    found = block(PAGE.read_text(encoding="utf-8"))
    assert found is not None, "the page has lost the table's markers"
    assert found.group().strip() == table(), "run python tests/support/compatibility.py --write"
