#!/usr/bin/env bash
# From a fresh clone to the first result, on Debian 12 or Ubuntu 24.04, without a GPU:
#   deploy/demo.sh [arguments of `kvtide demo` ...]      such as --context 8192 --model DIR
# Installs the packages that are missing, builds what the demo needs and runs it. All of it can be run again at any time.
#   deploy/demo.sh --deps-only     only the packages        deploy/demo.sh --build-only     packages and build
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*" >&2; }

if [ -r /etc/os-release ]; then
  # shellcheck source=/dev/null
  system="$(. /etc/os-release && echo "${ID:-} ${VERSION_ID:-}")"
  case "$system" in
    "debian 12" | "ubuntu 24.04") ;;
    *) say "this is $system; the packages are known for Debian 12 and Ubuntu 24.04, the build may need others here" ;;
  esac
fi

say "1/3 packages"
./deploy/install_packages.sh
[ "${1:-}" = --deps-only ] && exit 0

say "2/3 build (the first one takes minutes; ccache makes the next ones short)"
# CUDA only where there is a GPU to use it: its kernels take the longest to build.
cuda=OFF
[ -e /dev/nvidiactl ] && cuda=AUTO
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
cmake --preset release -B build/demo -DKVTIDE_TESTS=OFF -DKVTIDE_BENCH=OFF -DKVTIDE_CUDA="${KVTIDE_CUDA:-$cuda}" >"$log" 2>&1 || {
  tail -20 "$log" >&2
  exit 1
}
cmake --build build/demo --target kvtide kvtided
[ "${1:-}" = --build-only ] && exit 0

say "3/3 kvtide demo $*"
rm -f "$log"
exec ./build/demo/clients/cli/kvtide demo "$@"
