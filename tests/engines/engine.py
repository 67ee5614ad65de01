"""Runs vLLM engines for the tests, one process each, and keeps what they said."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
MODEL = str(ROOT / "clients" / "engine" / "models" / "tidelm-7m")
TEXT = ROOT / "tests" / "data" / "wikitext2_slice.txt"
GPU = bool(os.environ.get("KVTIDE_ENGINES_GPU"))  # a stock vLLM on this machine's GPU, decoding in CUDA graphs


def without_flashinfer():
    """Settings for GPUs: vLLM's sampler imports FlashInfer, which is a package of its own, without looking whether it is installed."""
    return {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}


def environment(pair="", **more):
    """Of a vLLM on this machine; `pair`: kvtide's backend with it, else vLLM's own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "KVTIDE_"))}
    env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    if not GPU:
        env.update(VLLM_TARGET_DEVICE="cpu", OMP_NUM_THREADS="1")  # spinning threads are slow on a busy machine
    else:
        env.update(without_flashinfer())
    if pair:
        env["KVTIDE_PAIR"] = pair
    path = env.get("PYTHONPATH")
    env.update({key: str(value) for key, value in more.items()})
    if path and "PYTHONPATH" in more:  # more modules, not another kvtide
        env["PYTHONPATH"] += os.pathsep + path
    return env


def llm_arguments(pair, **more):
    out = {"model": MODEL, "dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 16, "block_size": 64,
           "kv_cache_memory_bytes": 256 << 20, "disable_log_stats": False, "seed": 0}
    if not GPU:
        return {**out, "enforce_eager": True, **more}
    out["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if pair:
        out["attention_backend"] = "CUSTOM"
    return {**out, **more}


def run(batches, pair="", env=None, **llm):
    """The result of vllm_job.py and its log. AssertionError with the log's end where it fails."""
    result, log = _run(json.dumps({"llm": llm_arguments(pair, **llm), "batches": batches}), pair, tuple(sorted((env or {}).items())))
    return result, log


@functools.lru_cache(maxsize=None)
def _run(job, pair, env):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "result.json"
        done = subprocess.run([sys.executable, str(HERE / "vllm_job.py"), str(out)], input=job, text=True, capture_output=True, cwd=folder,
                              env=environment(pair, **dict(env)), timeout=1800)
        log = done.stdout + done.stderr
        assert done.returncode == 0 and out.exists(), log[-6000:]
        assert not pair or "kvtide: KV cache in " in log, "vLLM has run its own backend: the plugin is not installed"
        return json.loads(out.read_text()), log


@functools.lru_cache(maxsize=None)
def text_tokens():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    # `kvtide eval` begins a text with the model's first token.
    config = json.loads((pathlib.Path(MODEL) / "config.json").read_text())
    return [config["bos_token_id"]] + tokenizer(TEXT.read_text(), verbose=False)["input_ids"]


def prompts(count, shortest=20, longest=600):
    """Pieces of the text, of lengths that spread over the range."""
    tokens, out, at = text_tokens(), [], 0
    for i in range(count):
        length = shortest + (longest - shortest) * (i * 7919 % count) // max(1, count - 1)
        out.append(tokens[at:at + length])
        at = (at + 331) % (len(tokens) - longest)
    return out


GREEDY = {"temperature": 0, "max_tokens": 32, "ignore_eos": True}


def differences(ours, theirs):
    """For each prompt whose tokens differ: (prompt, first place, their margin there)."""
    out = []
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a["tokens"][0] == b["tokens"][0]:
            continue
        place = next(p for p, (x, y) in enumerate(zip(a["tokens"][0], b["tokens"][0])) if x != y)
        out.append((i, place, b["margins"][place]))
    return out
