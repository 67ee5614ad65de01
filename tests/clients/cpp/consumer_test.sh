#!/usr/bin/env bash
# Installs a part of the package into an empty folder, builds the project of somebody else with it, and runs it: the client where
# no daemon is, the pool in its own process.
#   consumer_test.sh client|pool CMAKE BUILD_FOLDER CONSUMER_SOURCE C++_COMPILER
set -euo pipefail
part="$1" cmake="$2" build="$3" source="$4" compiler="$5"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
install() { "$cmake" --install "$build" --component "$1" --prefix "$work/install" >>"$work/log"; }
install client
if [ "$part" = pool ]; then install pool; fi
"$cmake" -S "$source" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$work/install" -DCMAKE_CXX_COMPILER="$compiler" \
  -DPOOL="$([ "$part" = pool ] && echo ON || echo OFF)" >>"$work/log" 2>&1 || {
  cat "$work/log"
  exit 1
}
"$cmake" --build "$work/build"
if [ "$part" = pool ]; then
  answer="$("$work/build/pool_consumer")" || { echo "$answer"; exit 1; }
  echo "$answer"
  [[ "$answer" == "embedded: "* ]]
  exit
fi
code=0
answer="$("$work/build/consumer" "unix:$work/none.sock")" || code=$?
echo "$answer"
[ "$code" -eq 3 ] && [[ "$answer" == *"is kvtided running?"* ]]
