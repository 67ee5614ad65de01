#!/usr/bin/env bash
# record.sh [--append] LOG HEADLINE: what a log of the tests says, as last_run.txt; --append: of a part, behind what is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=tests/engines/last_run.txt
if [ "$1" = --append ]; then
  shift
else
  : > "$out"
fi
{
  echo "$2, $(date -u +%Y-%m-%d), commit $(git rev-parse --short HEAD), $(nproc) cores"
  # The name of a test and the first line that it prints stand on one line.
  sed -E 's|^[./a-z_]*tests/engines/||; s/ (PASSED|FAILED|SKIPPED)$/\n\1/' "$1" |
    grep -E "^test_[a-z_]*\.py::|^PASSED|^FAILED|^SKIPPED|perplexity|differs|equal|tokens of f16|tokens (came|found|by tier)|blocks rest|from where they lie|chunks told|[0-9]+ (passed|failed)|^vLLM [0-9]" |
    sed -E 's/^(test_[a-z_]*\.py::[^ ]+) +(.)/\1\n\2/' | grep -v "Writing model shards"
} >> "$out"
