"""Sharded (FSDP2) and replicated (accelerate) training, and mixed precision, outside transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import sharded_worker
from by_hand import adapted, assert_same, collated, gradients, loss_by_hand
from tiny import batch_for, tiny_bert
from torchrun import torchrun

pytestmark = pytest.mark.usefixtures("without_noise")
WAYS = ["fsdp2", "accelerate"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one launch of two processes wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    run = torchrun(sharded_worker.__file__, str(folder))
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_gradients_of_one(way: str, written: Path) -> None:
    model = sharded_worker.model_of_all()
    expected = gradients(model, lambda: loss_by_hand(model, [collated(sharded_worker.ROWS)]))
    assert_same(load_file(written / f"{way}.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_saved_adapter_is_complete(way: str, written: Path, tmp_path: Path) -> None:
    model = sharded_worker.model_of_all()
    model.save_pretrained(tmp_path)
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, written / way))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    base = tiny_bert(torch.float64)
    base.load_state_dict(sharded_worker.model_of_all().unload().state_dict())
    loaded = PeftModel.from_pretrained(base, written / way, autocast_adapter_dtype=False).eval()
    batch = batch_for(base)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_half_precision_and_a_scaler() -> None:
    """bf16 autocast with a scaled loss: gradients are those of fp32, as far as bf16 goes."""
    model = adapted("bert", torch.float32)
    batch = batch_for(model.get_base_model())
    expected = gradients(model, lambda: model(**batch).loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        return scaler.scale(loss)

    found = {name: gradient / 2**10 for name, gradient in gradients(model, scaled).items()}
    assert_same(found, expected, 0.1)


def test_a_step_that_overflows_is_skipped() -> None:
    model = adapted("bert", torch.float32)
    batch = batch_for(model.get_base_model())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler.scale(model(**batch).loss * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    scaler.scale(model(**batch).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("decoder" in name for name in changed)
    assert all(p.isfinite().all() for p in model.parameters())
