"""kvtided as a secondary tier of vLLM's own OffloadingConnector: jobs over a double of the daemon, and a real engine over a real one."""

import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import engine
import numpy as np
import pytest

sys.path.insert(0, str(engine.ROOT / "tests" / "python"))

from block_store_double import Daemon as Double  # noqa: E402
from test_vllm import check_same, greedy  # noqa: E402
from test_vllm_connector import FULL, Daemon, hits  # noqa: E402

from kvtide import store_link  # noqa: E402
from kvtide.errors import InvalidArgument  # noqa: E402

pytest.importorskip("vllm")
from vllm.v1.kv_offload.base import LookupResult, Medium  # noqa: E402

from kvtide.vllm.tier import KvtideTier, TierSettings, fingerprint  # noqa: E402

CHUNKS, BYTES = 8, 4096
KEYS = [bytes([i]) * 36 for i in range(6)]


@dataclass
class Group:
    tokens_per_block: int = 16
    layer_names: tuple = ("a", "b")
    group_id: int = 0


@dataclass
class Cache:
    tokens_per_hash: int = 16
    blocks_per_chunk: int = 4


def config(**changes):
    one = dict(model=SimpleNamespace(name="some/model", dtype="bfloat16"), groups=(Group(),), cache=Cache(),
               parallel=SimpleNamespace(tp_size=1, pp_size=1, pcp_size=1, dcp_size=1), kv_cache_layout="NHD")
    return SimpleNamespace(**{**one, **changes})


class World:
    def __init__(self, monkeypatch, double=None, events=False, **settings):
        self.double = double or Double()
        monkeypatch.setattr(store_link, "connect", lambda *_, **__: self.double.open_pool())
        self.memory = np.random.default_rng(0).integers(-128, 128, (CHUNKS, BYTES), dtype=np.int8)
        spec = SimpleNamespace(config=config(), kv_events_config=SimpleNamespace(enable_kv_cache_events=events))
        self.tier = KvtideTier(spec, memoryview(self.memory), "KvtideTier", connect_wait=20, **settings)
        self.next = 0

    def job(self, verb, keys, chunks):
        self.next += 1
        getattr(self.tier, f"submit_{verb}")(SimpleNamespace(job_id=self.next, keys=keys, chunk_ids=np.array(chunks)))
        self.tier.drain_jobs()
        assert self.tier.has_pending_work()
        (result,) = self.tier.get_finished_jobs()
        assert result.job_id == self.next and not self.tier.has_pending_work()
        return result

    def found(self, keys):
        return [self.tier.lookup(key, None) == LookupResult.HIT for key in keys]


@pytest.fixture
def world(monkeypatch):
    one = World(monkeypatch)
    yield one
    one.tier.shutdown()


def test_chunks_come_back_bit_for_bit_in_other_places(world):
    before = world.memory.copy()
    assert world.found(KEYS) == [False] * 6
    result = world.job("store", KEYS[:3], [5, 0, 2])
    assert result.success and result.transfer_bytes == 3 * BYTES
    assert world.found(KEYS) == [True] * 3 + [False] * 3
    assert world.job("load", KEYS[:3], [1, 3, 4]).success
    assert (world.memory[[1, 3, 4]] == before[[5, 0, 2]]).all() and (world.memory[[0, 2, 5, 6, 7]] == before[[0, 2, 5, 6, 7]]).all()
    deadline = time.monotonic() + 30
    while world.double.leases:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_chunk_that_went_fails_alone(world):
    before = world.memory.copy()
    world.job("store", KEYS[:5], range(5))
    world.double.lose = {KEYS[3]}
    (blocks,) = world.double.blocks.values()
    del blocks[KEYS[1]]
    result = world.job("load", KEYS[:5], [7, 7, 6, 7, 5])
    assert not result.success and list(result.successful_keys) == [KEYS[0], KEYS[2], KEYS[4]]
    assert (world.memory[[7, 6, 5]] == before[[0, 2, 4]]).all()


def test_no_room_and_no_daemon_are_misses(world, caplog):
    world.double.room = 2
    assert not world.job("store", KEYS[:4], range(4)).success
    assert world.found(KEYS[:4]) == [True, True, False, False]
    world.double.away = True
    assert world.found(KEYS[:1]) == [False]
    result = world.job("load", KEYS[:1], [7])
    assert not result.success and not result.successful_keys
    assert not world.job("store", KEYS[:1], [7]).success
    world.double.away = False
    deadline = time.monotonic() + 30
    while not world.found(KEYS[:1])[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_rests_in_the_daemon_and_what_went_is_told(monkeypatch):
    world = World(monkeypatch, events=True, event_seconds=0.0)

    def told():
        return [(one.keys, one.medium, one.removed, one.ownership, one.removal_expected) for one in world.tier.take_events()]

    def later(*want):
        deadline, events = time.monotonic() + 30, []
        while not events:
            events = told()
            assert time.monotonic() < deadline
        assert events == list(want)

    try:
        world.job("store", KEYS[:4], range(4))
        later((KEYS[:4], Medium.CPU, False, "kvtide", True))
        (blocks,) = world.double.blocks.values()
        del blocks[KEYS[3]]
        later(([KEYS[3]], Medium.CPU, True, "kvtide", True))  # by the next round
        world.tier.watch._next = float("inf")
        del blocks[KEYS[2]]
        assert world.found(KEYS[2:3]) == [False]
        later(([KEYS[2]], Medium.CPU, True, "kvtide", True))  # by a lookup
        world.double.away = True
        assert world.found(KEYS[:1]) == [False]
        later((KEYS[:2], Medium.CPU, True, "kvtide", True))  # by the link
        world.double.away = False
        later((KEYS[:2], Medium.CPU, False, "kvtide", True))  # and it had kept them
        world.double.room = 3
        assert not world.job("store", KEYS[4:6], [0, 1]).success
        later(([KEYS[4]], Medium.CPU, False, "kvtide", True))
    finally:
        world.tier.shutdown()


def test_loads_are_counted_by_the_daemons_tier(world):
    world.job("store", KEYS[:3], range(3))
    world.job("load", KEYS[:3], [4, 5, 6])
    stats = world.tier.get_stats()
    (name,), ((labels, chunks),) = KvtideTier.build_metric_definitions({}), stats.data["data"]["vllm:kvtide_tier_loaded_chunks"].items()
    assert (name, labels, chunks) == ("vllm:kvtide_tier_loaded_chunks", ("host",), 3)
    assert world.tier.get_stats() is None and world.tier.take_events() == []


def test_other_layouts_share_nothing():
    names = {fingerprint(config(), BYTES), fingerprint(config(), 2 * BYTES), fingerprint(config(kv_cache_layout="HND"), BYTES),
             fingerprint(config(model=SimpleNamespace(name="other", dtype="bfloat16")), BYTES),
             fingerprint(config(parallel=SimpleNamespace(tp_size=2, pp_size=1, pcp_size=1, dcp_size=1)), BYTES)}
    assert len(names) == 5


def test_settings():
    assert TierSettings.read({"address": "unix:/x", "persist": True}).pair == "exact"
    for wrong, words in [({"adress": "x"}, "has no key 'adress'"), ({"pair": "turbo4"}, "KvtideConnector"), ({"way": 1}, "way is 1")]:
        with pytest.raises(InvalidArgument, match=words):
            TierSettings.read(wrong)


def offloading(address):
    tier = {"type": "KvtideTier", "module_path": "kvtide.vllm.tier", "address": address}
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "CpuTieringSpec", "spec_module_path": "cpu_tiering", "cpu_bytes_to_use": 256 << 20, "block_size": 64,
        "secondary_tiers": [tier]}}


@pytest.mark.smoke
def test_a_second_engine_finds_the_chunks_of_the_first(tmp_path):
    daemon = Daemon(tmp_path)
    try:
        stock = engine.run([greedy(24)], dtype="float32")[0]["batches"][0]
        for time_, least in (("first", 0), ("second", 0.9 * FULL)):
            engine._run.cache_clear()
            ours, log = engine.run([greedy(24)], env={"PYTHONPATH": str(engine.HERE)}, dtype="float32",
                                   kv_transfer_config=offloading(daemon.address))
            check_same(ours["batches"][0], stock, f"{time_} engine over vLLM's own offloading")
            assert "of vLLM's CPU tier rest in kvtided at" in log
            print(f"{time_}: {hits(ours['batches'][0])} of {FULL} tokens in full blocks")
            assert hits(ours["batches"][0]) >= least
    finally:
        daemon.stop()
