#!/usr/bin/env bash
# Everything that needs a GPU, by one command: tests, sanitizers, benchmarks, demo and evaluation. Builds with the cuda
# preset, or takes programs that tests/gpu/pack.sh packed elsewhere. Result files go to tests/bench/results.
#   tests/gpu/run.sh [--programs FILE.tar.xz|FOLDER] [--stages a,b,...] [--results FOLDER] [--list]
# BENCHES="load pages" tests/gpu/run.sh --stages bench    runs these benchmarks alone.
# Every stage runs, whatever came before; the exit status is 1 if one of them failed.
set -euo pipefail
cd "$(dirname "$0")/../.."

all=(kernels cache direct e2e devices python sanitizers bench counters demo eval)
declare -A what=(
  [kernels]="conformance of the CUDA backend, CUDA IPC, two GPUs if there are two"
  [cache]="the cache's tests and its simulation with a GPU as the device"
  [direct]="an engine over the pool of a kvtided, mapped by CUDA IPC and by descriptors: bits, pairs, deaths, compute-sanitizer"
  [e2e]="kvtided in processes of its own on the GPU, the kvtide command with it"
  [devices]="kvtided and the cache on two GPUs (skipped with one)"
  [python]="the Python package: steps over torch tensors, the cache of transformers (a pack with --python)"
  [sanitizers]="compute-sanitizer's four tools on small shapes"
  [bench]="gpu_attend, gpu_step, gpu_cache_step, gpu_moves, gpu_pages, gpu_prefill, gpu_seal, paged_attention, direct and load benchmarks, f16 attention of PyTorch"
  [counters]="hardware counters of the main kernels (ncu)"
  [demo]="kvtide demo on the GPU: the same tokens from every tier"
  [eval]="kvtide eval on the GPU and on the CPU: perplexities within 0.1 %"
)

list() { for s in "${all[@]}"; do printf '%-12s%s\n' "$s" "${what[$s]}"; done; }

programs="" results="${RESULTS:-tests/bench/results}" stages="${all[*]}"
while [ $# -gt 0 ]; do
  case "$1" in
    --programs) programs="$2"; shift 2 ;;
    --stages) stages="${2//,/ }"; shift 2 ;;
    --results) results="$2"; shift 2 ;;
    --list) list; exit 0 ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' tests/gpu/run.sh; echo; list; exit 0 ;;
    *) echo "usage: tests/gpu/run.sh [--programs FILE.tar.xz|FOLDER] [--stages $(IFS=,; echo "${all[*]}")] [--results FOLDER]" >&2; exit 2 ;;
  esac
done
for s in $stages; do
  [[ " ${all[*]} " == *" $s "* ]] || { echo "run.sh: no stage '$s'; known: ${all[*]}" >&2; exit 2; }
done
if ! nvidia-smi -L > /dev/null 2>&1; then
  echo "run.sh: no NVIDIA GPU on this machine" >&2
  exit 1
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
commit="$(git rev-parse --short HEAD 2> /dev/null || echo unknown)"
if [ -z "$programs" ]; then
  tests/gpu/pack.sh --out "$work/programs.tar.xz"
  programs="$work/programs.tar.xz"
fi
if [ -f "$programs" ]; then
  mkdir "$work/programs"
  tar -C "$work/programs" -xf "$programs" 2> /dev/null ||
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$programs" "$work/programs"
  programs="$work/programs"
fi
[ -f "$programs/commit" ] && commit="$(cat "$programs/commit")"
bin="$programs/bin"
export LD_LIBRARY_PATH="$programs/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
mkdir -p "$results" "$work/data"
ln -s "$PWD/clients/engine/models" "$work/data/models"
ln -s "$PWD/tests/data" "$work/data/texts"
export KVTIDE_DATA_DIR="$work/data"  # unless it lies beside the programs
export KVTIDE_SOURCE_DIR="$PWD"  # the programs may have been built in another folder

gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)"
gpus="$(nvidia-smi -L | wc -l)"
driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)"
# Says in a result file where it comes from.
stamp() {
  if [ -f "$1" ]; then
    python3 - "$1" "$commit" "$driver" "$gpu" <<'EOF'
import datetime, json, sys
path, commit, driver, gpu = sys.argv[1:]
about = {"command": "tests/gpu/run.sh", "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit,
         "driver": driver, "device": gpu}
with open(path) as file:
    result = json.load(file)
with open(path, "w") as file:
    file.write(json.dumps({**about, **{k: v for k, v in result.items() if k not in about}}, indent=1) + "\n")
EOF
  fi
}
# Nothing here takes minutes: what does hangs, and must not hold the machine.
limited() { timeout --kill-after=5 "${LIMIT:-200}" "$@"; }
# The cases of a test program, spread over processes: each start of CUDA takes a second, which they spend side by side.
sharded() {
  local shards="$1" failed=0 i
  shift
  for ((i = 0; i < shards; i++)); do
    GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$i limited "$@" > "$work/shard.$i" 2>&1 || echo "$?" > "$work/shard.$i.failed" &
  done
  wait
  for ((i = 0; i < shards; i++)); do
    if [ -f "$work/shard.$i.failed" ]; then
      failed=1
      grep -v -E '^\[ +(RUN|OK) +\]' "$work/shard.$i" | tail -60
      [ "$(cat "$work/shard.$i.failed")" -eq 124 ] && echo "cut after ${LIMIT:-200} s, in $(grep -E '^\[ RUN ' "$work/shard.$i" | tail -1)"
    else
      grep -E '^\[ +(PASSED|SKIPPED) +\]' "$work/shard.$i" | tail -3 || true
    fi
    rm -f "$work/shard.$i" "$work/shard.$i.failed"
  done
  return "$failed"
}

stage_kernels() { sharded 6 "$bin/kvtide_test_gpu"; }
stage_cache() {
  KVTIDE_TEST_DEVICE=cuda:0 sharded 4 "$bin/kvtide_test_cache" &&
    KVTIDE_TEST_DEVICE=cuda:0 KVTIDE_SIM_SEEDS=1:24 limited "$bin/kvtide_test_sim" --gtest_brief=1
}
stage_e2e() {
  local filter='*'
  if ! command -v redis-server > /dev/null; then
    echo "SKIPPED: Remote.* (redis-server is not installed)"
    filter='-Remote.*'
  fi
  KVTIDE_TEST_DEVICE=cuda:0 KVTIDE_TEST_PROGRAMS="$bin" sharded 6 "$bin/kvtide_test_e2e" "--gtest_filter=$filter"
}
# A sanitizer takes every allocation into its own hands, the daemon's too: what it watches is an embedded pool.
stage_direct() {
  export KVTIDE_TEST_DEVICE=cuda:0 KVTIDE_TEST_PROGRAMS="$bin"
  limited "$bin/kvtide_test_gpu_direct" --gtest_brief=1 || return 1
  command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not installed"; return 0; }
  local tool failed=0
  for tool in memcheck racecheck synccheck; do
    (KVTIDE_TEST_ROUNDS=6 limited compute-sanitizer --tool "$tool" --error-exitcode 9 "$bin/kvtide_test_gpu_direct" \
      --gtest_filter='*EmbeddedSmall*' > "$work/direct.$tool" 2>&1 || touch "$work/direct.$tool.failed") &
  done
  wait
  for tool in memcheck racecheck synccheck; do
    echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$work/direct.$tool" | tail -1) $(grep -E '^\[  PASSED' "$work/direct.$tool" || true)"
    if [ -f "$work/direct.$tool.failed" ]; then
      failed=1
      tail -40 "$work/direct.$tool"
    fi
  done
  return "$failed"
}
stage_devices() {
  if [ "$gpus" -lt 2 ]; then
    echo "SKIPPED: two GPUs are needed, this machine has $gpus"
    return 0
  fi
  export KVTIDE_TEST_DEVICE=cuda:0,cuda:1 KVTIDE_TEST_PROGRAMS="$bin"
  limited "$bin/kvtide_test_gpu" --gtest_brief=1 --gtest_filter='TwoDevices.*' &&
    limited "$bin/kvtide_test_cache" --gtest_brief=1 --gtest_filter='DevicesTest.*:MovesTest.*' &&
    KVTIDE_SIM_SEEDS=100:16 limited "$bin/kvtide_test_sim" --gtest_brief=1 &&
    limited "$bin/kvtide_test_e2e" --gtest_brief=1 --gtest_filter='Devices.*'
}
stage_python() {
  if [ ! -d "$programs/python" ]; then
    echo "SKIPPED: no package beside the programs (tests/gpu/pack.sh --python PYTHON)"
    return 0
  fi
  python3 -c 'import torch, transformers' 2> /dev/null || { echo "SKIPPED: python3 has no torch and transformers"; return 0; }
  PYTHONPATH="$programs/python" LD_LIBRARY_PATH= limited python3 -c '
import sys
from kvtide import _core
from kvtide.vllm.settings import cuda_library
sys.exit(_core.paged_library_error(cuda_library()) or 0)' || return 1
  PYTHONPATH="$programs/python" LD_LIBRARY_PATH= limited python3 tests/gpu/transformers_cache.py --json "$work/gpu_transformers.json" || return 1
  stamp "$work/gpu_transformers.json"
  cp "$work/gpu_transformers.json" "$results/"
}
stage_sanitizers() {
  command -v compute-sanitizer > /dev/null || { echo "SKIPPED: compute-sanitizer is not installed"; return 0; }
  local small='--gtest_filter=*PairsOfUnequal*:*CapsLogits*:*SealsWithProfiles*:*Recodes*:*CopiesMany*:*PrefillAndDecode*:*DeviceDecode*Case1*:*AppendsPiecesOfSeveral*:LayerPlanTest.SendsOnly*:LayerPlanTest.Types*:*PagedConformance.SinksSoftcaps*:*PagedConformance.CountsWhat*:*PagedConformance.ChunksWith*:*PagedConformance.CalibratedKeysInAFew*:*PageCopierConformance.BytesCome*:*PageCopierConformance.SlotsTake*:*PageCopierConformance.ValuesThat*:*TideSealsAPage*-*TideSealsAndRecodes*' failed=0 tool i
  # Each tool in processes of its own; racecheck takes four times as long as the others.
  local -A shards=([memcheck]=1 [racecheck]=4 [synccheck]=1 [initcheck]=1)
  for tool in "${!shards[@]}"; do
    local skipped=""
    # The prefill kernel for any GPU, as compiled for 9.0, frees a stage by one lane after the others met it: racecheck
    # follows only threads that arrive themselves (kernels/cuda/README.md). Its code for 8.0 is checked.
    [ "$tool" = racecheck ] && skipped=":*/plainprefill"
    for ((i = 0; i < shards[$tool]; i++)); do
      (GTEST_TOTAL_SHARDS=${shards[$tool]} GTEST_SHARD_INDEX=$i limited compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$bin/kvtide_test_gpu" "$small$skipped" > "$work/$tool.$i" 2>&1 || touch "$work/$tool.$i.failed") &
    done
  done
  wait
  for tool in memcheck racecheck synccheck initcheck; do
    for ((i = 0; i < shards[$tool]; i++)); do
      echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$work/$tool.$i" | tail -1) $(grep -E '^\[  PASSED' "$work/$tool.$i" || true)"
      if [ -f "$work/$tool.$i.failed" ]; then
        failed=1
        tail -40 "$work/$tool.$i"
      fi
    done
  done
  return "$failed"
}
stage_bench() {
  local failed=0 name program
  for name in ${BENCHES:-attend step cache_step moves pages prefill seal paged_attention direct load}; do
    program="gpu_${name}_bench"
    local arguments=()
    [ "$name" = direct ] && program=kvtide_bench_direct arguments=(--device cuda:0 --kvtided "$bin/kvtided")
    [ "$name" = load ] && program=kvtide_bench_load arguments=(--device cuda:0 --kvtided "$bin/kvtided")
    [ "$name" = paged_attention ] && program=paged_attention_bench
    if [ ! -x "$bin/$program" ]; then
      echo "$program: not built"
      continue
    fi
    limited "$bin/$program" "${arguments[@]}" --json "$work/gpu_$name.json" || { failed=1; continue; }
    if [ "$name" = prefill ] && [ -f tests/bench/gpu_prefill_baseline.py ] && python3 -c 'import torch' 2> /dev/null; then
      limited python3 tests/bench/gpu_prefill_baseline.py --bench "$work/gpu_prefill.json" || failed=1
    fi
    stamp "$work/gpu_$name.json"
    if [ -f "$work/gpu_$name.json" ]; then cp "$work/gpu_$name.json" "$results/"; fi
  done
  if python3 -c 'import torch' 2> /dev/null; then
    limited python3 tests/bench/gpu_sdpa_baseline.py --json "$work/gpu_f16_baselines.json" --bench "$results/gpu_attend.json" || failed=1
    stamp "$work/gpu_f16_baselines.json"
    if [ -f "$work/gpu_f16_baselines.json" ]; then cp "$work/gpu_f16_baselines.json" "$results/"; fi
  else
    echo "f16 baselines: SKIPPED, python3 has no torch"
  fi
  return "$failed"
}
stage_counters() {
  if [ ! -x tests/bench/gpu_counters.sh ] || ! command -v ncu > /dev/null; then
    echo "SKIPPED: needs ncu and tests/bench/gpu_counters.sh"
    return 0
  fi
  limited tests/bench/gpu_counters.sh "$bin" "$results"
}
stage_demo() {
  KVTIDE_DEVICE=cuda:0 limited "$bin/kvtide" demo --kvtided "$bin/kvtided" --no-progress --output json > "$work/demo.json" || return 1
  python3 tests/gpu/check_demo.py "$work/demo.json"
}
stage_eval() {
  local failed=0 set arguments side
  for set in default_window no_window_no_centring; do
    arguments="--pairs q8_0/q8_0,q8_0/turbo4,turbo4/turbo4,turbo3/turbo3,planar3/planar3 --exact-window default"
    [ "$set" = default_window ] || arguments="--pairs q8_0/q8_0,turbo4/turbo4,turbo3/turbo3 --exact-window none --key-centring none"
    for side in cuda:0 cpu; do
      # shellcheck disable=SC2086
      (KVTIDE_DEVICE=$side limited "$bin/kvtide" eval --kvtided "$bin/kvtided" --windows 4 $arguments --no-layer-errors --no-progress \
        --output json --out "$work/eval.$set.${side%:0}.json" || touch "$work/eval.failed") &
    done
    wait
    python3 tests/gpu/compare_eval.py "$work/eval.$set.cuda.json" "$work/eval.$set.cpu.json" || failed=1
    stamp "$work/eval.$set.cuda.json"
    cp "$work/eval.$set.cuda.json" "$results/gpu_eval_tidelm7m_$set.json" || failed=1
  done
  [ ! -f "$work/eval.failed" ] && return "$failed"
}

echo "$gpus x $gpu, driver $driver, commit $commit; stages: $stages"
summary=""
status=0
for s in $stages; do
  echo "== $s"
  begin=$SECONDS
  if "stage_$s"; then outcome=ok; else outcome=FAILED; status=1; fi
  summary+="$(printf '%-12s%-8s%4d s' "$s" "$outcome" $((SECONDS - begin)))"$'\n'
done
echo "== summary"
printf '%s' "$summary"
exit "$status"
