#!/usr/bin/env bash
# Checks the style and the layers: clang-format, ruff, shellcheck, scripts/check_layers.py. Runs all, fails where one fails.
# Usage: scripts/check_style.sh [--fix]     --fix rewrites what clang-format and ruff can
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PATH="$PWD/${STYLE_VENV:-.venv}/bin:$PATH"
python -m pip install --quiet --disable-pip-version-check -r scripts/requirements-style.txt

mapfile -t cpp < <(git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')
mapfile -t shell < <(git ls-files '*.sh' .ci/run)
if [ "${1:-}" = --fix ]; then
  clang-format -i "${cpp[@]}"
  ruff check --quiet --fix . || true
  ruff format --quiet .
fi

failed=0
echo "style: clang-format over ${#cpp[@]} files"
clang-format --dry-run -Werror "${cpp[@]}" || failed=1
echo "style: ruff"
ruff check . || failed=1
ruff format --check . || failed=1
echo "style: shellcheck over ${#shell[@]} files"
shellcheck "${shell[@]}" || failed=1
python scripts/check_layers.py || failed=1
exit "$failed"
