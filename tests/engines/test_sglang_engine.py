"""A real SGLang engine, its hierarchical cache over a real kvtided: a second engine gets the pages of the first and gives the same
tokens. With KVTIDE_ENGINES_GPU on a GPU, with SGLang's own kernels and copies; else on this machine's CPU, without sgl_kernel's CPU
build, which the package index has not: SGLang's functions in torch alone (SGLANG_USE_CPU_ENGINE=0), and copies between its device and
host pools by the test (sglang_cpu.py)."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import engine
import pytest
from gpu_sglang import hierarchical_cache
from test_vllm_connector import Daemon

pytest.importorskip("sglang")
NEEDS = [name for name in ("fastapi", "uvloop", "gguf", "torchaudio") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(NEEDS), reason=f"SGLang's engine imports {', '.join(NEEDS)}: run tests/engines/sglang.sh with "
                                "KVTIDE_PYTHON=build/engines/venv/bin/python")


def run(daemon, folder, prompts, pair):
    arguments = {"model_path": engine.MODEL, "mem_fraction_static": 0.1, "max_total_tokens": 4096, "context_length": 1024,
                 **hierarchical_cache(daemon.address, pair, **({"allocator": "shm"} if engine.GPU else {}))}
    if engine.GPU:
        arguments.update(dtype="float16", mem_fraction_static=0.3)  # of a GPU that others may use too
    else:
        arguments.update(dtype="float32", hicache_io_backend="direct", hicache_mem_layout="page_first_direct")
    out = folder / "result.json"
    env = engine.environment(PYTHONPATH=engine.HERE, **({"KVTIDE_ENGINES_GPU": 1} if engine.GPU else {"SGLANG_USE_CPU_ENGINE": 0}))
    done = subprocess.run([sys.executable, str(engine.HERE / "sglang_job.py"), str(out)], env=env, cwd=folder, text=True, capture_output=True,
                          input=json.dumps({"engine": arguments, "prompts": prompts, "new_tokens": 8}), timeout=900)
    log = done.stdout + done.stderr
    assert done.returncode == 0 and out.exists(), log[-6000:]
    return json.loads(out.read_text()), log


def test_a_second_engine_gets_the_pages_of_the_first(tmp_path):
    daemon, numbers = Daemon(tmp_path), random.Random(1)
    prompts = [[numbers.randrange(2, 4096) for _ in range(length)] for length in (300, 520, 400, 280)]
    try:
        first, log = run(daemon, tmp_path, prompts, "f16/f16")
        assert "kvtide: pages of 64 tokens rest in f16/f16 in kvtided at" in log
        assert not any(one["cached"] for one in first)
        os.remove(tmp_path / "result.json")
        second, _ = run(daemon, tmp_path, prompts, "f16/f16")
        print(f"{[one['cached'] for one in second]} of {[len(prompt) for prompt in prompts]} tokens came from kvtided")
        # SGLang asks its storage for prompts of 256 tokens and more. The last ones may have been on their way when the first engine ended.
        assert [one["cached"] for one in second][:2] == [256, 512]
        same = [one["tokens"] == other["tokens"] for one, other in zip(first, second)]
        print(f"{sum(same)} of {len(same)} prompts give equal tokens")
        assert sum(same) >= (3 if engine.GPU else 4)  # float16 and other shapes of the same sums: two tokens may be as likely
    finally:
        daemon.stop()
