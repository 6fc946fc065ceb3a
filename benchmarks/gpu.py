"""Checks FVAE-LoRA on a GPU: correctness, and cost relative to LoRA. Run by `gpu.sh`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fvae_lora.layer
from fvae_lora import objective
from fvae_lora.kernels import run as kernel
from measure import OURS, Job, Steps, in_turns, machine, peak_bytes, ratios

LIMIT = 540.0  # seconds; measurements that would start later are left out, and the record says so
TINY = Job(method=OURS, layers=2, width=64, batch=2)
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}  # relative to the gradient's norm, against fp32 on the CPU


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss, on the CPU, in double."""
    model.zero_grad()
    loss().backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference between two models' gradients, relative to the norm of the expected ones."""
    assert found.keys() == expected.keys()
    off = sum((found[name] - expected[name]).square().sum() for name in expected)
    return float((off / sum(g.square().sum() for g in expected.values())).sqrt())


def correctness(device: str, compiler: str) -> dict[str, str]:
    """Compare gradients of the loss with the ELBO on the device, in every mode, with the plain path on the CPU."""
    noise, objective.standard_normal = objective.standard_normal, _fixed_noise
    found: dict[str, str] = {}
    try:
        for model in ("vit", "llama"):
            job = replace(TINY, model=model, length=16)
            reference, batch = job.adapter().train(), job.inputs()
            fvae_lora.layer.run = objective.run  # type: ignore[attr-defined]
            expected = gradients(reference, lambda: reference(**batch).loss)  # noqa: B023
            fvae_lora.layer.run = kernel.run  # type: ignore[attr-defined]
            there = replace(job, device=device).adapter().train()
            there.load_state_dict(reference.state_dict())
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            for dtype, tolerance in TOLERANCE.items():
                for compiled in (False, True):
                    name = f"{model}, {dtype}{', compiled' if compiled else ''}"
                    run: Any = torch.compile(there, backend=compiler) if compiled else there
                    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
                    cast = torch.autocast(device, half, enabled=dtype != "fp32")

                    def loss() -> Tensor:
                        with cast:  # noqa: B023
                            return run(**moved).loss  # noqa: B023

                    found[name] = _tried(lambda: _close(gradients(there, loss), expected, tolerance))  # noqa: B023
                    torch.compiler.reset()
    finally:
        objective.standard_normal = noise
    return found


def _fixed_noise(x: Tensor, dims: int, parameter: Tensor) -> Tensor:
    """Replaces the noise, which would differ between devices."""
    shape = (*x.shape[:-1], dims)
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=x.device).reshape(shape)


def _close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str:
    error = farthest(found, expected)
    return f"{'right' if error < tolerance else 'WRONG'} (error {error:.1e})"


def _tried(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:  # is reported; the other checks still run
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def four_bits(device: str) -> str:
    """A training step on a model in 4 bits, if bitsandbytes is there."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return "not installed"
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from fvae_lora import FVAELoraConfig

    with tempfile.TemporaryDirectory() as folder:
        job = replace(TINY, model="llama", length=16, device=device)
        job.base().save_pretrained(folder)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map=device)
    model = get_peft_model(base, FVAELoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).train()
    found = gradients(model, lambda: model(**job.inputs()).loss)
    return "right" if found and all(g.isfinite().all() for g in found.values()) else "WRONG"


def synchronisations(device: str) -> dict[str, int] | str:
    """How often a training step waits for the device, without the optimizer, by method."""
    if device != "cuda":
        return "needs a GPU"
    counts = {}
    for method in ("lora", OURS):
        steps = Steps(replace(TINY, method=method, device=device))
        steps.train()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steps.run(**steps.batch).loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        counts[method] = sum("synchroniz" in str(warning.message) for warning in caught)
    return counts


def several_processes(device: str) -> str:
    """Check that DistributedDataParallel, on all GPUs or in two CPU processes, gives the whole batch's gradients."""
    count = torch.cuda.device_count() if device == "cuda" else 2
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        __file__,
        "--rank-of",
        device,
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=180, check=False)
    return f"{count} processes: " + ("right" if done.returncode == 0 else f"FAILED: {done.stderr.strip()[-200:]}")


def _one_rank(device: str) -> None:
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    place = f"cuda:{rank}" if device == "cuda" else "cpu"
    objective.standard_normal = lambda x, dims, _: x.new_zeros(*x.shape[:-1], dims)
    model = replace(TINY, device=place).adapter().train()
    batch = {name: tensor.to(place) for name, tensor in replace(TINY, batch=2 * world).inputs().items()}
    for tensor in batch.values():
        dist.broadcast(tensor, 0)
    expected = gradients(model, lambda: model(**batch).loss)
    model.zero_grad()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    mine = {name: tensor[2 * rank : 2 * rank + 2] for name, tensor in batch.items()}
    wrapped(**mine).loss.backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    assert farthest(found, expected) < 1e-3
    dist.barrier()  # nobody leaves while another still reduces
    del wrapped
    dist.destroy_process_group()


def cost(device: str, compiler: str, tiny: bool, began: float) -> list[dict[str, Any]]:
    """Time and memory of a training step relative to LoRA's."""
    vit = Job(batch=64, device=device, dtype="bf16")
    llama = Job(model="llama", layers=16, width=2048, batch=4, length=1024, device=device, dtype="bf16")
    jobs = {"ViT-B/16, batch 64": vit, "Llama of 1B, 4 x 1024 tokens": llama}
    if tiny:
        jobs = {"a tiny ViT": replace(TINY, device=device), "a tiny Llama": replace(TINY, model="llama", length=16)}
    rows = []
    for name, job in jobs.items():
        for compiled in (False, True):
            if time.monotonic() - began > LIMIT:
                rows.append({"job": name, "compiled": compiled, "left_out": "no time"})
                continue
            methods = ("lora", OURS, "dora")
            built = {m: Steps(replace(job, method=m, compiler=compiler if compiled else None)) for m in methods}
            times = ratios(in_turns({m: steps.train for m, steps in built.items()}, 3 if tiny else 20))
            del built
            memory = {} if compiled else {m: peak_bytes(replace(job, method=m)) for m in methods}
            for method, found in times.items():
                row = {"job": name, "compiled": compiled, "method": method, **found}
                if memory:
                    row["memory_ratio"] = round(memory[method] / memory["lora"], 3)
                rows.append(row)
            torch.compiler.reset()
    return rows


def main() -> None:
    """Run all checks, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models, to check that the script works")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="where to write the record")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.rank_of:
        _one_rank(chosen.rank_of)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not chosen.tiny:
        raise SystemExit("gpu.sh: no GPU that torch can use; --tiny tries the script on a CPU")
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
    compiler = "inductor" if device == "cuda" else "aot_eager"  # compiling C++ only takes time here
    began = time.monotonic()
    record: dict[str, Any] = {
        "machine": machine(device),
        "tiny": chosen.tiny,
        "correctness": correctness(device, compiler),
    }
    record["correctness"]["4 bits"] = _tried(lambda: four_bits(device))
    record["correctness"]["processes"] = _tried(lambda: several_processes(device))
    record["synchronisations of a step"] = synchronisations(device)
    record["cost"] = cost(device, compiler, chosen.tiny, began)
    record["seconds"] = round(time.monotonic() - began)
    chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, verdict in record["correctness"].items():
        print(f"{name:34}{verdict}")
    print(f"{'synchronisations of a step':34}{record['synchronisations of a step']}")
    for row in record["cost"]:
        how = "compiled" if row["compiled"] else "eager"
        what = row.get("left_out") or f"{row['method']:30}{row['seconds']:8.4f} s{row['ratio']:8.3f}"
        print(f"{row['job']:30}{how:10}{what}{row.get('memory_ratio', ''):>10}")
    wrong = [name for name, verdict in record["correctness"].items() if "WRONG" in verdict or "FAILED" in verdict]
    raise SystemExit(f"wrong or failed: {', '.join(wrong)}" if wrong else None)


if __name__ == "__main__":
    main()
