#!/usr/bin/env bash
# Runs every fuzzer for a while, one after the other, from its corpus in the tree and what earlier runs have found.
#   tests/run.sh fuzz [--seconds N] [NAME ...]     60 seconds each; all of them where none is named
# What crashes lies in build/clang/found/NAME; a crash ends with the other ones run and exit code 1.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=60
if [ "${1:-}" = --seconds ]; then
  seconds="$2"
  shift 2
fi
if [ $# -eq 0 ]; then
  read -ra all < <(sed -n 's/^foreach(name \(.*\))$/\1/p' tests/fuzz/CMakeLists.txt)
  set -- "${all[@]}"
fi
cmake --preset clang
cmake --build --preset clang --target "${@/#/kvtide_fuzz_}"
failed=()
for name in "$@"; do
  found="build/clang/found/$name"
  mkdir -p "$found"
  corpus="tests/fuzz/corpus/$name"
  echo "$name: $seconds s"
  "build/clang/tests/fuzz/kvtide_fuzz_$name" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
    -artifact_prefix="$found/" "$found" "$corpus" > "$found.log" 2>&1 || failed+=("$name")
  grep -E 'stat::number_of_executed_units|SUMMARY|Test unit written' "$found.log" || true
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "found something: ${failed[*]} (build/clang/found/NAME.log)"
  exit 1
fi
