#!/usr/bin/env bash
# Builds the wheel, installs it into a clean virtual environment and runs the tests of the package there.
#   tests/run.sh python [pytest arguments ...]
#   tests/run.sh python --full [...]          builds the sdist too, and then runs tests/run.sh transformers
#   tests/run.sh transformers [...]           what needs torch and transformers, which it installs under build/
#   tests/run.sh llama [...]                  what needs llama-cpp-python, which it compiles, and the models of tests/models.sh
# KVTIDE_VENV names another folder for what the last two install.
# The daemon that the tests talk to is that of the dev preset.
set -euo pipefail
cd "$(dirname "$0")/../.."
stage="$1"
shift
full=no
if [ "${1:-}" = --full ]; then
  full=yes
  shift
fi
python="${PYTHON:-python3}"
out=build/python
jobs="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
export CMAKE_BUILD_PARALLEL_LEVEL="$jobs" PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

cmake --preset dev >/dev/null
cmake --build --preset dev --target kvtided
export KVTIDE_TEST_PROGRAMS="$PWD/build/dev/daemon"

# Compiler and flags of the dev preset, so that the compiler cache has most objects already.
export CC="${CC:-cc}" CXX="${CXX:-c++}"
rm -rf "$out/dist"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/dist" . \
  -C cmake.define.CMAKE_CXX_FLAGS=-g1 -C cmake.define.KVTIDE_WERROR=ON
wheel=$(ls "$out"/dist/kvtide-*.whl)
bytes=$(stat -c %s "$wheel")
echo "$wheel: $bytes bytes"
if [ "$bytes" -gt 30000000 ]; then
  echo "the wheel is larger than 30 MB"
  exit 1
fi

case "$stage" in
  python)
    "$python" -m venv --clear "$out/venv"
    "$out/venv/bin/python" -m pip install --quiet "$wheel[test]"
    "$out/venv/bin/python" -m pytest --quiet --ignore=tests/python/hf --ignore=tests/python/llama tests/python "$@"
    ;;
  transformers)
    venv="${KVTIDE_VENV:-$out/venv-transformers}"
    tests/python/hf/install.sh "$venv"
    "$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
    cmake --build --preset dev --target kvtide
    KVTIDE_MODELS=$(tests/models.sh)
    export KVTIDE_MODELS
    "$venv/bin/python" -m pytest --quiet tests/python/hf tests/python/test_readme.py tests/python/test_vllm_connector_worker.py \
      tests/python/test_sglang_storage.py \
      "$@"
    PYTHONPATH="$venv/oldest" "$venv/bin/python" -m pytest --quiet tests/python/hf \
      -k "not thousand and not eval and not real" "$@"
    ;;
  llama)
    venv="${KVTIDE_VENV:-$out/venv-llama}"
    tests/python/llama/install.sh "$venv"
    "$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
    KVTIDE_MODELS=$(tests/models.sh)
    export KVTIDE_MODELS
    "$venv/bin/python" -m pytest --quiet tests/python/llama "$@"
    ;;
esac
if [ "$full" = yes ]; then
  "$out/venv/bin/python" -m pip install --quiet build
  "$out/venv/bin/python" -m build --sdist --outdir "$out/dist" . >/dev/null
  tar tzf "$out"/dist/kvtide-*.tar.gz | grep -q /clients/cpp/pool.h
  "$0" transformers
fi
