#!/usr/bin/env python3
"""Time to the first token of prompts whose keys and values vLLM has let go, on this GPU: computed again, from vLLM's own CPU offload,
from a kvtided.

usage: gpu_offload.py --kvtided PROGRAM [--caches f16,"f16 + cpu",...] [--ways in-place,arena] [--tokens N] [--prompts N] [--layers N]
                      [--piece-mib N] [--output FILE]

Each cache is an engine of its own process with Llama 3.1 8B's dimensions and random weights. It serves random prompts one after the
other (one token each), waits until what it saves is saved, forgets its prefix cache, and serves them again. What the second time took
beside the first is the measure; the rates are those that the connector counts: from the call of the daemon to the last copy. What rests
in kvtided is measured with a daemon for each of --ways: in-place = blocks are copied from where they lie in its host memory
(--host-sharing; the engine runs as the daemon's user), arena = they come through memory that both see.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from gpu_bench import LLAMA, command, commit, run_all

CACHES = ["f16", "f16 + cpu", "f16 + exact", "f16 + q8_0/turbo4", "f16 + turbo4/turbo4", "kvtide turbo4/turbo4",
          "kvtide turbo4/turbo4 + kvtided"]
"""Pages, `+` what is below them: vLLM's own CPU offload, or a pair in which f16 pages rest in kvtided (exact: as they are)."""


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvtided", type=pathlib.Path, help="the daemon's program")
    parser.add_argument("--caches", default=",".join(CACHES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--host-gib", type=int, default=16)
    parser.add_argument("--piece-mib", type=int, help="of the connector; default: its own")
    parser.add_argument("--ways", default="in-place,arena", help="of blocks from kvtided to the engine, separated by commas")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--logs", type=pathlib.Path)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def engine_arguments(job):
    pages, _, below = job["cache"].partition(" + ")
    out = dict(model=job["model"], dtype="bfloat16", max_model_len=job["tokens"] + 128, max_num_seqs=8, max_num_batched_tokens=8192,
               seed=0, skip_tokenizer_init=True, enable_prefix_caching=True, load_format="dummy", enforce_eager=True, block_size=64,
               kv_cache_memory_bytes=16 << 30)
    if pages.startswith("kvtide"):
        out["attention_backend"] = "CUSTOM"
    if below == "cpu":
        out["kv_offloading_size"] = float(job["host_gib"])
    elif below:
        extra = {"address": job["addresses"][job["way"]], "pair": "q8_0/turbo4" if below == "kvtided" else below, "salt": job["cache"]}
        if job["piece_mib"]:
            extra["piece_mib"] = job["piece_mib"]
        out["kv_transfer_config"] = {"kv_connector": "KvtideConnector", "kv_connector_module_path": "kvtide.vllm.connector",
                                     "kv_role": "kv_both", "kv_load_failure_policy": "recompute", "kv_connector_extra_config": extra}
    return out


def child(job):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    print("ready", flush=True)
    sys.stdin.readline()
    engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(job)))
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    totals, marks, parts = {}, [], []
    connector = None
    if job["way"]:
        from dataclasses import asdict

        from vllm.distributed.kv_transfer import get_kv_transfer_group

        connector = get_kv_transfer_group()
        take = connector.worker.take_counts

        def counted():
            counts = take()
            for name, value in asdict(counts).items():
                totals[name] = totals.get(name, 0) + value
            return counts

        connector.worker.take_counts = counted
        start_loads, take_done = connector.worker.start_loads, connector.worker.take_done

        def loads_start(step):
            if step.loads:
                marks.append(time.perf_counter())
            start_loads(step)

        def loads_end():
            saved, received = take_done()
            if received:
                marks.append(time.perf_counter())
            return saved, received

        connector.worker.start_loads, connector.worker.take_done = loads_start, loads_end

    def first_token(number, prompt):
        """Seconds to the first token; tokens that were found; the token."""
        engine.add_request(str(number), {"prompt_token_ids": prompt},
                           SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False))
        began, result = time.perf_counter(), None
        marks.clear()
        while engine.has_unfinished_requests():
            for output in engine.step():
                result = result or (time.perf_counter() - began, output.num_cached_tokens or 0, output.outputs[0].token_ids[0])
        if len(marks) == 2:
            parts.append((marks[0] - began, marks[1] - marks[0], result[0] + began - marks[1]))
        return result

    rng = random.Random(1)
    prompts = [[rng.randrange(3, vocabulary) for _ in range(job["tokens"])] for _ in range(job["prompts"] + 1)]
    warm = prompts.pop()
    first_token("w0", warm)
    rounds = []
    for name in ("computed", "again"):
        totals.clear()
        rounds.append([first_token(f"{name}{i}", prompt) for i, prompt in enumerate(prompts)])
        # Saves go on behind the answers, and blocks are free again in a step after them: an engine without requests makes none. These
        # are too short to be saved.
        for i in range(20):
            time.sleep(0.1)
            first_token(f"{name}s{i}", warm[:20 + i])
        if connector is not None:
            counted()
        counts = dict(totals)
        if name == "computed":
            saved = counts
            for i in range(200):
                if engine.reset_prefix_cache():
                    break
                time.sleep(0.1)
                first_token(f"{name}r{i}", warm[:20])
            else:
                raise TimeoutError("what is saved still holds its blocks")
            first_token("w1", warm)  # the first load of all takes memory
            parts.clear()
    median = lambda values: sorted(values)[len(values) // 2]
    result = {"cache": job["cache"], "way": job["way"], "computed_ms": 1e3 * median([one[0] for one in rounds[0]]),
              "again_ms": 1e3 * median([one[0] for one in rounds[1]]), "found_tokens": median([one[1] for one in rounds[1]]),
              "same_tokens": sum(a[2] == b[2] for a, b in zip(*rounds)), "prompts": len(prompts), "saved": saved, "loaded": counts}
    if connector is not None:
        stores = connector.worker.load_link.stores()
        result["block_bytes"], result["page_bytes"] = stores[0].block_bytes, connector.worker.pages.bytes
        if parts:  # of the time to the first token: until the load begins, the load, what is computed behind it
            result["parts_ms"] = [1e3 * median(list(column)) for column in zip(*parts)]
        if counts.get("load_seconds"):
            result["load_gb_s"] = counts["loaded_blocks"] * result["block_bytes"] / counts["load_seconds"] / 1e9
            if counts["in_place_blocks"] != (counts["loaded_blocks"] if job["way"] == "in-place" else 0):
                result["way"] += f" asked, {counts['in_place_blocks']} of {counts['loaded_blocks']} blocks came from where they lie"
        if saved.get("save_seconds"):
            result["save_gb_s"] = saved["saved_blocks"] * result["block_bytes"] / saved["save_seconds"] / 1e9
    pathlib.Path(job["out"]).write_text(json.dumps(result))


def link_gb_s():
    """A copy of 256 MiB from pinned memory to the GPU."""
    script = ("import torch\nx = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()\ny = torch.empty_like(x, device='cuda')\n"
              "a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)\n"
              "best = 0\nfor _ in range(5):\n a.record(); y.copy_(x, non_blocking=True); b.record(); b.synchronize()\n"
              " best = max(best, x.numel() / a.elapsed_time(b) / 1e6)\nprint(best)")
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


def main():
    arguments = parse()
    if arguments.child:
        return child(json.loads(arguments.child))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": arguments.layers}))
        ways = arguments.ways.split(",")
        addresses = {way: f"unix:{name}/{way}.sock" for way in ways}
        job = {"model": name, "tokens": arguments.tokens, "prompts": arguments.prompts, "host_gib": arguments.host_gib,
               "addresses": addresses, "piece_mib": arguments.piece_mib, "timeout": arguments.timeout, "logs": str(arguments.logs or "")}
        daemons = []
        for way, address in addresses.items() if arguments.kvtided else ():
            with open((arguments.logs or folder) / f"kvtided_{way}.log", "w") as log:
                daemons.append(subprocess.Popen([arguments.kvtided, "--listen", address, "--device", "cpu", "--device-memory", "64MiB",
                                                 "--host-memory", f"{arguments.host_gib}GiB", "--metrics-address", "off",
                                                 *(["--host-sharing"] if way == "in-place" else [])], stdout=log, stderr=subprocess.STDOUT))
        result = {"what": "time to the first token of prompts that were let go", "command": command(__file__),
                  "commit": commit(), "date": time.strftime("%Y-%m-%d"), "tokens": arguments.tokens, "layers": arguments.layers,
                  "cpus": len(os.sched_getaffinity(0)), "link_gb_s": link_gb_s(), "engines": []}
        caches = [one.strip() for one in arguments.caches.split(",")]
        jobs = [{**job, "cache": cache, "way": way} for cache in caches
                for way in (ways if cache.partition(" + ")[2] not in ("", "cpu") else [""])]
        run_all(jobs, folder, __file__, result, arguments.output)
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
