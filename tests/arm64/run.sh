#!/usr/bin/env bash
# kvtide on Linux arm64: cross-built, its tests run by QEMU on this machine.
#   tests/run.sh arm64 [--record] [PART ...]     parts: base threads format kernels warp planner engine package daemon; all of these
#   tests/run.sh arm64 image                     without a word. image, by itself: the container's image, as root
# format: golden bytes and every codec; kernels: attention on the CPU against float64; base, threads and kernels that map memory run
# once more with pages of 64 KiB; engine: the reference engine; package: the Debian package, made, installed by dpkg and removed;
# daemon: kvtided serves the command line. A part may be named with what stands behind it (kernels-paged), see `runs`.
# --record: what came of what has run goes to last_run.txt, where the rest stays as it is.
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=(base base-64K-pages threads threads-64K-pages format kernels-neon kernels-plain kernels-paged kernels-others kernels-64K-pages warp planner engine package daemon image)
record=false chosen=() wanted=()
for word in "$@"; do
  case "$word" in -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' tests/arm64/run.sh; exit 0 ;; esac
  [ "$word" != --record ] || { record=true; continue; }
  found=()
  for name in "${runs[@]}"; do case "$name" in "$word" | "$word"-*) found+=("$name") ;; esac; done
  [ ${#found[@]} -gt 0 ] || { echo "tests/arm64/run.sh: unknown part '$word' (${runs[*]}, --record)" >&2; exit 2; }
  chosen+=("${found[@]}")
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${runs[@]:0:${#runs[@]}-1}")
for name in "${runs[@]}"; do case " ${chosen[*]} " in *" $name "*) wanted+=("$name") ;; esac; done

deploy/arm64/sysroot.sh
root="$PWD/build/arm64-sysroot" build="$PWD/build/arm64"
declare -A program=([base]=base/kvtide_test_base [threads]=base/kvtide_test_thread_pool [format]=format/kvtide_test_format
  [kernels]=kernels/kvtide_test_kernels [warp]=kernels/kvtide_test_warp [planner]=planner/kvtide_test_planner
  [engine]=clients/engine/kvtide_test_clients_engine)
targets=()
for name in "${wanted[@]}"; do
  case "$name" in
    package | daemon) targets+=(kvtide) ;;
    image) ;;
    *) targets+=("$(basename "${program[${name%%-*}]}")") ;;
  esac
done
if [ ${#targets[@]} -gt 0 ]; then
  cmake --preset arm64 > "$build.configure.log" 2>&1 || { cat "$build.configure.log" >&2; exit 1; }
  cmake --build --preset arm64 --target "${targets[@]}"
fi

# cases NAME [words of QEMU ...] -- [words of the test program ...]
cases() {
  local words=() binary="$build/tests/${program[${1%%-*}]}"
  shift
  while [ "$1" != -- ]; do words+=("$1"); shift; done
  shift
  qemu-aarch64 "${words[@]}" -L "$root" "$binary" "$@"
}
# kvtided answers the command line, serves it by gRPC and shared memory, with a disk below, and stops.
serves() {
  local folder kvtide=(qemu-aarch64 -L "$root" "$build/clients/cli/kvtide") socket daemon code=0
  folder="$(mktemp -d)" && socket="unix:$folder/kvtided.sock"
  qemu-aarch64 -L "$root" "$build/daemon/kvtided" --listen "$socket" --metrics-address off --device-memory 96MiB --host-memory 256MiB \
    --disk "$folder/tier:256MiB" > "$folder/log" 2>&1 &
  daemon=$!
  until "${kvtide[@]}" health --address "$socket"; do
    kill -0 $daemon 2> /dev/null || { cat "$folder/log"; return 1; }
    sleep 0.2
  done
  "${kvtide[@]}" bench --address "$socket" --seconds 5 --no-progress | tee "$folder/bench" && "${kvtide[@]}" status --address "$socket" || code=1
  for row in 'gRPC  *write' 'shared memory  *write' 'device  *attend' 'host  *move back' 'disk  *attend'; do
    grep -q "^$row" "$folder/bench" || { echo "kvtide bench has not measured: $row"; code=1; }
  done
  kill $daemon
  wait $daemon || { echo "kvtided: exit code $?"; code=1; }
  cat "$folder/log"
  rm -rf "$folder"
  return $code
}
# start NAME: what the run does.
start() {
  local small
  case "$1" in
    *-64K-pages) small=('*'); [[ "$1" != kernels* ]] || small=('*Slab*:*PageCopier*:*Direct*:*StreamCopy*:*WildRows*')
      cases "$1" -p 65536 -- --gtest_filter="${small[*]}" ;;
    kernels-neon) cases "$1" -- --gtest_filter='*/BackendConformance.*/neon' ;;
    kernels-plain) cases "$1" -- --gtest_filter='*/BackendConformance.*/plain' ;;
    kernels-paged) cases "$1" -- --gtest_filter='*/PagedConformance.*' ;;
    kernels-others) cases "$1" -- --gtest_filter='-*/BackendConformance.*:*/PagedConformance.*' ;;
    package) python3 tests/deploy/install_test.py . "$build" qemu-aarch64 -L "$root" ;;
    daemon) serves ;;
    image) if $record; then tests/deploy/image.sh --platform linux/arm64 --record; else tests/deploy/image.sh --platform linux/arm64; fi ;;
    *) cases "$1" -- ;;
  esac
}

# Each run's output is kept for when it fails; of what came of it there is one line.
report="$build.report.txt" bad=0
system="$(date -u +%Y-%m-%d), $(qemu-aarch64 --version | sed -n 's/^qemu-aarch64 version \([0-9.]*\).*/QEMU \1/p'), GCC $(aarch64-linux-gnu-g++ -dumpfullversion), $(nproc) cores that others shared"
: > "$report"
for name in "${wanted[@]}"; do
  log="$build.$name.log" begin=$SECONDS result=passed
  if ! (start "$name") > "$log" 2>&1; then
    tail -n 60 "$log"
    result=FAILED bad=1
  elif grep -q '^\[==========\]' "$log"; then
    result="$(sed -n 's/^\[  PASSED  \] \([0-9]*\) test.*/\1/p' "$log") passed, 0 failed"
    [ "${result%% *}" -gt 0 ] || { result="FAILED: ran no test" bad=1; }
    skipped="$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) test.*/\1/p' "$log")"
    [ -z "$skipped" ] || result+=", $skipped skipped"
  fi
  echo "$name: $result, $((SECONDS - begin)) s; $system" | tee -a "$report"
done
if $record; then
  was=tests/arm64/last_run.txt
  all="$({
    cat "$report"
    while IFS= read -r line; do case " ${wanted[*]} " in *" ${line%%:*} "*) ;; *) echo "$line" ;; esac; done < "$was"
  })"
  for name in "${runs[@]}"; do grep "^$name: " <<< "$all" || true; done > "$was.new"
  mv "$was.new" "$was"
fi
exit $bad
