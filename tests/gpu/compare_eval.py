#!/usr/bin/env python3
"""Compares two outputs of `kvtide eval --output json`: the same pairs, perplexities within 0.1 % of each other.

usage: compare_eval.py GPU.json CPU.json
"""
import json
import sys

LIMIT = 0.001


def main():
    gpu, cpu = (json.load(open(path)) for path in sys.argv[1:3])
    for key in ("model", "windows", "context", "chunk", "exact_window", "key_centring"):
        if gpu[key] != cpu[key]:
            sys.exit(f"{key} differs: {gpu[key]} and {cpu[key]}")
    expected = {row["pair"]: row["perplexity"] for row in cpu["results"]}
    measured = {row["pair"]: row["perplexity"] for row in gpu["results"]}
    if expected.keys() != measured.keys() or not expected:
        sys.exit(f"pairs differ: {sorted(measured)} and {sorted(expected)}")
    worst = 0.0
    for pair, perplexity in expected.items():
        difference = abs(measured[pair] / perplexity - 1)
        worst = max(worst, difference)
        print(f"{pair:20} GPU {measured[pair]:.6f}  CPU {perplexity:.6f}  {100 * difference:.5f} %")
    print(f"largest difference {100 * worst:.5f} %, allowed {100 * LIMIT} %; GPU {gpu['seconds']} s, CPU {cpu['seconds']} s")
    sys.exit(0 if worst <= LIMIT else 1)


main()
