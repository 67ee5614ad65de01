#!/usr/bin/env bash
# Measures calibrated keys (tide4 to tide1) beside turbo on one model: makes a profile from one text, evaluates
# pairs on another, and writes two files into a folder: NAME.json, as `kvtide eval --output json` has it, and
# NAME.calibration.txt, what `kvtide calibrate` says.
#
# usage: tests/bench/tide_quality.sh NAME MODEL CALIBRATION_TEXT EVAL_TEXT [FOLDER]
#   NAME    of the files, such as eval_smollm2_135m_tide
#   MODEL   GGUF file or folder; "" = the bundled tidelm-7m
#   FOLDER  default tests/bench/results
# environment: KVTIDE_BUILD (default build/dev), PAIRS, WINDOWS (2), CONTEXT (2048, of windows and of calibration), TOKENS (12288, of the
# calibration text), KEYS (before-rope, or after-rope)
#
# An interrupted run goes on where it was: the state is beside the results.
set -euo pipefail
cd "$(dirname "$0")/../.."

name=$1 model=$2 calibration=$3 text=$4 folder=${5:-tests/bench/results}
build=${KVTIDE_BUILD:-build/dev}
pairs=${PAIRS:-turbo4/turbo4,tide4/turbo4,turbo3/turbo3,tide3/turbo3,tide2/turbo3,turbo2/turbo2,tide2/turbo2,tide1/turbo2}
kvtide=$build/clients/cli/kvtide
with_model=()
[ -z "$model" ] || with_model=(--model "$model")
work=${TMPDIR:-/tmp}/kvtide-$name
mkdir -p "$work" "$folder"

[ -f "$work/profile" ] || "$kvtide" calibrate "${with_model[@]}" --text "$calibration" --tokens "${TOKENS:-12288}" --context "${CONTEXT:-2048}" \
  --keys "${KEYS:-before-rope}" --out "$work/profile" \
  --no-progress | sed "s|$work/profile: ||" > "$folder/$name.calibration.txt"
"$kvtide" eval "${with_model[@]}" --kvtided "$build/daemon/kvtided" --text "$text" --profile "$work/profile" --pairs "$pairs" --windows "${WINDOWS:-2}" \
  --context "${CONTEXT:-2048}" --no-layer-errors --no-progress --resume "$work/state" --output json --out "$folder/$name.json"
