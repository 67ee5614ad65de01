#!/usr/bin/env bash
# A real Prometheus beside a real kvtided under load: every panel and rule is evaluated (prometheus_test.py), and promtool checks the
# exposition, the rules and the alerts over made-up series (tests/daemon/metrics/deploy_test.py).
#   tests/run.sh prometheus [--pictures deploy/grafana/pictures]     ... which draws the dashboard from the answers
# Prometheus is taken from where it is installed; else its package is unpacked under build/, which starts no service and changes nothing else.
set -euo pipefail
cd "$(dirname "$0")/../.."
prometheus="$(command -v prometheus || true)" promtool="$(command -v promtool || true)"
if [ -z "$prometheus" ] || [ -z "$promtool" ]; then
  tools="$PWD/build/prometheus"
  if [ ! -x "$tools/usr/bin/prometheus" ]; then
    mkdir -p "$tools"
    (cd "$tools" && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb)
  fi
  prometheus="$tools/usr/bin/prometheus" promtool="$tools/usr/bin/promtool"
fi
cmake --preset dev
cmake --build --preset dev --target kvtided kvtide kvtide_e2e_appender kvtide_write_exposition kvtide_nvml_standin
build=build/dev
"$build/tests/daemon/metrics/kvtide_write_exposition" "$build/exposition.txt"
python3 tests/daemon/metrics/deploy_test.py . "$build/exposition.txt" --promtool "$promtool"
python3 tests/deploy/prometheus_test.py . "$build/daemon/kvtided" "$build/clients/cli/kvtide" "$build/tests/e2e/kvtide_e2e_appender" "$prometheus" "$@"
