#!/usr/bin/env bash
# Builds the library and the C++ tests with the address and undefined-behaviour sanitizers (preset asan, in build/asan) and runs them:
# once as they are, and the integer kernels once for each CPU path that this processor has. Fails where a test or a sanitizer does.
# Usage: scripts/sanitize.sh      Environment: PYTHON (an interpreter with torch; default .venv's, else python3), JOBS (default: nproc)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python="$PWD/.venv/bin/python"; else python=$(command -v python3); fi
fi

cmake --preset asan -DPython_EXECUTABLE="$python" -DQUANTRAIN_PYTHON="$python" -DQUANTRAIN_BUILD_EXAMPLES=OFF
cmake --build build/asan -j "${JOBS:-$(nproc)}" --target quantrain_tests quantrain_emulated_tests

# Leaks are not looked for: libtorch keeps what it allocates at its start.
export ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
failed=0
run() {
  echo "sanitize: $*"
  "$@" || failed=1
}
run build/asan/tests/cpp/quantrain_emulated_tests
run build/asan/tests/cpp/quantrain_tests '~[cuda]'
for path in plain avx2 avx512 avx_vnni avx512_vnni; do
  # The tests of a path that the processor lacks fail with a message of their own: ask first.
  if QUANTRAIN_CPU_INT8=$path build/asan/tests/cpp/quantrain_tests '[path_is_here]' >/dev/null 2>&1; then
    QUANTRAIN_CPU_INT8=$path run build/asan/tests/cpp/quantrain_tests '[fixed_point_conv],[fixed_point_network],[int8]'
  else
    echo "sanitize: this processor lacks $path"
  fi
done
if [ "$failed" = 0 ]; then echo "sanitize: no error"; else echo "sanitize: there are errors, see above"; fi
exit "$failed"
