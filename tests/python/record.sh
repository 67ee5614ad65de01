#!/usr/bin/env bash
# record.sh TRANSFORMERS_LOG LLAMA_LOG: what the two stages said last, as last_run.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
{
  echo "$(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD), $(nproc) cores, load $(cut -d' ' -f1 /proc/loadavg)"
  for stage in transformers llama; do
    echo
    echo "tests/run.sh $stage"
    grep -aE "perplexity of [0-9]+ tokens|nats/token|[0-9]+ (passed|failed)|^(FAILED|ERROR) " "$1" || true
    shift
  done
} > tests/python/last_run.txt
