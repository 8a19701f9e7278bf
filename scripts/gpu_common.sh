#!/usr/bin/env bash
# What the scripts for machines with a GPU share. They source it from the root of the repository.
# shellcheck disable=SC2034  # they use what is set here
# Environment: PYTHON (an interpreter with torch 2.11; default .venv's, else python3), RESULTS (folder of the results; default
#   benchmarks/results), COMMIT (what is measured; default what git says)

script=${0##*/}
script=${script%.sh}
say() { printf '%s: %s\n' "$script" "$*"; }
fail() {
  printf '%s: %s\n' "$script" "$*" >&2
  exit 1
}

has_torch() { "$1" -c 'import torch; assert torch.__version__.startswith("2.11.")' 2>/dev/null; }

python=${PYTHON:-}
for candidate in "$PWD/.venv/bin/python" python3; do
  if [ -z "$python" ] && has_torch "$candidate"; then python=$candidate; fi
done
[ -n "$python" ] || fail "no Python with torch 2.11: run scripts/setup.sh, or set PYTHON"

# packages FOLDER...: build/gpu's quantrain goes before other packages, what there is of the folders after them.
packages() {
  local folder
  if [ -d build/gpu/site ]; then export PYTHONPATH="$PWD/build/gpu/site${PYTHONPATH:+:$PYTHONPATH}"; fi
  for folder in "$@"; do
    if [ -d "$folder" ]; then export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$folder"; fi
  done
}

# data FOLDER...: the first that is there is QUANTRAIN_DATA where nothing else is.
data() {
  local folder
  for folder in "$@"; do
    if [ -z "${QUANTRAIN_DATA:-}" ] && [ -d "$folder" ]; then export QUANTRAIN_DATA=$folder; fi
  done
}

cuda_build() { "$python" -c 'import sys, torch, quantrain; sys.exit(not quantrain._C.built_with_cuda)' 2>/dev/null; }

# needs_gpu: sets gpu (its name), slug (its last word), results (the folder, made).
needs_gpu() {
  nvidia-smi >/dev/null 2>&1 || fail "no GPU here: nvidia-smi does not answer"
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
  slug=$(tr '[:upper:]' '[:lower:]' <<<"${gpu##* }")
  results=${RESULTS:-benchmarks/results}
  mkdir -p "$results"
  COMMIT=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
  export COMMIT PYTHONUNBUFFERED=1
}

needs_cuda_build() { cuda_build || fail "the quantrain that $python imports has no CUDA kernels"; }

# head_of WHAT ARGUMENTS: what a result file begins with.
head_of() {
  echo "# $1 on $gpu"
  echo "date     $(date -u +%FT%TZ)"
  echo "command  scripts/$script.sh${2:+ $2}"
  echo "commit   $COMMIT"
  echo "driver   $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
}

# Where this Python has torch's libraries: the C++ tests find them there.
library_path() {
  "$python" - <<'END'
import pathlib, torch
root = pathlib.Path(torch.__file__).parent
print(":".join(map(str, [root / "lib", *root.parent.glob("nvidia/*/lib")])))
END
}

# part SECONDS FILE COMMAND...: runs the command with a limit; its output goes to $log and to FILE. A failure sets failed.
failed=0 log=/dev/null
part() {
  local seconds=$1 file=$2 status
  shift 2
  say "$* (limit $seconds s)" | tee -a "$log"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$log" "$file"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    say "FAILED with status $status: $*" | tee -a "$log"
    failed=1
  fi
}

# study SECONDS NAME ARGUMENTS...: benchmarks/studies/NAME with its own limit, and a hard one 20 seconds later.
study() {
  local seconds=$1 study=$2
  shift 2
  part $((seconds + 20)) /dev/null "$python" "benchmarks/studies/$study/study.py" "$@" --device cuda --seconds "$seconds"
}
