#!/usr/bin/env bash
# kvtide's libraries on Linux arm64: cross-built, their tests run by QEMU on this machine.
#   tests/run.sh arm64 [--record] [PART ...]     parts: base threads format kernels warp planner; all without a word
# format: golden bytes and every codec; kernels: attention on the CPU against float64; base and kernels that map memory run once
# more with pages of 64 KiB. --record: what came of it goes to last_run.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
words="$*" record=false parts=()
for word in "$@"; do
  case "$word" in
    --record) record=true ;;
    base | threads | format | kernels | warp | planner) parts+=("$word") ;;
    *) echo "tests/arm64/run.sh: unknown part '$word' (base threads format kernels warp planner, --record)" >&2; exit 2 ;;
  esac
done
[ ${#parts[@]} -gt 0 ] || parts=(base threads format kernels warp planner)
declare -A program=([base]=base/kvtide_test_base [threads]=base/kvtide_test_thread_pool [format]=format/kvtide_test_format
  [kernels]=kernels/kvtide_test_kernels [warp]=kernels/kvtide_test_warp [planner]=planner/kvtide_test_planner)
deploy/arm64/sysroot.sh
root="$PWD/build/arm64-sysroot" build="$PWD/build/arm64"
cmake --preset arm64 > "$build.configure.log" 2>&1 || { cat "$build.configure.log" >&2; exit 1; }
targets=()
for part in "${parts[@]}"; do targets+=("${program[$part]##*/}"); done
cmake --build --preset arm64 --target "${targets[@]}"

# run NAME PART [words of QEMU ...] -- [words of the test program ...]: its output is kept for when it fails.
report="$build/report.txt"
: > "$report"
run() {
  local name="$1" part="$2" log="$build/$1.log" begin=$SECONDS emulator=()
  shift 2
  while [ "$1" != -- ]; do emulator+=("$1"); shift; done
  shift
  if ! qemu-aarch64 "${emulator[@]}" -L "$root" "$build/tests/${program[$part]}" "$@" > "$log" 2>&1; then
    tail -n 60 "$log"
    echo "$name: FAILED" | tee -a "$report"
    return 1
  fi
  local passed
  passed="$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' "$log")"
  [ "${passed:-0}" -gt 0 ] || { echo "$name: ran no test" | tee -a "$report"; return 1; }
  echo "$name: $passed passed, 0 failed, $((SECONDS - begin)) s" | tee -a "$report"
}
bad=0
for part in "${parts[@]}"; do
  run "$part" "$part" -- || bad=1
  case "$part" in
    base | threads) run "$part-64K-pages" "$part" -p 65536 -- || bad=1 ;;
    kernels) run kernels-64K-pages kernels -p 65536 -- --gtest_filter='*Slab*:*PageCopier*:*Direct*:*StreamCopy*:*WildRows*' || bad=1 ;;
  esac
done
if $record; then
  {
    echo "tests/run.sh arm64 $words, $(date -u +%Y-%m-%d), $(qemu-aarch64 --version | sed -n 's/^qemu-aarch64 version \([0-9.]*\).*/QEMU \1/p'), GCC $(aarch64-linux-gnu-g++ -dumpfullversion), $(nproc) cores that others shared"
    cat "$report"
  } > tests/arm64/last_run.txt
fi
exit $bad
