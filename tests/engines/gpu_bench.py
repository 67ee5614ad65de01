#!/usr/bin/env python3
"""Decoding speed of vLLM on this GPU over several KV caches: kvtide's pages, and what vLLM has itself.

usage: gpu_bench.py [--caches f16,fp8,...] [--shapes 16x32768,64x8192] [--layers N] [--output FILE] [--help]

A shape is sequences x tokens of a prompt. For each cache an engine of its own process serves the same prompts of random tokens to the
same model: Llama 3.1 8B's dimensions, random weights, so that nothing is downloaded (speed does not depend on the numbers). Timed are
the steps in which every sequence decodes; tokens/s = tokens of these steps / their time. --limit measures "as many sequences as fit":
a cache of so many GiB, prompts of --limit-tokens tokens. Results as JSON: tests/bench/gpu_report.py makes the manual's table of them.

    pip install vllm, KVTIDE_CUDA=ON pip install .                    # see tests/engines/README.md
    python tests/engines/gpu_bench.py --output tests/bench/results/gpu_vllm.json
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import graph_modes
from engine import without_flashinfer

CACHES = ["f16", "fp8", "turboquant_k8v4", "turboquant_4bit_nc", "kvtide f16", "kvtide q8_0/turbo4", "kvtide turbo4/turbo4"]
"""What vLLM calls a cache, `f16` for its 16-bit one, or a pair of kvtide's."""

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 32, "vocab_size": 128256,
         "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
         "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "tie_word_embeddings": False}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", default="f16,fp8,turboquant_k8v4,turboquant_4bit_nc,kvtide turbo4/turbo4", help=", ".join(CACHES))
    parser.add_argument("--shapes", default="16x512,16x32768,64x512,64x8192", help="sequences x tokens, separated by commas")
    parser.add_argument("--steps", type=int, default=96, help="timed steps of a shape")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=0, metavar="GiB", help="a cache of this size, as many sequences as fit")
    parser.add_argument("--limit-tokens", type=int, default=4096)
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallel")
    parser.add_argument("--compile", action="store_true", help="vLLM's own defaults: torch.compile, full and piecewise CUDA graphs")
    parser.add_argument("--graphs", help="vLLM's cudagraph_mode; default: FULL_DECODE_ONLY, with --compile vLLM's own "
                        "(FULL_AND_PIECEWISE). PIECEWISE or FULL_AND_PIECEWISE without --compile: vLLM's graphs with breaks (VLLM_USE_BREAKABLE_CUDAGRAPH)")
    parser.add_argument("--model", help="a folder with a real model, instead of Llama's dimensions")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--logs", type=pathlib.Path, help="where the engines' logs are kept")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one engine may take")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# --- one engine, in a process of its own ---


def without_flash_attention_2():
    """vLLM's TurboQuant asks for FlashAttention 2 for prompts. Where that library is not there, 3 serves them as well; decoding uses
    TurboQuant's own kernels either way."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.vllm_flash_attn import flash_attn_interface

    if flash_attn_interface.FA2_AVAILABLE:
        return ""
    # FlashAttention 3's plans made ahead want all layers to be its own: none where the builder asks, which names no head size.
    fa_utils.get_flash_attn_version = lambda *_, head_size=None, **__: 3 if head_size else 2
    return "prompts by FlashAttention 3 (2 is not installed)"


def engine_arguments(job):
    tokens = max([shape[1] for shape in job["shapes"]] + [job["limit_tokens"] if job["limit"] else 0])
    sequences = max([shape[0] for shape in job["shapes"]] + [job["limit_sequences"] if job["limit"] else 0])
    out = dict(model=job["model"], dtype="bfloat16", max_model_len=tokens + 2 * job["steps"] + 64, max_num_seqs=sequences,
               max_num_batched_tokens=8192, seed=0, skip_tokenizer_init=True, enable_prefix_caching=False,
               tensor_parallel_size=job["gpus"])
    if not job["compile"]:
        sizes = sorted({n for n in (1, 16, 32, 64, 128, sequences) if n <= sequences})
        out["compilation_config"] = {"mode": 0, "cudagraph_mode": job["graphs"] or "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    elif job["graphs"]:
        out["compilation_config"] = {"cudagraph_mode": job["graphs"]}
    if job["dummy"]:
        out["load_format"] = "dummy"
    if job["limit"]:
        out["kv_cache_memory_bytes"] = int(job["limit"] * 2**30)
    if job["cache"].startswith("kvtide"):
        out.update(attention_backend="CUSTOM", block_size=64)
    elif job["cache"] != "f16":
        out["kv_cache_dtype"] = job["cache"]
    return out


def child(job):
    note = without_flash_attention_2() if job["cache"].startswith("turboquant") else ""
    modes = graph_modes.count()
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(job)))
    cache = engine.vllm_config.cache_config
    result = {"cache": job["cache"], "note": note, "start_s": time.perf_counter() - began,
              "kv_tokens": cache.num_gpu_blocks * cache.block_size, "shapes": []}
    import random

    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    params = lambda count: SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)

    def serve(number, sequences, tokens, steps):
        """Seconds until every sequence has its first token, and of each step after that in which all decode."""
        rng = random.Random(number)
        for s in range(sequences):
            prompt = [rng.randrange(3, vocabulary) for _ in range(tokens)]
            engine.add_request(f"{number}-{s}", {"prompt_token_ids": prompt}, params(steps))
        made, started, first, last, counted = {}, time.perf_counter(), None, None, 0
        stamps = []
        modes.clear()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            new = 0
            for output in outputs:
                length = len(output.outputs[0].token_ids)
                new += length - made.get(output.request_id, 0)
                made[output.request_id] = length
            stamps.append((now, new, len(made), max(made.values(), default=0)))
        first = next(i for i, one in enumerate(stamps) if one[2] == sequences)
        # Steps that all sequences take part in; the first few fill the pipeline.
        whole = [i for i in range(first + 4, len(stamps)) if stamps[i][1] == sequences]
        seconds = [stamps[i][0] - stamps[i - 1][0] for i in whole]
        return stamps[first][0] - started, sorted(seconds)

    serve(0, 1, 100, 8)
    shapes = list(job["shapes"])
    if job["limit"]:
        fit = min(job["limit_sequences"], result["kv_tokens"] // (-(-(job["limit_tokens"] + job["steps"]) // 64) * 64))
        shapes = [[fit, job["limit_tokens"]]]
    for number, (sequences, tokens) in enumerate(shapes, 1):
        if sequences * (tokens + job["steps"]) > result["kv_tokens"]:
            result["shapes"].append({"sequences": sequences, "tokens": tokens, "fits": False})
            continue
        # Sequences whose prompts are done wait for the others decoding: the last prompt's chunks take that many steps.
        extra = -(-sequences * tokens // 8192) + 8
        first, seconds = serve(number, sequences, tokens, job["steps"] + extra)
        median = seconds[len(seconds) // 2]
        result["shapes"].append({"sequences": sequences, "tokens": tokens, "fits": True, "prompts_s": first, "steps": len(seconds),
                                 "step_ms": 1e3 * median, "step_p90_ms": 1e3 * seconds[len(seconds) * 9 // 10], "graphs": dict(modes),
                                 "tokens_per_s": sequences / median, "prompt_tokens_per_s": sequences * tokens / first})
        print(json.dumps(result["shapes"][-1]), file=sys.stderr, flush=True)
    pathlib.Path(job["out"]).write_text(json.dumps(result))


# --- all of them, one after the other ---


class Engine:
    def __init__(self, job, folder, script):
        self.job, self.out = job, folder / (re.sub(r"\W+", "_", f"{job['cache']} {job.get('way', '')}".strip()) + ".json")
        self.log = (job["logs"] and pathlib.Path(job["logs"]) or folder) / self.out.with_suffix(".log").name
        env = {**without_flashinfer(), **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
               "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        env.pop("KVTIDE_PAIR", None)
        if job["cache"].startswith("kvtide"):
            env["KVTIDE_PAIR"] = job["cache"].split()[1]  # of the pages; a cache below them may be named behind it
        if "PIECEWISE" in (job.get("graphs") or "") and not job["compile"]:
            env["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, script, "--child", json.dumps({**job, "out": str(self.out)})],
                                            stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env, text=True)

    def finish(self):
        try:
            self.process.communicate("go\n", timeout=self.job["timeout"])
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        text = self.log.read_text()
        if self.process.returncode or not self.out.exists():
            print(text[-5000:], file=sys.stderr)
            names = {key: self.job[key] for key in ("cache", "way") if key in self.job}
            return {**names, "failed": text.strip().splitlines()[-1][-300:] if text.strip() else "no words"}
        return {**json.loads(self.out.read_text()), "log": [line.strip() for line in text.splitlines() if "kvtide:" in line]}


def versions():
    import importlib.metadata

    import torch

    out = {name: importlib.metadata.version(name) for name in ("vllm", "kvtide", "torch")}
    properties = torch.cuda.get_device_properties(0)
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    return {"device": properties.name, "driver": driver.stdout.strip().splitlines()[0] if driver.stdout.strip() else "", **out}


def commit():
    return os.environ.get("KVTIDE_COMMIT") or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                                             text=True).stdout.strip()


def command(script):
    """What repeats the run: without where it put what, and without folders of its machine."""
    words = sys.argv[1:]
    for option in ("--output", "--logs"):
        if option in words:
            del words[words.index(option):words.index(option) + 2]
    return shlex.join([pathlib.Path(script).name, *(pathlib.Path(word).name if word.startswith("/") else word for word in words)])


def run_all(jobs, folder, script, result, output):
    """An engine for each job, into `result` and, after each, into the file `output`."""
    following = Engine(jobs[0], folder, script)
    for i in range(len(jobs)):
        engine = following  # the next one imports its modules meanwhile
        following = Engine(jobs[i + 1], folder, script) if i + 1 < len(jobs) else None
        began = time.perf_counter()
        result["engines"].append({**engine.finish(), "whole_s": time.perf_counter() - began})
        print(json.dumps(result["engines"][-1]), flush=True)
        if output:
            output.write_text(json.dumps({**versions(), **result}, indent=1) + "\n")


def main():
    arguments = parse()
    if arguments.child:
        return child(json.loads(arguments.child))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if not arguments.model:
            (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": arguments.layers}))
        job = {"model": arguments.model or name, "dummy": not arguments.model, "steps": arguments.steps, "limit": arguments.limit,
               "limit_tokens": arguments.limit_tokens, "limit_sequences": 128,
               "gpus": arguments.gpus, "compile": arguments.compile, "graphs": arguments.graphs, "timeout": arguments.timeout,
               "logs": str(arguments.logs or ""),
               "shapes": [] if arguments.limit else [[int(n) for n in one.split("x")] for one in arguments.shapes.split(",")]}
        result = {"what": "decoding in vLLM", "command": command(__file__),
                  "commit": commit(),
                  "date": time.strftime("%Y-%m-%d"), "layers": arguments.layers, "gpus": arguments.gpus, "compile": arguments.compile,
                  "graphs": arguments.graphs, "cpus": len(os.sched_getaffinity(0)), "limit_gib": arguments.limit, "engines": []}
        run_all([{**job, "cache": cache} for cache in arguments.caches.split(",")], folder, __file__, result, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
