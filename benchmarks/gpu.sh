#!/usr/bin/env bash
# Checks a machine with a GPU, torch, transformers, peft and this package in under ten minutes: correctness on the
# device, NCCL, cost relative to LoRA. Prints a short table and writes gpu.json.
#     benchmarks/gpu.sh            # --tiny: the same with tiny models, on a CPU if there is no GPU
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
