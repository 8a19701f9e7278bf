#!/usr/bin/env bash
# Where there is a GPU: runs benchmarks/studies/gradient_quant/study.py part by part. Each part writes its JSON after every row, stops
# by itself at its time limit and does not stop the others by failing; the log holds its traceback. Fails where a part fails.
# Usage: scripts/gpu_study.sh [PART ...]    parts: check variance step accuracy (default: all, in this order)
#   check: the whole study in a tiny form on the GPU (random data), so that a broken capture shows within a minute
# Environment: that of scripts/gpu_common.sh, QUANTRAIN_DATA (default build/study_data where that is), CHECK_SECONDS, VARIANCE_SECONDS,
#   STEP_SECONDS, ACCURACY_SECONDS (limits: 90, 75, 60, 480), EPOCHS (default: what the limit leaves time for), JOBS (4), SEEDS (3)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# shellcheck source=scripts/gpu_common.sh
. scripts/gpu_common.sh

packages "$PWD/build/gpu_extra" # packages that the machine lacks (Pillow), made by pip install --target build/gpu_extra
data "$PWD/build/study_data"
needs_gpu
needs_cuda_build

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
log="$results/gradient-quant-study.log"
: >"$log"

[ $# -gt 0 ] || set -- check variance step accuracy
for name in "$@"; do
  case $name in
    check) study "${CHECK_SECONDS:-90}" gradient_quant all --quick --data random --recipes fqt-bhq5,fqt-ptq4 --jobs 2 --out "$(mktemp -d)" --no-page ;;
    variance) study "${VARIANCE_SECONDS:-75}" gradient_quant variance --out "$results" ;;
    step) study "${STEP_SECONDS:-60}" gradient_quant step --out "$results" ;;
    accuracy)
      study "${ACCURACY_SECONDS:-480}" gradient_quant accuracy --out "$results" --jobs "${JOBS:-4}" --seeds "${SEEDS:-3}" \
        ${EPOCHS:+--epochs "$EPOCHS"}
      ;;
    *) fail "expected check, variance, step or accuracy, got $name" ;;
  esac
done
say "results and log in $results"
exit "$failed"
