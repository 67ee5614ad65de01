#!/usr/bin/env bash
# The Debian package and the tarball of kvtide, for this machine's architecture and for the other one: on amd64 both amd64 and arm64
# (cross-built), on arm64 arm64 alone.
#   deploy/package.sh [--to FOLDER] [ARCHITECTURE ...] [-- options of cmake ...]     such as -- -DKVTIDE_CUDA=OFF
#   deploy/package.sh --prepare [ARCHITECTURE ...]     only gets what it builds with: packages, for arm64 also its libraries
# They go to FOLDER, build/packages without a word. The CUDA backend is in this machine's own package where nvcc is found (preset `release`).
set -euo pipefail
cd "$(dirname "$0")/.."
mine="$(dpkg --print-architecture)" to=build/packages prepare=false architectures=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case "$1" in
    --to) to="${2:?--to wants a folder}"; shift ;;
    --prepare) prepare=true ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' deploy/package.sh; exit 0 ;;
    amd64 | arm64) architectures+=("$1") ;;
    *) echo "deploy/package.sh: unknown word '$1' (amd64, arm64, --to FOLDER, --prepare, -- options of cmake)" >&2; exit 2 ;;
  esac
  shift
done
[ $# -eq 0 ] || shift
if [ ${#architectures[@]} -eq 0 ]; then
  architectures=("$mine")
  [ "$mine" != amd64 ] || architectures+=(arm64)
fi
for architecture in "${architectures[@]}"; do
  [ "$architecture" = "$mine" ] || [ "$mine-$architecture" = amd64-arm64 ] || { echo "deploy/package.sh: packages for $architecture are not built on $mine" >&2; exit 2; }
done

export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1
deploy/install_packages.sh
for architecture in "${architectures[@]}"; do
  preset=release
  if [ "$architecture" != "$mine" ]; then
    preset=arm64
    deploy/arm64/sysroot.sh
  fi
  if $prepare; then continue; fi
  build="build/package-$architecture"
  cmake --preset "$preset" -B "$build" -DKVTIDE_TESTS=OFF -DKVTIDE_BENCH=OFF -DCMAKE_INSTALL_PREFIX=/usr "$@"
  cmake --build "$build"
  rm -rf "$build/packed"
  (cd "$build" && cpack -G "DEB;TGZ" -B packed)
  mkdir -p "$to"
  mv -v "$build"/packed/*.deb "$build"/packed/*.tar.gz "$to"
done
