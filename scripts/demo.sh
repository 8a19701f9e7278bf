#!/usr/bin/env bash
# Sets up everything and runs the main job: fine-tune ResNet-20 under several recipes and compare them.
# Usage: scripts/demo.sh [arguments of `quantrain finetune`], for example scripts/demo.sh --quick
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
echo "demo: quantrain finetune $*"
exec .venv/bin/quantrain finetune "$@"
