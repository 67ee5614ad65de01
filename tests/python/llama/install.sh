#!/usr/bin/env bash
# install.sh FOLDER: a virtual environment with llama-cpp-python, whose library is compiled here (there is no wheel for CPUs in the
# package index; some minutes), and xllamacpp, which has llama.cpp's server. KVTIDE_WHEELS names a folder with a wheel from before, or to keep this one in.
set -euo pipefail
venv="$1"
version=0.3.36
stamp="$venv/installed-llama-$version"
[ -e "$stamp" ] && exit 0
wheels="${KVTIDE_WHEELS:-$(dirname "$venv")/wheels}"
"${PYTHON:-python3}" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
if ! ls "$wheels"/llama_cpp_python-"$version"-*.whl >/dev/null 2>&1; then
  # The library alone: no server, no tools, no model for images.
  export CMAKE_ARGS="-DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_COMMON=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF"
  "${pip[@]}" wheel --no-deps --wheel-dir "$wheels" "llama-cpp-python==$version"
fi
"${pip[@]}" install pytest xllamacpp==2026.10.11549 "$wheels"/llama_cpp_python-"$version"-*.whl
touch "$stamp"
