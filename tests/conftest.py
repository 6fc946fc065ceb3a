"""What every test starts from; the models themselves are in ``support/tiny.py``."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from torch import Tensor

import fvae_lora.objective
from fvae_lora.vae import raised

GOLDEN = Path(__file__).parent / "data" / "golden"

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    transformers.set_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Threads cost tiny models more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def golden() -> Path:
    """Numbers that the reference implementation computed."""
    return GOLDEN


@pytest.fixture
def with_noises(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Tensor]], list[Tensor]]:
    """Make the method draw given noises, in this order; the returned list holds those still to be drawn."""

    def use(noises: list[Tensor]) -> list[Tensor]:
        left = list(noises)

        def given(x: Tensor, dims: int, parameter: Tensor) -> Tensor:
            return left.pop(0).to(parameter).reshape(*x.shape[:-1], dims)

        monkeypatch.setattr(fvae_lora.objective, "standard_normal", given)
        return left

    return use


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is its mean: what two runs differ in is then not the noise."""

    def zeros(x: Tensor, dims: int, parameter: Tensor) -> Tensor:
        return raised(x.new_zeros(*x.shape[:-1], dims, dtype=parameter.dtype))

    monkeypatch.setattr(fvae_lora.objective, "standard_normal", zeros)
