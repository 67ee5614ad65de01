#!/usr/bin/env bash
# On a machine with a GPU: builds with the cuda preset, runs the GPU suite, the sanitizers on small shapes and the
# benchmarks, and writes tests/bench/results/gpu_*.json.
#   tests/gpu/run.sh [build folder]      a folder that is already built (or holds the binaries) is not built again
set -euo pipefail
cd "$(dirname "$0")/../.."
bin="${1:-}"
if [ -z "$bin" ]; then
  cmake --preset cuda
  cmake --build --preset cuda --target kvtide_test_gpu gpu_attend_bench gpu_moves_bench
  bin=build/cuda
fi
find_binary() { find "$bin" -name "$1" -type f -perm -u+x | head -1; }
results="${RESULTS:-tests/bench/results}"
"$(find_binary kvtide_test_gpu)"
if command -v compute-sanitizer > /dev/null; then
  small='--gtest_filter=*PairsOfUnequal*:*CapsLogits*:*SealsWithProfiles*:*RecodesToFewer*:*CopiesMany*'
  for tool in memcheck racecheck synccheck initcheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$(find_binary kvtide_test_gpu)" "$small" | tail -2
  done
fi
about="\"date\": \"$(date -u +%F)\", \"commit\": \"$(git rev-parse --short HEAD 2>/dev/null || echo unknown)\", \"driver\": \"$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1)\", \"device\": \"$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1)\""
stamp() { sed -i "0,/{/s//{\n  \"command\": \"tests\/gpu\/run.sh\", ${about//\//\\/},/" "$1"; }
"$(find_binary gpu_attend_bench)" --json "$results/gpu_attend.json"
stamp "$results/gpu_attend.json"
"$(find_binary gpu_moves_bench)" --json "$results/gpu_moves.json"
stamp "$results/gpu_moves.json"
if python3 -c 'import torch' 2> /dev/null; then
  python3 tests/bench/gpu_sdpa_baseline.py --json "$results/gpu_f16_baselines.json" --bench "$results/gpu_attend.json"
  stamp "$results/gpu_f16_baselines.json"
fi
