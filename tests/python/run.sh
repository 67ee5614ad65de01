#!/usr/bin/env bash
# Builds the wheel, installs it into a clean virtual environment and runs the tests of the package there. Then builds the sdist,
# installs it from its archive alone into another clean environment, and uses it.
#   tests/run.sh python [pytest arguments ...]
#   tests/run.sh python --full [...]          and then runs tests/run.sh transformers
#   tests/run.sh sdist                        the sdist alone
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

if [ "$stage" != sdist ]; then
  cmake --preset dev >/dev/null
  cmake --build --preset dev --target kvtided
fi
export KVTIDE_TEST_PROGRAMS="$PWD/build/dev/daemon"

# Compiler and flags of the dev preset, so that the compiler cache has most objects already.
export CC="${CC:-cc}" CXX="${CXX:-c++}"

# The archive that an index would offer holds all that the package is built from: nothing else is at hand where it is compiled.
check_sdist() {
  rm -rf "$out/sdist" "$out/venv-sdist"
  "$python" -m venv "$out/venv-sdist"
  "$out/venv-sdist/bin/python" -m pip install --quiet build
  "$out/venv-sdist/bin/python" -m build --sdist --outdir "$out/sdist" . >/dev/null
  "$python" -m venv --clear "$out/venv-sdist"
  # pip compiles in a folder of its own; with this base its objects are those of the wheel above.
  CCACHE_BASEDIR="$(realpath "${TMPDIR:-/tmp}")" "$out/venv-sdist/bin/python" -m pip install --quiet "$out"/sdist/kvtide-*.tar.gz \
    -C cmake.define.CMAKE_CXX_FLAGS=-g1 -C cmake.define.KVTIDE_WERROR=ON
  (cd "$out/sdist" && ../venv-sdist/bin/python - <<'PYTHON'
import numpy
import kvtide

assert "venv-sdist" in kvtide.__file__, kvtide.__file__
with kvtide.connect("embedded", device="cpu", device_memory="8MiB", host_memory=0) as pool:
    pool.register("m", [kvtide.Layer(2, 64, 4)])
    tokens = lambda heads: numpy.ones((100, heads, 64), numpy.float32)
    assert pool.create("m", pair="q8_0/turbo4").append_attend(0, tokens(4), tokens(2), tokens(2)).shape == (100, 4, 64)
print(kvtide.plan("llama-3.1-8b", "RTX 3060", weights="q4_0")[131072].reason)
PYTHON
  )
  echo "sdist: $(stat -c %s "$out"/sdist/kvtide-*.tar.gz) bytes, builds, installs and works"
}
if [ "$stage" = sdist ]; then
  check_sdist
  exit
fi
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
    check_sdist
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
if [ "$full" = yes ]; then "$0" transformers; fi
