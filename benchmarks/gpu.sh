#!/usr/bin/env bash
# Tests and benchmarks of the GPU kernels, in under nine minutes: benchmarks/gpu.sh [folder for the results].
# Needs a python with torch (CUDA), triton and pytest, and for the CUDA kernels nvcc and g++; nothing is installed and nothing is downloaded.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET FUSEWIRE_BACKEND
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,power.draw,temperature.gpu --format=csv | tee "$out/gpu-before.csv"
timeout 60 "$python" benchmarks/build_cuda.py 2>&1 | tee "$out/gpu-build.txt"  # without it the rows of csrc/cuda are left out
timeout 240 "$python" -m pytest -m gpu tests/gpu -q -p no:cacheprovider 2>&1 | tee "$out/gpu-tests.txt"
tests=${PIPESTATUS[0]}
timeout 220 "$python" benchmarks/gpu.py --seconds 190 --tests "$tests" --json "$out/gpu.json"
status=$?
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv | tee "$out/gpu-after.csv"
[ "$tests" -eq 0 ] && exit "$status"
exit "$tests"
