#!/usr/bin/env python3
"""f16 prefill attention of PyTorch on the shapes of gpu_prefill_bench, added to the bench's result file with the ratios.

usage: gpu_prefill_baseline.py --bench BENCH_JSON

flash: causal with the queries at the end of the context (its own alignment); cudnn_all: cuDNN without a mask, as its causal
mask puts the queries at the start: up to a few per cent more work. Median of 10 calls between events.
"""
import argparse
import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as functional


def median_us(call):
    times = []
    for i in range(13):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def measure(shape):
    queries, tokens, heads, kv_heads, dim = shape
    q = torch.randn(1, heads, queries, dim, device="cuda", dtype=torch.float16)
    k = torch.randn(1, kv_heads, tokens, dim, device="cuda", dtype=torch.float16)
    v = torch.randn_like(k)
    k_all, v_all = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))

    def flash():
        torch.ops.aten._scaled_dot_product_flash_attention(q, k_all, v_all, 0.0, True)

    def flash_grouped():
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)

    def cudnn_all():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    times = {}
    for call in (flash, flash_grouped, cudnn_all):
        try:
            times[call.__name__] = median_us(call)
        except Exception as error:  # a backend that refuses the shape is no baseline for it
            print(f"  {call.__name__} on {shape}: {str(error).splitlines()[0][:100]}")
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", required=True)
    path = parser.parse_args().bench
    result = json.load(open(path))
    known = {}
    for s in result["shapes"]:
        shape = (s["queries"], s["tokens"], s["heads"], s["kv_heads"], s["head_dim"])
        if s["queries"] < 128:
            continue
        if shape not in known:
            known[shape] = measure(shape)
            torch.cuda.empty_cache()
        times = known[shape]
        s["torch_us"] = {name: round(us, 1) for name, us in times.items()}
        if times:
            s["best_torch_us"] = round(min(times.values()), 1)
            s["speed_of_torch"] = round(min(times.values()) / s["prefill_us"], 3)
            print(f"{s['pair']:8s} {shape}: {s['prefill_us']:8.1f} us, torch {s['torch_us']}: {s['speed_of_torch']:.2f} of its speed")
    result["torch"] = torch.__version__
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
