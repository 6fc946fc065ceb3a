"""Two processes give the gradient of one that has the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import distributed_worker
from by_hand import Batch, Gradients, assert_same, collated, elbo_by_hand, gradients, labels_in, loss_by_hand
from torchrun import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_noise")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Gradients by case and parameter, from one launch for all cases."""
    target = tmp_path_factory.mktemp("distributed") / "gradients.safetensors"
    run = torchrun(distributed_worker.__file__, str(target))
    assert run.returncode == 0, run.stderr[-3000:]
    return load_file(target)


def of_micro_batches(model: Any, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """What each process can know by itself: means over micro-batches, weighted by their labels; task and ELBO."""
    shifted = model.get_base_model().loss_type == "ForCausalLM"
    counts = [labels_in(batch, shifted) for batch in batches]
    elbos, outputs = zip(*(elbo_by_hand(model, [batch]) for batch in batches), strict=True)
    task = sum(output[0].loss * count for output, count in zip(outputs, counts, strict=True)) / sum(counts)
    return task, sum(elbo * count for elbo, count in zip(elbos, counts, strict=True)) / sum(counts)


def expected(case: tuple[str, str, str, int]) -> Gradients:
    kind, trainer, settings, average = case
    model, rows = distributed_worker.model_and_rows(kind)
    micro_batches = [collated(rows[i : i + 2]) for i in range(0, 8, 2)]
    ranks = [micro_batches[0::2], micro_batches[1::2]]

    def loss() -> Tensor:
        if settings == "smoothed":
            batch = collated(rows)
            elbo, (output,) = elbo_by_hand(model, [batch])
            return F.cross_entropy(output.logits, batch["labels"], label_smoothing=0.2) + elbo
        if trainer == "ours" and (average or kind != "llama"):
            return loss_by_hand(model, [collated(rows)])
        groups = [micro_batches] if average else ranks
        tasks, elbos = zip(*(of_micro_batches(model, group) for group in groups), strict=True)
        elbo = elbo_by_hand(model, micro_batches)[0] if trainer == "ours" else sum(elbos) / len(elbos)
        return sum(tasks) / len(tasks) + elbo

    return gradients(model, loss)


@pytest.mark.parametrize("case", distributed_worker.CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes(case: tuple[str, str, str, int], found: dict[str, Tensor]) -> None:
    prefix = "/".join(map(str, case)) + ":"
    of_case = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    # llama rounds to fp32 inside, and so does transformers' label smoother
    assert_same(of_case, expected(case), 1e-6 if case[0] == "llama" or case[2] == "smoothed" else 1e-10)
