#!/usr/bin/env bash
# Real engines on this machine's CPU, with kvtide's wheel: tests/run.sh engines [--releases "0.31.0 ..."] [pytest arguments ...]
# Installs vLLM under build/engines (KVTIDE_ENGINES_VENV: an environment that is there), which takes 5 GB and some minutes; the tests take
# half an hour on two cores. --releases repeats the smoke tests with other releases of vLLM. What came out last is in last_run.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
releases=
if [ "${1:-}" = --releases ]; then
  releases="$2"
  shift 2
fi
venv="${KVTIDE_ENGINES_VENV:-build/engines/venv}"
# shellcheck disable=SC2086
tests/engines/setup.sh "$venv" 0.32.0 $releases
cmake --preset dev >/dev/null
cmake --build --preset dev --target kvtide kvtided
export KVTIDE_TEST_PROGRAMS="$PWD/build/dev/clients/cli" CC="${CC:-cc}" CXX="${CXX:-c++}" PIP_DISABLE_PIP_VERSION_CHECK=1
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir build/engines/dist . -C cmake.define.CMAKE_CXX_FLAGS=-g1 \
  -C cmake.define.KVTIDE_WERROR=ON
"$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps build/engines/dist/kvtide-*.whl
log=build/engines/log.txt
status=0
"$venv/bin/python" -m pytest -v -s -p no:cacheprovider tests/engines "$@" 2>&1 | tee "$log" || status=$?
for version in $releases; do
  PYTHONPATH="$venv/vllm-$version" "$venv/bin/python" -m pytest -v -s -p no:cacheprovider tests/engines -m smoke 2>&1 |
    tee -a "$log" || status=$?
done
tests/engines/record.sh "$log" "tests/run.sh engines: vLLM 0.32.0${releases:+, smoke tests of $releases}"
exit "$status"
