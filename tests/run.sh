#!/usr/bin/env bash
# Builds kvtide and runs all tests: the one command of the README, the same that CI runs.
#   tests/run.sh [preset] [ctest arguments ...]     presets: dev (default), release, asan, tsan, clang, cuda
#   tests/run.sh python [--full] [pytest arguments ...]     the Python package; tests/python/run.sh says more
#   tests/run.sh sdist     the Python package from its source archive alone (part of `python`)
#   tests/run.sh transformers | llama [pytest arguments ...]     with those libraries, which are installed under build/
#   tests/run.sh engines [pytest arguments ...]     vLLM on the CPU, which it installs; tests/engines/run.sh says more
#   tests/run.sh arm64 [--record] [PART ...]     cross-built for arm64, run by QEMU; tests/arm64/run.sh says more
#   tests/run.sh fuzz [--seconds N] [NAME ...]     every fuzzer for so long (60 s each), with clang
#   tests/run.sh image [--platform linux/arm64] [--record]     the steps of deploy/Dockerfile's CPU image in roots of debootstrap, and the image at work
#   tests/run.sh prometheus [--pictures FOLDER]     a real Prometheus over a real daemon, and promtool, which it gets
# Packages that are missing are installed first. Uses ccache when it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
preset="${1:-dev}"
[ $# -gt 0 ] && shift
./deploy/install_packages.sh
# Objects are shared between checkouts and build folders.
export CCACHE_BASEDIR="$PWD" CCACHE_NOHASHDIR=1
case "$preset" in
  python | sdist | transformers | llama) exec tests/python/run.sh "$preset" "$@" ;;
  engines) exec tests/engines/run.sh "$@" ;;
  arm64) exec tests/arm64/run.sh "$@" ;;
  fuzz) exec tests/fuzz/run.sh "$@" ;;
  image) exec tests/deploy/image.sh "$@" ;;
  prometheus) exec tests/deploy/prometheus.sh "$@" ;;
esac
cmake --preset "$preset"
cmake --build --preset "$preset"
ctest --preset "$preset" "$@"
