#!/usr/bin/env bash
# install.sh FOLDER: a virtual environment with torch, the newest transformers, and in FOLDER/oldest the oldest that is supported.
# A machine without a GPU gets the torch of the package index without its 3 GB of CUDA libraries.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
venv="$1"
torch=2.13.0 newest=5.24.0 oldest=5.0.0
stamp="$venv/installed-$torch-$newest-$oldest-gguf"
[ -e "$stamp" ] && exit 0
"${PYTHON:-python3}" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" numpy pytest ml_dtypes setuptools gguf sentencepiece protobuf
if [ -e /proc/driver/nvidia/version ]; then
  "${pip[@]}" "torch==$torch"
else
  "${pip[@]}" --no-deps "torch==$torch" nvidia-cuda-runtime
  "${pip[@]}" filelock typing-extensions sympy networkx jinja2 fsspec
  "$venv/bin/python" "$here/torch_without_cuda.py" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
fi
# pip names the libraries that torch would like to have; that is what was left out above.
"${pip[@]}" "transformers==$newest" 2>/dev/null
# transformers reads GGUF files with these.
"${pip[@]}" --no-deps accelerate psutil
"${pip[@]}" --target "$venv/oldest" "transformers==$oldest" numpy 2>/dev/null
touch "$stamp"
