#!/usr/bin/env bash
# Runs the simulations of all worlds (tests/sim) over many seeds, in pieces of 10 seeds, several at a time. Needs bash and the
# program, nothing else of this tree.
#   tests/sim/run_pieces.sh PROGRAMS FIRST LAST STEPS [--jobs N] [--seconds S] [--out FOLDER] [--worlds FILTER]
# PROGRAMS has kvtide_test_sim, in itself, in bin/ or in tests/sim/, and maybe the shared libraries that it needs in lib/:
#   tests/sim/run_pieces.sh --pack BUILD FOLDER      puts both there, from a build
# FOLDER (sim_pieces) gets a line for each piece in pieces.txt, when it has ended:
#   FIRST LAST STEPS WORLDS RC SECONDS USER SYSTEM   seeds, steps of each, filter of gtest, exit status, time, processor time
# and failed-FIRST-LAST-STEPS.txt, what a piece said that failed. Pieces that pieces.txt has, with these steps and worlds, are
# not run again: so a run goes on where another one has ended. After S seconds no piece begins any more; those that run go on.
# Exit status: 0 all pieces have run and passed, 1 one has failed, 3 none has failed and some were not begun.
set -euo pipefail

usage() {
  while read -r line; do case "$line" in "#!"*) ;; "#"*) echo "${line#\# }" ;; *) break ;; esac; done < "$0" >&2
  exit 2
}

pack() {
  local build="$1" folder="$2"
  mkdir -p "$folder/lib"
  strip -o "$folder/kvtide_test_sim" "$build/tests/sim/kvtide_test_sim"
  # The C library is the machine's own.
  ldd "$folder/kvtide_test_sim" | awk '$2 == "=>" && $3 ~ /^\// { print $3 }' |
    grep -Ev '/(libc|libm|libmvec|libdl|librt|libpthread|libresolv|ld-linux-x86-64)\.so' |
    while read -r library; do cp -L "$library" "$folder/lib/"; done
  cp "$0" "$folder/"
}

if [ "${1:-}" = --pack ]; then
  [ $# = 3 ] || usage
  pack "$2" "$3"
  exit 0
fi
[ $# -ge 4 ] || usage
programs="$1" first="$2" last="$3" steps="$4"
shift 4
jobs=1 seconds=0 out=sim_pieces worlds='*SimWorlds.*'
while [ $# -gt 0 ]; do
  [ $# -ge 2 ] || usage
  case "$1" in
    --jobs) jobs="$2" ;;
    --seconds) seconds="$2" ;;
    --out) out="$2" ;;
    --worlds) worlds="$2" ;;
    *) usage ;;
  esac
  shift 2
done
for number in "$first" "$last" "$steps" "$jobs" "$seconds"; do
  case "$number" in '' | *[!0-9]*) usage ;; esac
done

program=""
for place in "$programs" "$programs/bin" "$programs/tests/sim"; do
  if [ -x "$place/kvtide_test_sim" ]; then program="$place/kvtide_test_sim"; break; fi
done
[ -n "$program" ] || { echo "run_pieces.sh: no kvtide_test_sim in $programs, its bin or its tests/sim" >&2; exit 2; }
if [ -d "$programs/lib" ]; then export LD_LIBRARY_PATH="$programs/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; fi
[ -d "$out" ] || mkdir -p "$out"
lines="$out/pieces.txt"
touch "$lines"

declare -A there=()
failed=0
while read -r from to of what rc _; do
  if [ "$of" = "$steps" ] && [ "$what" = "$worlds" ]; then there["$from $to"]="$rc"; fi
done < "$lines"

run_piece() {
  local from="$1" to="$2" said="$out/running-$1-$2-$3.txt" rc=0 times
  export KVTIDE_SIM_SEEDS="$from:$((to - from + 1))" KVTIDE_SIM_STEPS="$3"
  TIMEFORMAT='%R %U %S'
  times="$({ time "$program" --gtest_filter="$worlds" > "$said" 2>&1; } 2>&1; exit $?)" || rc=$?
  # A filter that matches nothing passes, and so does a program that never ran.
  if [ "$rc" = 0 ] && ! has_passed "$said"; then rc=125; fi
  if [ "$rc" = 0 ]; then rm -f "$said"; else mv "$said" "$out/failed-$from-$to-$3.txt"; fi
  echo "$from $to $3 $worlds $rc $times" >> "$lines"
  [ "$rc" = 0 ] || echo "FAILED: seeds $from to $to, exit status $rc: $out/failed-$from-$to-$3.txt"
  return 0
}

# Whether its output says that tests have passed.
has_passed() {
  local line
  while read -r line; do case "$line" in *"PASSED  ] 0 tests"*) return 1 ;; *"PASSED  ] "*) return 0 ;; esac; done < "$1"
  return 1
}

running=0 begun=0 left=0
for ((from = first; from <= last; from += 10)); do
  to=$((from + 9 < last ? from + 9 : last))
  [ -z "${there["$from $to"]:-}" ] || continue
  if [ "$seconds" -gt 0 ] && [ "$SECONDS" -ge "$seconds" ]; then left=$((left + 1)); continue; fi
  if [ "$running" -ge "$jobs" ]; then
    wait -n || true
    running=$((running - 1))
    if [ "$seconds" -gt 0 ] && [ "$SECONDS" -ge "$seconds" ]; then left=$((left + 1)); continue; fi
  fi
  run_piece "$from" "$to" "$steps" &
  running=$((running + 1)) begun=$((begun + 1))
done
wait

pieces=0
while read -r from to of what rc _; do
  if [ "$of" != "$steps" ] || [ "$what" != "$worlds" ] || [ "$from" -lt "$first" ] || [ "$to" -gt "$last" ]; then continue; fi
  pieces=$((pieces + 1))
  [ "$rc" = 0 ] || failed=$((failed + 1))
done < "$lines"
echo "$begun pieces in $SECONDS seconds; seeds $first to $last, $steps steps: $pieces have ended, $failed failed, $left not begun"
if [ "$failed" -gt 0 ]; then exit 1; fi
if [ "$left" -gt 0 ]; then exit 3; fi
