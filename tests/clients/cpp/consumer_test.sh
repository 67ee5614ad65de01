#!/usr/bin/env bash
# Installs the client into an empty folder, builds the project of somebody else with it, and runs it where no daemon is.
#   consumer_test.sh CMAKE BUILD_FOLDER CONSUMER_SOURCE C++_COMPILER
set -euo pipefail
cmake="$1" build="$2" source="$3" compiler="$4"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$cmake" --install "$build" --component client --prefix "$work/install" >"$work/log"
"$cmake" -S "$source" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$work/install" -DCMAKE_CXX_COMPILER="$compiler" >>"$work/log" 2>&1 || {
  cat "$work/log"
  exit 1
}
"$cmake" --build "$work/build"
code=0
answer="$("$work/build/consumer" "unix:$work/none.sock")" || code=$?
echo "$answer"
[ "$code" -eq 3 ] && [[ "$answer" == *"is kvtided running?"* ]]
