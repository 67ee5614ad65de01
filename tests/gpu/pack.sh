#!/usr/bin/env bash
# Builds what tests/gpu/run.sh runs and packs it with the shared libraries that it needs, for a machine that has a GPU and
# its driver but not the libraries.
#   tests/gpu/pack.sh [--build FOLDER] [--out FILE.tar.xz] [--python PYTHON]     default: build/cuda, build/carry/gpu_tests.tar.xz
# PYTHON has the version of the GPU machine's python3: the package is built for it and packed too.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/cuda
out=build/carry/gpu_tests.tar.xz
python=""
while [ $# -gt 0 ]; do
  case "$1" in
    --build) build="$2"; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    --python) python="$2"; shift 2 ;;
    *) echo "usage: tests/gpu/pack.sh [--build FOLDER] [--out FILE.tar.xz] [--python PYTHON]" >&2; exit 2 ;;
  esac
done
export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1
cmake --preset cuda -B "$build" > /dev/null
programs=(kvtided kvtide kvtide_e2e_appender kvtide_test_gpu kvtide_test_gpu_direct kvtide_test_cache kvtide_test_sim kvtide_test_e2e)
known="$(cmake --build "$build" --target help)"
for bench in gpu_attend_bench gpu_step_bench gpu_cache_step_bench gpu_moves_bench gpu_pages_bench gpu_prefill_bench gpu_seal_bench paged_attention_bench kvtide_bench_direct kvtide_bench_load; do
  if grep -q "^$bench:" <<< "$known"; then programs+=("$bench"); fi
done
cmake --build "$build" --target "${programs[@]}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/bin" "$folder/lib" "$(dirname "$out")"
for program in "${programs[@]}"; do
  file="$(find "$build" -name "$program" -type f -perm -u+x | head -1)"
  strip -o "$folder/bin/$program" "$file"
done
# The C library and the driver are the machine's own.
ldd "$folder"/bin/* | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' | sort -u |
  grep -Ev '/(libc|libm|libdl|librt|libpthread|libresolv|libcuda|ld-linux-x86-64)\.so' |
  while read -r library; do cp -L "$library" "$folder/lib/"; done
parts=(bin lib commit)
if [ -n "$python" ]; then
  # The flags of the cuda preset, so that the compiler cache has most objects already.
  wheels="$(mktemp -d)"
  KVTIDE_CUDA=ON "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" . \
    -C cmake.define.CMAKE_CXX_FLAGS=-g1 -C cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real -C cmake.define.KVTIDE_WERROR=ON
  "$python" -m zipfile -e "$wheels"/kvtide-*.whl "$folder/python"
  library="$folder/python/kvtide/lib/libkvtide_cuda_paged.so"
  [ -f "$library" ] || { echo "pack.sh: the package for GPUs has no $(basename "$library"): backends of engines would not find it" >&2; exit 1; }
  strip "$library"
  rm -rf "$wheels"
  parts+=(python)
fi
git rev-parse --short HEAD > "$folder/commit" 2> /dev/null || echo unknown > "$folder/commit"
# The programs share most of their GPU code; a dictionary that spans several of them packs it once.
tar -C "$folder" -cf - "${parts[@]}" | xz -T1 --lzma2=preset=1,dict=128MiB -c > "$out"
echo "$out: ${#programs[@]} programs, $(($(stat -c %s "$out") / 1048576)) MiB"
