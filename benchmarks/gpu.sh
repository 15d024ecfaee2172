#!/usr/bin/env bash
# The GPU's tests and benchmarks on a machine without network, in ten minutes: Python 3.11 or newer that has torch 2.11 or newer,
# and the wheels of everything else in a folder, which a machine with network fills by
#   pip download -d wheels --python-version 3.12 --only-binary=:all: $(sed -n 's/^packages="\(.*\)"/\1/p' benchmarks/gpu.sh)
#   rm -f wheels/torch-* wheels/nvidia_* wheels/triton-*
# Usage: bash benchmarks/gpu.sh [WHEELS [PYTHON]]
set -euo pipefail
cd "$(dirname "$0")/.."
packages="tensorly opt_einsum safetensors packaging numpy pytest hypothesis peft lycoris-lora transformers accelerate psutil"

"${2:-python3}" -m venv --system-site-packages .venv-gpu
.venv-gpu/bin/python -m pip install -q --no-index --find-links "${1:-wheels}" $packages
export PYTHONPATH="$PWD:$PWD/backends"
timeout 120 .venv-gpu/bin/python -m pytest -m gpu -p no:cacheprovider || echo "the tests failed or took too long"
timeout 470 .venv-gpu/bin/python benchmarks/gpu.py --device cuda --minutes 7 --out "${OUT:-benchmarks/results}/gpu-cuda.json"
