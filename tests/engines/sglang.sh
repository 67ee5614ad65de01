#!/usr/bin/env bash
# sglang.sh [VERSION ...]: the storage in each of these releases of SGLang, on a machine without a GPU (default: the newest that is
# known to work). SGLang's Python files and what they import are unpacked under build/engines; kvtide's package and torch are those of
# KVTIDE_PYTHON (default: the environment of tests/run.sh transformers). With that of tests/run.sh engines (build/engines/venv/bin/python), which
# has the web framework too, a real engine runs over kvtided.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${KVTIDE_PYTHON:-build/python/venv-transformers/bin/python}"
[ $# -gt 0 ] || set -- 0.5.23
out="$PWD/build/engines/sglang"
deps="$out/imports"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if [ ! -e "$deps/complete" ]; then
  "$python" -m pip install --quiet --no-deps --target "$deps" -r tests/engines/sglang_requirements.txt
  touch "$deps/complete"
fi
status=0
for version in "$@"; do
  if [ ! -e "$out/$version/sglang" ]; then
    mkdir -p "$out/$version"
    "$python" -m pip download --quiet --no-deps --dest "$out/wheels" "sglang==$version"
    "$python" -m zipfile -e "$out"/wheels/sglang-"$version"-*.whl "$out/$version"
  fi
  echo "SGLang $version"
  PYTHONPATH="$out/$version:$deps" "$python" -m pytest -v -p no:cacheprovider tests/engines/test_sglang.py \
    tests/engines/test_sglang_engine.py tests/python/test_sglang_storage.py ||
    status=$?
done
exit "$status"
