#!/usr/bin/env bash
# Where there is a GPU: runs benchmarks/studies/gradient_quant/study.py part by part. Each part writes its JSON after every row, stops
# by itself at its time limit and does not stop the others by failing; the log holds its traceback. Fails where a part fails.
# Usage: scripts/gpu_study.sh [PART ...]    parts: check variance step accuracy (default: all, in this order)
#   check: the whole study in a tiny form on the GPU (random data), so that a broken capture shows within a minute
# Environment: PYTHON (an interpreter with torch 2.11; default .venv's, else python3), RESULTS (folder of the results; default
#   benchmarks/results), QUANTRAIN_DATA (default build/study_data where that is), CHECK_SECONDS, VARIANCE_SECONDS, STEP_SECONDS,
#   ACCURACY_SECONDS (limits: 90, 75, 60, 480), EPOCHS (default: what the limit leaves time for), JOBS (4), SEEDS (3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

say() { printf 'gpu_study: %s\n' "$*"; }
fail() {
  printf 'gpu_study: %s\n' "$*" >&2
  exit 1
}

python=${PYTHON:-}
for candidate in "$PWD/.venv/bin/python" python3; do
  if [ -z "$python" ] && "$candidate" -c 'import torch; assert torch.__version__.startswith("2.11.")' 2>/dev/null; then
    python=$candidate
  fi
done
[ -n "$python" ] || fail "no Python with torch 2.11: run scripts/setup.sh, or set PYTHON"
[ -d build/gpu/site ] && export PYTHONPATH="$PWD/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}"
if [ -d build/gpu_extra ]; then # packages that the machine lacks (Pillow), made by pip install --target build/gpu_extra
  export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD/build/gpu_extra"
fi
if [ -z "${QUANTRAIN_DATA:-}" ] && [ -d build/study_data ]; then export QUANTRAIN_DATA=$PWD/build/study_data; fi
"$python" -c 'import sys, torch, quantrain; sys.exit(not (quantrain._C.built_with_cuda and torch.cuda.is_available()))' ||
  fail "no GPU here, or the quantrain that $python imports has no CUDA kernels"

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
results=${RESULTS:-benchmarks/results}
mkdir -p "$results"
log="$results/gradient-quant-study.log"
: >"$log"
failed=0

# part SECONDS ARGUMENTS...: the part's own limit, and a hard one 20 seconds later.
part() {
  local seconds=$1
  shift
  say "$* (limit $seconds s)" | tee -a "$log"
  timeout --kill-after=5 $((seconds + 20)) "$python" benchmarks/studies/gradient_quant/study.py "$@" --device cuda \
    --seconds "$seconds" 2>&1 | tee -a "$log"
  local status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    say "FAILED with status $status: $*" | tee -a "$log"
    failed=1
  fi
}

[ $# -gt 0 ] || set -- check variance step accuracy
for name in "$@"; do
  case $name in
    check) part "${CHECK_SECONDS:-90}" all --quick --data random --recipes fqt-bhq5,fqt-ptq4 --jobs 2 --out "$(mktemp -d)" --no-page ;;
    variance) part "${VARIANCE_SECONDS:-75}" variance --out "$results" ;;
    step) part "${STEP_SECONDS:-60}" step --out "$results" ;;
    accuracy)
      part "${ACCURACY_SECONDS:-480}" accuracy --out "$results" --jobs "${JOBS:-4}" --seeds "${SEEDS:-3}" \
        ${EPOCHS:+--epochs "$EPOCHS"}
      ;;
    *) fail "expected check, variance, step or accuracy, got $name" ;;
  esac
done
say "results and log in $results"
exit "$failed"
