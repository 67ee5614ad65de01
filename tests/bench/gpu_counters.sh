#!/usr/bin/env bash
# Hardware counters of the main attention kernels, one launch each, as CSV.
#   tests/bench/gpu_counters.sh BINARIES RESULTS     writes RESULTS/gpu_ncu.csv
# Needs ncu and a GPU whose counters may be read. The clock is left alone.
set -euo pipefail
bench="$1/gpu_attend_bench"
out="$2/gpu_ncu.csv"
metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,sm__cycles_elapsed.avg
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
metrics+=,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
metrics+=,sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active
metrics+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread
: > "$out"
while read -r shape; do
  ncu --csv --page raw --clock-control none --kernel-name regex:AttendKernel --launch-skip 3 --launch-count 1 --kill yes \
    --metrics "$metrics" "$bench" --filter "$shape" 2> /dev/null < /dev/null |
    python3 -c '
import csv, sys
shape, path, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
lines = [line for line in sys.stdin if line.startswith("\"")]
rows = list(csv.reader(lines))
if len(rows) < 3:
    sys.exit("no counters for " + shape)
at = [rows[0].index(name) for name in names]
with open(path, "a+") as file:
    file.seek(0)
    if not file.read(1):
        file.write("shape," + ",".join(f"{name} ({rows[1][i]})" if rows[1][i] else name for name, i in zip(names, at)) + "\n")
    file.write(shape + "," + ",".join(rows[2][i].replace(",", "") for i in at) + "\n")
' "$shape" "$out" "$metrics" || echo "$shape: ncu gave nothing" >&2
done <<'SHAPES'
turbo4 33x4x32768 d128 G8
turbo4 33x4x32768 d128 G16
wht4 33x4x32768 d128 G8
wht4 33x4x32768 d128 G16
turbo3 33x4x32768 d128 G8
q8_0 33x4x32768 d128 G8
turbo4 33x4x32768 d64 G8
turbo4 16x4x32768 d256 G8
turbo4 512x8x512 d128 G4
f16 33x4x32768 d128 G8
SHAPES
[ -s "$out" ]
