#!/usr/bin/env bash
# Tests and benchmarks of the GPU kernels, in under nine minutes: benchmarks/gpu.sh [folder for the results].
# Needs a python with torch (CUDA), triton, pytest and hypothesis (with pytest-xdist the tests take a quarter of the time), and for the CUDA kernels
# nvcc and g++; nothing is installed and nothing is downloaded. TEST_SECONDS, SANITIZE_SECONDS and BENCH_SECONDS are the limits of its parts; 0 leaves one out.
# SANITIZE_TOOLS=racecheck adds a tool to memcheck (racecheck did not end in 35 seconds on an H200).
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-benchmarks/results}}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET FUSEWIRE_BACKEND
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,power.draw,temperature.gpu --format=csv | tee "$out/gpu-before.csv"
timeout 60 "$python" benchmarks/build_cuda.py 2>&1 | tee "$out/gpu-build.txt"  # without it the rows of csrc/cuda are left out
tests=0
if [ "${TEST_SECONDS:-290}" -gt 0 ]; then
  workers=$("$python" -c "import xdist, os; print('-n', min(os.cpu_count(), 14), '--dist loadgroup')" 2>/dev/null)
  # TESTS names other files. The GPU's own tests, and those of the Triton and CUDA rooms that run in the interpreter and on the CPU elsewhere.
  FUSEWIRE_TEST_DEVICE=cuda OMP_NUM_THREADS=1 timeout -s INT -k 5 "${TEST_SECONDS:-290}" "$python" -m pytest -m "gpu or not slow" $workers tests/gpu \
    ${TESTS:-$(ls tests/kernels/*/test_*triton*.py tests/kernels/*/test_*cuda*.py tests/kernels/sampler_step/test_solver_kernels.py tests/kernels/test_contract.py tests/kernels/test_plans.py | grep -v attention/test_cuda)} \
    -vv -p no:cacheprovider --tb=short -rf >"$out/gpu-tests.txt" 2>&1  # -vv, as pyproject.toml says -q: names what failed even where the time runs out
  tests=$?
  { grep FAILED "$out/gpu-tests.txt" | head -n 30; tail -n 40 "$out/gpu-tests.txt"; } | cut -c1-220
fi
# Accesses outside of an allocation and races, where the tool is there and the machine lets it look; its exit status is the script's.
sanitizer=0
if [ "${SANITIZE_SECONDS:-30}" -gt 0 ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck ${SANITIZE_TOOLS:-}; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZE_SECONDS:-30}" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu_sanitize.py >"$out/gpu-$tool.txt" 2>&1
    code=$?
    echo "compute-sanitizer $tool: exit status $code"
    tail -n 2 "$out/gpu-$tool.txt"
    [ "$code" -eq 0 ] || [ "$code" -eq 124 ] || sanitizer=$code
  done
fi
status=0
if [ "${BENCH_SECONDS:-160}" -gt 0 ]; then
  timeout $((${BENCH_SECONDS:-160} + 30)) "$python" benchmarks/gpu.py --seconds "${BENCH_SECONDS:-160}" --tests "$tests" --json "$out/gpu.json"
  status=$?
fi
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv | tee "$out/gpu-after.csv"
[ "$tests" -eq 0 ] || exit "$tests"
[ "$sanitizer" -eq 0 ] || exit "$sanitizer"
exit "$status"
