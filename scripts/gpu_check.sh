#!/usr/bin/env bash
# Where there is a GPU: runs every pytest test marked cuda, every Catch2 test tagged [cuda], two minutes of drawn cases (tests/fuzz, CPU
# against CUDA) and every benchmarks/bench_*.py, and writes benchmarks/results/<gpu>-<date>.txt. Fails where one of them fails; the file is
# written all the same.
# Usage: scripts/gpu_check.sh [--build-only]
#   --build-only   only makes build/gpu (needs nvcc, no GPU), to be carried to the machine with the GPU
# It uses build/gpu where that is, else the quantrain of .venv where that has CUDA, else it makes build/gpu.
# Environment: that of scripts/gpu_common.sh, FUZZ_SEED (of the drawn cases; default the time, told in the file), FUZZ_SECONDS
# (default 120)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/gpu_common.sh
. scripts/gpu_common.sh

PATH="$(dirname "$(command -v "$python")"):/usr/local/cuda/bin:$PATH"
export PATH

# Builds library, Python module and C++ tests into build/gpu, and lays the package out in build/gpu/site.
build() {
  command -v nvcc >/dev/null || fail "no nvcc: install a CUDA toolkit of torch's major version, or carry build/gpu here"
  say "building build/gpu"
  local tests=ON
  [ -e /usr/include/catch2/catch.hpp ] || tests=OFF # without Debian's catch2 the C++ tests are left out
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DQUANTRAIN_CUDA=ON -DQUANTRAIN_BUILD_TESTS="$tests" \
    -DQUANTRAIN_BUILD_EXAMPLES=ON -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')"
  cmake --build build/gpu
  rm -rf build/gpu/site
  mkdir -p build/gpu/site
  cp -r python/quantrain build/gpu/site/quantrain
  cmake --install build/gpu --prefix build/gpu/site/quantrain >/dev/null
}

if [ "${1:-}" = --build-only ]; then
  build
  exit 0
fi
needs_gpu
if [ -d build/gpu/site ]; then
  say "using build/gpu"
elif cuda_build; then
  say "using the quantrain that $python has"
else
  build
fi
# shellcheck disable=SC2119  # no folders beside build/gpu
packages
needs_cuda_build
libraries=$(library_path)
file="$results/$(tr '[:upper:] ' '[:lower:]-' <<<"$gpu")-$(date +%F).txt"

section() { printf '\n## %s\n' "$*"; }

# Runs one command under its own heading; a failure is noted and the next one still runs.
record() {
  section "$*"
  "$@" 2>&1 || {
    echo "FAILED with status $?: $*"
    touch "$file.failed"
  }
}

report() {
  head_of quantrain
  "$python" -c 'import torch; print(f"torch    {torch.__version__}, CUDA {torch.version.cuda}")'
  local examples=build/gpu/examples/cpp
  if [ -x "$examples/train_gpt" ]; then
    export QUANTRAIN_EXAMPLES_DIR="$PWD/$examples" QUANTRAIN_TRAIN_GPT="$PWD/$examples/train_gpt"
  fi
  LD_LIBRARY_PATH="$libraries" record "$python" -m pytest -q -m cuda tests/python
  for test in build/gpu/tests/cpp/*; do
    if [ -f "$test" ] && [ -x "$test" ]; then LD_LIBRARY_PATH="$libraries" record "$test" "[cuda]"; fi
  done
  LD_LIBRARY_PATH="$libraries" record "$python" tests/fuzz/run.py --device cuda --seconds "${FUZZ_SECONDS:-120}" \
    --seed "${FUZZ_SEED:-$(date +%s)}" --workers "$(nproc)"
  for bench in benchmarks/bench_*.py; do
    LD_LIBRARY_PATH="$libraries" record "$python" "$bench" --device cuda
  done
}

rm -f "$file.failed"
report | tee "$file"
if [ -e "$file.failed" ]; then
  rm -f "$file.failed"
  failed=1
fi
say "wrote $file"
exit "$failed"
