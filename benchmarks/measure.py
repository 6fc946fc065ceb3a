"""Shared by the benchmarks of cost: models, methods, alternating timing, peak memory, a description of the machine.

Weights are random: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PveraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, ViTConfig, ViTForImageClassification

import fvae_lora.layer
from fvae_lora import FVAELoraConfig, objective

METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda r, **where: LoraConfig(r=r, lora_alpha=r, **where),
    "dora": lambda r, **where: LoraConfig(r=r, lora_alpha=r, use_dora=True, **where),
    "pvera": lambda r, **where: PveraConfig(r=r, **where),
    "fvae-lora, decoder 1 x 128": lambda r, **where: FVAELoraConfig(r=r, **where),
    "fvae-lora, decoder 3 x 128": lambda r, **where: FVAELoraConfig(r=r, decoder_hidden_dims=[128] * 3, **where),
    "fvae-lora, elbo_token_fraction 0.25": lambda r, **where: FVAELoraConfig(r=r, elbo_token_fraction=0.25, **where),
    "fvae-lora, elbo_stop_gradient": lambda r, **where: FVAELoraConfig(r=r, elbo_stop_gradient=True, **where),
    "fvae-lora, no ELBO": lambda r, **where: FVAELoraConfig(r=r, elbo_weight=0, **where),
}
OURS = "fvae-lora, decoder 1 x 128"


@dataclass(frozen=True)
class Job:
    """A model, a batch and a method.

    Args:
        method: One of `METHODS`.
        model: ``"vit"``, ViT-B's shape, q and v adapted; or ``"llama"``, every linear layer adapted.
        layers: The model's layers.
        width: Width of its hidden states.
        adapted: Number of adapted layers, counted from the first; ``None`` for all.
        batch: Rows of a batch.
        length: Tokens of a row of text.
        rank: r.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"fp32"``, or ``"bf16"`` or ``"fp16"`` by autocast.
        compiler: Backend of `torch.compile`; ``None`` runs the model eagerly.
    """

    method: str = "lora"
    model: str = "vit"
    layers: int = 12
    width: int = 768
    adapted: int | None = None
    batch: int = 8
    length: int = 512
    rank: int = 16
    device: str = "cpu"
    dtype: str = "fp32"
    compiler: str | None = None

    def base(self) -> PreTrainedModel:
        """The model without adapters."""
        if self.model == "vit":
            heads = max(1, self.width // 64)
            sizes = {"hidden_size": self.width, "intermediate_size": 4 * self.width, "num_attention_heads": heads}
            return ViTForImageClassification(ViTConfig(num_labels=10, num_hidden_layers=self.layers, **sizes))
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=self.width,
            intermediate_size=int(self.width * 8 / 3) // 64 * 64 or 64,
            num_hidden_layers=self.layers,
            num_attention_heads=max(1, self.width // 64),
            max_position_embeddings=max(self.length, 64),
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def adapter(self) -> PeftModel:
        """The adapted model."""
        torch.manual_seed(0)
        where: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        if self.model == "llama":
            where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if self.adapted is not None:  # the modules of "all-linear" by name, in some layers only
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            where |= {"target_modules": names, "layers_to_transform": list(range(self.adapted))}
        return get_peft_model(self.base(), METHODS[self.method](self.rank, **where)).to(self.device)

    def inputs(self) -> dict[str, Tensor]:
        """A batch."""
        if self.model == "vit":
            pixels, labels = torch.randn(self.batch, 3, 224, 224), torch.randint(0, 10, (self.batch,))
            return {"pixel_values": pixels.to(self.device), "labels": labels.to(self.device)}
        ids = torch.randint(0, 4096, (self.batch, self.length), device=self.device)
        return {"input_ids": ids, "labels": ids}


class Steps:
    """A training step (forward, backward, fused AdamW as in the Trainer) and an eval forward of a job."""

    def __init__(self, job: Job) -> None:
        self.job, self.model = job, job.adapter()
        self.run: Any = torch.compile(self.model, backend=job.compiler) if job.compiler else self.model
        self.batch = job.inputs()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(job.dtype)
        self.precision = nullcontext() if half is None else torch.autocast(job.device, half)

    def train(self) -> None:
        """A training step."""
        self.model.train()
        self.optimizer.zero_grad()
        with self.precision:
            loss = self.run(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self._wait()

    @torch.no_grad()
    def evaluate(self) -> None:
        """An eval forward."""
        self.model.eval()
        with self.precision:
            self.run(**self.batch)
        self._wait()

    def _wait(self) -> None:
        if self.job.device == "cuda":
            torch.cuda.synchronize()


def in_turns(actions: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every action.

    The actions alternate, so that drift affects all of them equally, and each turn starts with another one, so that
    what an action leaves in memory and caches does.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()  # warm-up, and compilation
        action()
    names = list(actions)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            actions[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], reference: str = "lora") -> dict[str, dict[str, float]]:
    """For each action the median time, and median and quartiles of its ratios to the reference in the same turn."""
    found = {}
    for name, values in seconds.items():
        paired = sorted(a / b for a, b in zip(values, seconds[reference], strict=True))
        low, _, high = statistics.quantiles(paired, n=4) if len(paired) > 1 else paired * 3
        found[name] = {
            "seconds": round(statistics.median(values), 4),
            "ratio": round(statistics.median(paired), 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }
    return found


def flops(job: Job) -> int:
    """Floating-point operations in the matrix products of a training step by the plain path, which repeats none.

    The step itself adds its products in place, which torch's counter does not count.
    """
    steps, run = Steps(job), fvae_lora.layer.run  # type: ignore[attr-defined]
    fvae_lora.layer.run = objective.run  # type: ignore[attr-defined]
    try:
        with FlopCounterMode(display=False) as counter:
            steps.train()
    finally:
        fvae_lora.layer.run = run  # type: ignore[attr-defined]
    return counter.get_total_flops()


def peak_bytes(job: Job) -> int:
    """Peak memory of two training steps beyond the loaded model, including gradients and the optimizer's state.

    Measured in a separate process: on a CPU as the increase of resident memory from before the steps to its peak, with
    an allocator that returns memory at once; on a GPU by torch's allocator.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, json.dumps(asdict(job)), str(torch.get_num_threads())]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return int(printed.split()[-1])


def _measure_peak(job: Job) -> int:
    steps = Steps(replace(job, compiler=None))
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps.train()
        steps.train()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _resident("VmRSS")
    steps.train()
    steps.train()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions of the libraries."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*:\s*(.+)", text)
    described: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        described["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return described | {name: version(name) for name in ("torch", "transformers", "peft")}


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks of cost share."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=10, help="repetitions of each measurement")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(_measure_peak(Job(**json.loads(sys.argv[1]))))
