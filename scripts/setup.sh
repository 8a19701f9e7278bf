#!/usr/bin/env bash
# Makes .venv in the checkout and builds and installs quantrain into it. A second run does only what changed.
# Usage: scripts/setup.sh [--tests]     --tests also builds the C++ tests and examples, in build/package
# Environment: PYTHON (interpreter), CXX (compiler), QUANTRAIN_CUDA=AUTO|ON|OFF (AUTO: ON where nvcc and a driver are),
# CUDAARCHS (GPU architectures, as CMake reads it)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHONS="3.10 to 3.14" # what torch 2.11 has wheels for
readonly DEBIAN=(g++ catch2 nlohmann-json3-dev zlib1g-dev ccache dataset-fashion-mnist ca-certificates)
readonly DEBIAN_PYTHON=(python3 python3-venv python3-dev)

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

tests=OFF
for argument in "$@"; do
  case "$argument" in
    --tests) tests=ON ;;
    *) fail "expected --tests or nothing, got $argument" ;;
  esac
done

may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# Installs those of the named Debian packages that are missing and known; reads the package lists at most once.
apt_install() {
  local package missing=() known=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  if ! may_install; then
    say "not root: going on without the Debian packages ${missing[*]}"
    return
  fi
  if [ -z "${lists_read:-}" ]; then
    say "reading the Debian package lists"
    apt-get update -qq || say "apt-get update failed, using the lists that are there"
    lists_read=1
  fi
  for package in "${missing[@]}"; do
    if apt-cache show "$package" >/dev/null 2>&1; then known+=("$package"); else say "no Debian package $package here"; fi
  done
  [ ${#known[@]} = 0 ] && return
  say "installing the Debian packages ${known[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${known[@]}" >/dev/null ||
    say "apt-get could not install all of ${known[*]}"
}

# Prints the first interpreter that torch supports and that can make an environment and build an extension.
find_python() {
  local candidate check='
import ensurepip, os, sys, sysconfig, venv
ok = (3, 10) <= sys.version_info[:2] <= (3, 14) and os.path.exists(sysconfig.get_path("include") + "/Python.h")
sys.exit(not ok)'
  for candidate in "${PYTHON:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python \
    python3.13 python3.11 python3.10 python3.14 python3; do
    if [ -n "$candidate" ] && "$candidate" -c "$check" >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
}

# A hash of what the named step depends on: settings given as arguments, files given on standard input.
fingerprint() { { printf '%s\n' "$@"; xargs -r -d '\n' sha256sum; } | sha256sum | cut -d ' ' -f 1; }

apt_install "${DEBIAN[@]}"
command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler: install g++ 11 or later, or set CXX"

if ! .venv/bin/python -c '' 2>/dev/null; then
  python=$(find_python)
  if [ -z "$python" ] && may_install; then
    apt_install "${DEBIAN_PYTHON[@]}"
    python=$(find_python)
  fi
  [ -n "$python" ] || fail "no Python $PYTHONS with venv and headers: install python3.12, -venv and -dev, or set PYTHON"
  say "making .venv with $("$python" --version) ($python)"
  "$python" -m venv --clear .venv
fi
version=$(.venv/bin/python -c 'import sys; print(sys.version)')
export PATH="$PWD/.venv/bin:$PATH"

pins=$(echo scripts/requirements.txt | fingerprint "$version")
if [ "$(cat .venv/.quantrain-pins 2>/dev/null)" != "$pins" ]; then
  say "installing the Python packages of scripts/requirements.txt (torch is a download of 2 to 3 GB)"
  python -m pip install --quiet --disable-pip-version-check -r scripts/requirements.txt
  echo "$pins" >.venv/.quantrain-pins
fi

cuda=${QUANTRAIN_CUDA:-AUTO}
toolchain="${CUDAARCHS:-} ${CXX:-c++} $("${CXX:-c++}" -dumpfullversion) $(command -v nvcc || true) $(ls /dev/nvidiactl 2>/dev/null || true)"
inputs=(CMakeLists.txt CMakePresets.json pyproject.toml cmake include csrc ops autograd optim nn amp distill prune python examples tests)
sources=$({ find "${inputs[@]}" -type f ! -name '*.py[co]' ! -path 'tests/python/*' 2>/dev/null || true; } | LC_ALL=C sort)
for built in "$tests" ON; do # a build with tests serves a run without them
  stamp=$(fingerprint "$version" "$pins" "$toolchain" "$cuda" "$built" <<<"$sources")
  if [ "$(cat .venv/.quantrain-build 2>/dev/null)" = "$stamp" ]; then
    say "quantrain in .venv is up to date"
    exit 0
  fi
done
stamp=$(fingerprint "$version" "$pins" "$toolchain" "$cuda" "$tests" <<<"$sources")

if command -v ccache >/dev/null; then
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CMAKE_CUDA_COMPILER_LAUNCHER=ccache
  export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1 CCACHE_SLOPPINESS=pch_defines,time_macros # for precompiled headers
fi
# A file that includes torch's headers takes up to 3 GB: no more jobs than cores, and than memory allows.
memory_gb=$(awk '/MemAvailable/ { print int($2 / 1048576) }' /proc/meminfo 2>/dev/null || echo 6)
jobs=$((memory_gb / 3 < $(nproc) ? memory_gb / 3 : $(nproc)))
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$((jobs > 1 ? jobs : 1))}

say "building and installing quantrain (CUDA $cuda, tests $tests, $CMAKE_BUILD_PARALLEL_LEVEL jobs), log in build/setup.log"
mkdir -p build
python -m pip install --verbose --no-build-isolation --disable-pip-version-check -C build-dir=build/package \
  -C cmake.define.QUANTRAIN_CUDA="$cuda" -C cmake.define.QUANTRAIN_BUILD_TESTS="$tests" \
  -C cmake.define.QUANTRAIN_BUILD_EXAMPLES="$tests" '.[train,data,sst2,hf,onnx,test]' 2>&1 | tee build/setup.log |
  sed -u -nE 's,.*(\[[0-9]+/[0-9]+\]) (Building|Linking) .*[ /]([^ /]+)$,setup:   \1 \3,p' || {
  tail -n 60 build/setup.log >&2
  fail "the build failed, the last lines of build/setup.log are above"
}
python -c 'import quantrain'
echo "$stamp" >.venv/.quantrain-build
say "done: quantrain is in .venv"
