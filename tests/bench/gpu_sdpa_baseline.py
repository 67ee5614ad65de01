#!/usr/bin/env python3
"""f16 decode attention of PyTorch on the shapes of gpu_attend_bench: what the coded kernels are compared with.

usage: gpu_sdpa_baseline.py [--json FILE] [--bench BENCH_JSON]

Every SDPA backend that accepts the shape, one query token, grouped heads; buffers in turn so that nothing stays in L2;
median of 30 calls between events, and of the same calls in a CUDA graph. With --bench it prints the ratios.
"""
import argparse
import json
import math

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [  # sequences, KV heads, tokens, head dim, group
    (33, 4, 32768, 128, 1), (33, 4, 32768, 128, 4), (33, 4, 32768, 128, 8), (33, 4, 32768, 128, 16), (33, 4, 32768, 64, 8),
    (16, 4, 32768, 256, 8), (1, 8, 131072, 128, 4), (66, 8, 4096, 128, 4), (1, 8, 32768, 128, 4), (512, 8, 512, 128, 4),
]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def median_us(call, count):
    for i in range(5):
        call(i)
    pairs = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(count)]
    for i, (begin, end) in enumerate(pairs):
        begin.record()
        call(i)
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[count // 2] * 1e3


def measure(shape):
    sequences, kv_heads, tokens, dim, group = shape
    size = 2 * sequences * kv_heads * tokens * dim * 2
    copies = min(max(2, math.ceil(400e6 / size)), 8)
    keys = [torch.randn(sequences, kv_heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(copies)]
    values = [torch.randn_like(k) for k in keys]
    query = torch.randn(sequences, kv_heads * group, 1, dim, device="cuda", dtype=torch.float16)
    times = {}
    for name, backend in BACKENDS.items():
        def attend(i, backend=backend):
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(query, keys[i % copies], values[i % copies], enable_gqa=group > 1)
        try:
            times[name] = median_us(attend, 30)
            stream = torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                attend(0)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for i in range(10):
                    attend(i)
            times[name + "_graph"] = median_us(lambda i: graph.replay(), 10) / 10
        except Exception as error:  # a backend that refuses the shape is no baseline for it
            times.setdefault(name, None)
            print(f"  {name} on {shape}: {str(error).splitlines()[0][:100]}")
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--bench")
    arguments = parser.parse_args()
    rows = []
    for shape in SHAPES:
        times = measure(shape)
        torch.cuda.empty_cache()
        known = [t for t in times.values() if t]
        rows.append({"shape": shape, "times_us": times, "best_us": min(known) if known else None})
        print(shape, {k: round(v, 1) for k, v in times.items() if v})
    result = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "shapes": rows}
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)
    if arguments.bench:
        best = {tuple(r["shape"]): r["best_us"] for r in rows}
        for s in json.load(open(arguments.bench))["shapes"]:
            key = (s["sequences"], s["kv_heads"], s["tokens"], s["head_dim"], s["group"])
            if best.get(key):
                mine = s["in_graph_us"]
                print(f"{s['pair']:12s} {key}: {mine:7.1f} us, f16 {best[key]:7.1f} us: {best[key] / mine:.2f}x")


if __name__ == "__main__":
    main()
