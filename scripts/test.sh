#!/usr/bin/env bash
# Sets up with the C++ tests and examples, then runs every test: ctest, then pytest with a minute of drawn cases, a process per core, and
# the thirty slowest named. Fails where either fails.
# Usage: scripts/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh --tests
export PATH="$PWD/.venv/bin:$PATH"
if [ -z "${QUANTRAIN_DATA:-}" ] && [ -d ../shared/data ]; then
  QUANTRAIN_DATA=$(cd ../shared/data && pwd)
  export QUANTRAIN_DATA
fi

echo "test: ctest in build/package"
failed=0
ctest --test-dir build/package --output-on-failure --no-tests=error || failed=1
echo "test: pytest in tests/python and tests/fuzz"
# A thread per process: two processes of two threads each would wait for one another.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest tests/python tests/fuzz -n "$(nproc)" --dist worksteal --durations=30 "$@" ||
  failed=1 # exit 5, nothing collected, is a failure too
[ "$failed" = 0 ] || echo "test: there are failures, see above"
exit "$failed"
