#!/usr/bin/env bash
# What a GPU says, in under ten minutes, on a bare machine with torch, transformers, peft and this package:
# correctness on the device, NCCL, cost beside LoRA; a short table, and gpu.json to commit.
#     benchmarks/gpu.sh            # --tiny: the same at a tiny size, on a CPU if there is no GPU
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
