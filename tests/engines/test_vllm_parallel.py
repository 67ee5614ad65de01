"""Two tensor-parallel ranks on this machine's CPU (gloo): each has one of the model's two KV heads, and a namespace of its own in the
kvtided. A block counts when both have it, and a rank that is not answered delays a request by its deadline and no more."""

import os
import signal
import time

import engine
import pytest
from kv_events import Subscriber
from test_vllm import check_same, greedy
from test_vllm_connector import FULL, Daemon, hits, transfer
from test_vllm_events import publish

BESIDE = {"PYTHONPATH": str(engine.HERE), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "dtype": "float32"}


@pytest.fixture
def daemon(tmp_path):
    one = Daemon(tmp_path)
    yield one
    os.kill(one.process.pid, signal.SIGCONT)
    one.stop()


@pytest.fixture(scope="module")
def stock():
    return engine.run([greedy(24)], dtype="float32")[0]["batches"][0]


def run(daemon, batches, own="", module="kvtide.vllm.connector", env=None, more=None, **llm):
    engine._run.cache_clear()
    config = transfer(daemon.address, module=module, pair="f16/f16", **(more or {}))
    return engine.run(batches, own, env={**BESIDE, **(env or {})}, kv_transfer_config=config, **TWO, **llm)


@pytest.mark.parametrize("own", ["", "f16/f16"])
def test_both_ranks_get_their_blocks_in_a_second_engine(daemon, stock, own):
    first, log = run(daemon, [greedy(24)], own=own)
    check_same(first["batches"][0], stock, f"two ranks, {own or 'stock'} pages, nothing there yet")
    assert log.count("in kvtided at unix:") == 2
    second, _ = run(daemon, [greedy(24)], own=own)
    check_same(second["batches"][0], stock, "two ranks, blocks of other processes")
    print(f"{hits(second['batches'][0])} of {FULL} tokens came from kvtided")
    assert hits(second["batches"][0]) >= 0.95 * FULL
    # One rank has other keys and values than half of two.
    engine._run.cache_clear()
    alone, _ = engine.run([greedy(4)], own, dtype="float32", kv_transfer_config=transfer(daemon.address, pair="f16/f16"))
    assert hits(alone["batches"][0]) == 0


def test_a_block_that_one_rank_could_not_store_is_nobodys(daemon, stock, tmp_path):
    router = Subscriber(publish(tmp_path)["endpoint"])
    first, _ = run(daemon, [greedy(24), greedy(1)], module="connector_ranks", env={"KVTIDE_FAULT": "half"},
                   kv_events_config=publish(tmp_path))
    check_same(first["batches"][0], stock, "one rank without room for half of the blocks")
    router.read()
    odd = [one for one in router.told if (one if isinstance(one, int) else one[-1]) % 2]
    assert router.told and not odd, "told is what both have"
    second, _ = run(daemon, [greedy(24)])
    check_same(second["batches"][0], stock, "blocks of both ranks alone")
    wanted = 0
    for prompt in engine.prompts(200)[:24]:
        chain = router.hashes(prompt)[:(len(prompt) - 1) // 64]
        wanted += 64 * next((i for i, one in enumerate(chain) if one not in router.told), len(chain))
    print(f"{hits(second['batches'][0])} of {FULL} tokens came from kvtided, {wanted} of blocks that were told")
    assert 0 < hits(second["batches"][0]) < FULL and hits(second["batches"][0]) == pytest.approx(wanted, abs=64 * 2)


def test_a_rank_that_is_not_answered_delays_by_its_deadline_and_no_more(daemon, stock):
    """kvtided stops in the middle of a load of the second rank."""
    run(daemon, [greedy(24)])
    began = time.monotonic()
    ours, log = run(daemon, [greedy(24)], module="connector_ranks", env={"KVTIDE_FAULT": f"stop:{daemon.process.pid}"},
                    more={"timeout": 2.0, "lookup_timeout": 0.5})
    check_same(ours["batches"][0], stock, "a daemon that is stopped while a rank loads")
    assert "Recovered from KV load failure" in log and "lost kvtided at" in log
    print(f"answered after {time.monotonic() - began:.0f} s, the start of the engine counted in")
