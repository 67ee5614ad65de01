#!/usr/bin/env python3
"""Time to the first token of prompts whose pages SGLang has let go, on this GPU: computed again, and from a kvtided below SGLang's
hierarchical cache.

usage: gpu_sglang.py --kvtided PROGRAM [--pairs turbo4/turbo4,exact] [--tokens N] [--prompts N] [--layers N] [--output FILE]

Each pair is an engine of its own with Llama 3.1 8B's dimensions and random weights. It serves random prompts one after the other (one
token each), waits until its storage has what it was given, forgets what it has on the GPU and in its host pool, and serves them again.
SGLang's settings are those that `kvtide connect sglang` prints.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from gpu_bench import LLAMA, command, commit


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvtided", type=pathlib.Path, help="the daemon's program")
    parser.add_argument("--pairs", default="turbo4/turbo4,exact", help="of pages at rest, separated by commas")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--host-gib", type=int, default=12)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--logs", type=pathlib.Path)
    parser.add_argument("--timeout", type=float, default=300, help="seconds that one engine may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def hierarchical_cache(address, pair, **more):
    """Arguments of an SGLang engine whose pages rest in the daemon."""
    extra = {"backend_name": "kvtide", "module_path": "kvtide.sglang", "class_name": "KvtideHiCache", "interface_v1": 1, "address": address,
             "pair": pair, **more}
    return {"page_size": 64, "enable_hierarchical_cache": True, "hicache_ratio": 2.0, "hicache_io_backend": "kernel",
            "hicache_mem_layout": "page_first", "hicache_storage_backend": "dynamic", "hicache_storage_prefetch_policy": "wait_complete",
            "hicache_storage_backend_extra_config": json.dumps(extra)}


WITHOUT_OTHER_PACKAGES = {"attention_backend": "triton", "sampling_backend": "pytorch", "grammar_backend": "none", "disable_cuda_graph": True,
                          "skip_server_warmup": True, "log_level": "info"}
"""Neither FlashInfer nor a grammar compiler; no graphs, since what is measured is a prompt's first step."""


def child(job):
    from sglang.srt.entrypoints.engine import Engine

    began = time.perf_counter()
    engine = Engine(model_path=job["model"], load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, random_seed=0,
                    mem_fraction_static=0.5, context_length=job["tokens"] + 256, max_total_tokens=(job["prompts"] + 3) * (job["tokens"] + 64),
                    chunked_prefill_size=8192, **WITHOUT_OTHER_PACKAGES, **hierarchical_cache(job["address"], job["pair"], allocator="shm"))
    result = {"pair": job["pair"], "start_s": time.perf_counter() - began}

    def first_token(prompt):
        """Seconds; tokens that were found; the token."""
        began = time.perf_counter()
        one = engine.generate(input_ids=[prompt], sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True})[0]
        return time.perf_counter() - began, one["meta_info"]["cached_tokens"], one["output_ids"][0]

    rng = random.Random(1)
    prompts = [[rng.randrange(3, LLAMA["vocab_size"]) for _ in range(job["tokens"])] for _ in range(job["prompts"] + 1)]
    warm = prompts.pop()
    for length in (job["tokens"], 20, job["tokens"]):
        first_token(warm[:length])
    rounds = []
    for name in ("computed", "again"):
        rounds.append([first_token(prompt) for prompt in prompts])
        if name == "computed":
            for i in range(job["wait"] * 5):  # pages go to the storage between steps
                time.sleep(0.2)
                first_token(warm[1:21 + i % 20])
            engine.flush_cache()
            first_token(warm)  # the first that is fetched takes memory
    median = lambda values: sorted(values)[len(values) // 2]
    result.update(computed_ms=1e3 * median([one[0] for one in rounds[0]]), again_ms=1e3 * median([one[0] for one in rounds[1]]),
                  found_tokens=[one[1] for one in rounds[1]], same_tokens=sum(a[2] == b[2] for a, b in zip(*rounds)), prompts=len(prompts))
    pathlib.Path(job["out"]).write_text(json.dumps(result))
    engine.shutdown()


def main():
    arguments = parse()
    if arguments.child:
        return child(json.loads(arguments.child))
    import torch

    result = {"what": "time to the first token of prompts that SGLang let go", "command": command(__file__), "commit": commit(),
              "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(0), "tokens": arguments.tokens, "layers": arguments.layers,
              "cpus": len(os.sched_getaffinity(0)), "engines": [],
              **{name: importlib.metadata.version(name) for name in ("sglang", "sglang-kernel", "kvtide", "torch", "transformers")}}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": arguments.layers}))
        logs, address = arguments.logs or folder, f"unix:{name}/kvtided.sock"
        with open(logs / "kvtided.log", "w") as log:
            daemon = subprocess.Popen([arguments.kvtided, "--listen", address, "--device", "cpu", "--device-memory", "64MiB", "--host-memory",
                                       f"{arguments.host_gib}GiB", "--metrics-address", "off", "--host-sharing"], stdout=log, stderr=log)
        try:
            for number, pair in enumerate(arguments.pairs.split(",")):
                out, log = folder / f"{number}.json", logs / f"sglang_{pair.replace('/', '_')}.log"
                job = {"model": name, "pair": pair, "address": address, "tokens": arguments.tokens, "prompts": arguments.prompts,
                       "wait": 10, "out": str(out)}
                with open(log, "w") as file:
                    try:
                        subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], stdout=file, stderr=subprocess.STDOUT,
                                       timeout=arguments.timeout)
                    except subprocess.TimeoutExpired:
                        print(f"{pair}: no result in {arguments.timeout:.0f} s", file=sys.stderr)
                text = log.read_text()
                said = [line.strip() for line in text.splitlines() if "kvtide:" in line]
                result["engines"].append({**(json.loads(out.read_text()) if out.exists() else {"pair": pair, "failed": text[-2000:]}), "log": said})
                print(json.dumps(result["engines"][-1]), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            daemon.terminate()
            daemon.wait()
    return 0 if all("failed" not in one for one in result["engines"]) else 1


if __name__ == "__main__":
    sys.exit(main())
