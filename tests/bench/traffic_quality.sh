#!/usr/bin/env bash
# Measures keys coded by a profile from traffic beside keys coded by one from `kvtide calibrate`: a kvtided serves evaluations over one
# text and gathers from them; both profiles are then evaluated on another text. Writes NAME.json (profile from traffic), NAME_text.json (profile
# from the text) and NAME.calibration.txt, what both calibrations say, into a folder.
#
# usage: tests/bench/traffic_quality.sh NAME MODEL TRAFFIC_TEXT EVAL_TEXT [FOLDER]
#   NAME    of the files, such as eval_tidelm7m_traffic
#   MODEL   GGUF file or folder; "" = the bundled tidelm-7m
#   FOLDER  default tests/bench/results
# environment: KVTIDE_BUILD (default build/dev), PAIRS, WINDOWS (4, evaluated), CONTEXT (2048), TOKENS (8192, of either calibration), SHARE (.2, of the
# time of calls), TRAFFIC_WINDOWS (6)
set -euo pipefail
cd "$(dirname "$0")/../.."

name=$1 model=$2 traffic=$3 text=$4 folder=${5:-tests/bench/results}
build=${KVTIDE_BUILD:-build/dev} context=${CONTEXT:-2048} tokens=${TOKENS:-8192}
pairs=${PAIRS:-turbo3/turbo3,tide3/turbo3,turbo2/turbo2,tide2/turbo2}
kvtide=$build/clients/cli/kvtide
with_model=() registered=tidelm-7m
[ -z "$model" ] || { with_model=(--model "$model"); registered=$(basename "$model"); }
work=$(mktemp -d)
mkdir -p "$folder"
"$build/daemon/kvtided" --listen "unix:$work/kvtided.sock" --device cpu --device-memory 512MiB --host-memory 0 --calibrate-memory 256MiB \
  --metrics-address off --log-level warning > "$work/log" 2>&1 &
daemon=$!
trap 'kill $daemon; wait $daemon || true; rm -rf "$work"' EXIT
while [ ! -S "$work/kvtided.sock" ]; do kill -0 $daemon; sleep 0.1; done

serve() { # WINDOWS PAIRS: traffic
  "$kvtide" eval --address "unix:$work/kvtided.sock" "${with_model[@]}" --text "$traffic" --pairs "$2" --windows "$1" --context "$context" \
    --no-layer-errors --no-progress --output json --out "$work/traffic.json"
}
calibrate() { "$kvtide" calibrate --from-daemon "unix:$work/kvtided.sock" --model "$registered" --no-progress "$@"; }

serve 1 q8_0/q8_0  # registers the model
calibrate --start --tokens "$tokens" --share "${SHARE:-.2}" > "$work/started"
for _ in 1 2 3 4 5 6; do
  serve "${TRAFFIC_WINDOWS:-6}" q8_0/q8_0,q8_0/turbo4
  ! calibrate --output json | grep -q '"state": "gathering"' || continue
  break
done
{
  echo "from traffic:"
  calibrate --wait --out "$work/traffic.profile" | sed "s|$work/||"
  echo "from the text:"
  "$kvtide" calibrate "${with_model[@]}" --text "$traffic" --tokens "$tokens" --context "$context" --out "$work/text.profile" --no-progress | sed "s|$work/||"
} > "$folder/$name.calibration.txt"
for from in traffic text; do
  out=$folder/$name.json
  [ $from = traffic ] || out=$folder/${name}_text.json
  "$kvtide" eval "${with_model[@]}" --kvtided "$build/daemon/kvtided" --text "$text" --profile "$work/$from.profile" --pairs "$pairs" \
    --windows "${WINDOWS:-4}" --context "$context" --no-layer-errors --no-progress --output json --out "$out"
done
