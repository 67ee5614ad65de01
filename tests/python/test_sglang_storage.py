"""SGLang's storage interface over a double of the daemon. Where SGLang is not installed its base class is stood in for;
``tests/engines/test_sglang.py`` runs SGLang's own host pool."""

import sys
import time
import types
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

try:
    import sglang.srt.mem_cache.hicache_storage  # noqa: F401
except ImportError:
    storage = types.ModuleType("sglang.srt.mem_cache.hicache_storage")

    class HiCacheStorage:
        def register_mem_pool_host(self, mem_pool_host):
            self.mem_pool_host = mem_pool_host

    class PoolTransferResult:
        def __init__(self):
            self.kv_hit_pages, self.extra_pool_hit_pages = 0, {}

        empty = classmethod(lambda cls: cls())

    storage.HiCacheStorage, storage.PoolTransferResult = HiCacheStorage, PoolTransferResult
    metrics = types.ModuleType("sglang.srt.observability.metrics_collector")
    metrics.StorageMetrics = SimpleNamespace
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache", "sglang.srt.observability"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[storage.__name__], sys.modules[metrics.__name__] = storage, metrics

from block_store_double import Daemon  # noqa: E402
from kvtide.block_store import OpaqueBlocks, TensorBlocks  # noqa: E402
from kvtide.errors import InvalidArgument  # noqa: E402
from kvtide.sglang import KvtideHiCache, SglangSettings, key_of  # noqa: E402

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 2, 32, 16, 12


class HostPool:
    """As SGLang's for multi-head attention: K of all pages, then V; pages lie one after the other but in layer_first."""

    def __init__(self, layout="page_first", dtype=torch.bfloat16):
        self.layout, self.dtype, self.page_size, self.size = layout, dtype, PAGE, PAGE * PAGES
        self.layer_num, self.head_num, self.head_dim, self.start_layer, self.end_layer = LAYERS, HEADS, DIM, 0, LAYERS
        self.kv_buffer = torch.randn(2, self.size * LAYERS * HEADS * DIM).to(dtype)

    def get_page_buffer_meta(self, indices):
        pointers, start, item = [], self.kv_buffer.data_ptr(), self.dtype.itemsize
        value, token = self.size * LAYERS * HEADS * DIM * item, HEADS * DIM * item
        for index in indices.tolist()[::PAGE]:
            places = ([index * token + layer * self.size * token for layer in range(LAYERS)] if self.layout == "layer_first"
                      else [index * LAYERS * token])
            for place in places:
                pointers += [start + place, start + place + value]
        size = PAGE * token * (1 if self.layout == "layer_first" else LAYERS)
        return pointers, [size] * len(pointers)

    def pages(self, numbers):
        """The bytes of pages, for comparison."""
        import ctypes

        return [[ctypes.string_at(p, n) for p, n in zip(*self.get_page_buffer_meta(torch.arange(i * PAGE, (i + 1) * PAGE)))]
                for i in numbers]


def indices(*pages):
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def config(**changes):
    extra = {"backend_name": "kvtide", "interface_v1": 1, "pair": "f16/f16", "connect_wait": 20.0, **changes.pop("extra", {})}
    return SimpleNamespace(**{**dict(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
                                     is_storage_writer=True, model_name="tide", tp_lcm_size=None, should_split_heads=False, dp_rank=0,
                                     extra_config=extra), **changes})


class World:
    def __init__(self, pool=None, daemon=None, **changes):
        self.daemon, self.pool = daemon or Daemon(), pool or HostPool()
        self.cache = KvtideHiCache(config(**changes), None)
        self.cache._open_pool = self.daemon.open_pool
        self.cache.register_mem_pool_host(self.pool)

    def settle(self):
        import threading

        done = threading.Event()
        self.cache.links["load"].later(done.set)
        assert done.wait(20)


@pytest.fixture
def world():
    one = World()
    yield one
    one.cache.close()


KEYS = [f"{i:064x}" for i in range(8)]


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pages_come_back_into_other_places(layout, dtype):
    world = World(HostPool(layout, dtype))
    want = world.pool.pages([1, 4, 2])
    assert world.cache.batch_set_v1(KEYS[:3], indices(1, 4, 2)) == [True] * 3
    world.pool.kv_buffer.zero_()
    assert world.cache.batch_get_v1(KEYS[:3], indices(7, 8, 9)) == [True] * 3
    assert world.pool.pages([7, 8, 9]) == want
    content = world.cache.namespace.content
    assert isinstance(content, OpaqueBlocks if layout == "layer_first" else TensorBlocks)
    world.cache.close()


def test_pages_that_rest_as_they_are_come_from_where_they_lie():
    daemon = Daemon()
    daemon.shares = True
    world = World(HostPool("layer_first"), daemon)
    want = world.pool.pages([1, 4, 2, 3])
    assert world.cache.batch_set_v1(KEYS[:4], indices(1, 4, 2, 3)) == [True] * 4
    world.pool.kv_buffer.zero_()
    assert world.cache.batch_get_v1(KEYS[:4], indices(7, 8, 9, 10)) == [True] * 4
    assert world.pool.pages([7, 8, 9, 10]) == want
    assert "in_place" in daemon.calls and "give_back" in daemon.calls and "load" not in daemon.calls
    # What is lost ends it; what lies elsewhere is loaded.
    names = [key_of(key) for key in KEYS[:4]]
    daemon.lose = {names[3]}
    assert world.cache.batch_get_v1(KEYS[:4], indices(3, 4, 5, 6)) == [True] * 3 + [False]
    assert world.pool.pages([3, 4, 5]) == want[:3]
    daemon.elsewhere = {names[1]}
    assert world.cache.batch_get_v1(KEYS[:4], indices(0, 1, 2, 11)) == [True] * 3 + [False]
    assert world.pool.pages([0, 1, 2]) == want[:3]
    assert "load" in daemon.calls
    world.cache.close()
    # Rows that the daemon codes come through its arena.
    world = World(HostPool("page_first"), daemon)
    assert not world.cache.links["load"].pool.host_tier_bytes
    world.cache.close()


def test_a_layout_says_where_every_value_lies():
    """Strides of the page against the pool's own view of it."""
    for layout, order in (("page_first", (1, 0, 2, 3)), ("page_first_direct", (0, 1, 2, 3))):
        world = World(HostPool(layout))
        shape = (PAGE, LAYERS, HEADS, DIM) if layout == "page_first" else (LAYERS, PAGE, HEADS, DIM)
        page = torch.arange(2 * LAYERS * PAGE * HEADS * DIM).view(2, *shape)
        strides = world.cache.layout
        rows = page.view(-1).as_strided((2, LAYERS, PAGE, HEADS, DIM),
                                        (strides.value_offset, strides.layer_stride, strides.token_stride_k, strides.head_stride_k, 1))
        assert torch.equal(rows, page.permute(0, *(1 + axis for axis in order)))
        assert strides.block_stride == page.numel()
        world.cache.close()


def test_counts_are_those_of_the_prefix(world):
    world.cache.batch_set_v1(KEYS[:2] + KEYS[3:4], indices(0, 1, 2))
    assert world.cache.batch_exists(KEYS[:5]) == 2
    assert world.cache.exists(KEYS[3]) and not world.cache.exists(KEYS[2])
    assert world.cache.batch_exists([]) == 0
    before = world.pool.pages([6])
    assert world.cache.batch_get_v1(KEYS[:4], indices(4, 5, 6, 7)) == [True, True, False, False]
    assert world.pool.pages([6]) == before, "nothing is written where nothing was found"


def test_a_lost_page_ends_what_is_fetched(world):
    world.cache.batch_set_v1(KEYS[:4], indices(0, 1, 2, 3))
    world.daemon.lose.add(key_of(KEYS[2]))
    assert world.cache.batch_get_v1(KEYS[:4], indices(4, 5, 6, 7)) == [True, True, False, False]


def test_what_was_found_is_kept_until_it_is_fetched(world):
    """Lookups pin: PegaFlow #434, pages fell out between the question and the load."""
    world.cache.batch_set_v1(KEYS[:4], indices(0, 1, 2, 3))
    assert world.cache.batch_exists(KEYS[:4]) == 4
    lease, = world.daemon.leases
    lookups = world.daemon.calls.count("lookup")
    assert world.cache.batch_get_v1(KEYS[:3], indices(4, 5, 6)) == [True] * 3
    assert world.daemon.calls.count("lookup") == lookups, "the lease of the question serves"
    world.settle()
    assert not world.daemon.leases
    for _ in range(300):  # questions that nobody follows up
        world.cache.batch_exists(KEYS[:4])
    world.settle()
    assert len(world.daemon.leases) <= 256


@pytest.mark.parametrize("error", [ConnectionError("gone"), InvalidArgument("NaN"), ValueError("x"), TypeError("y"), MemoryError()])
@pytest.mark.parametrize("verb", ["peek", "store", "lookup", "load", "release", "delete"])
def test_no_call_ever_raises(world, verb, error):
    """SGLang's threads are not started again: one TypeError disabled the storage for good."""
    world.cache.batch_set_v1(KEYS[:2], indices(0, 1))

    def before(called):
        if called == verb:
            raise error

    world.daemon.before = before
    answers = [world.cache.batch_set_v1(KEYS[:3], indices(0, 1, 2)), world.cache.batch_get_v1(KEYS[:3], indices(4, 5, 6))]
    assert all(isinstance(answer, list) and len(answer) == 3 and all(type(one) is bool for one in answer) for answer in answers)
    assert world.cache.batch_exists(KEYS[:3]) in (0, 2, 3)
    assert world.cache.exists(KEYS[0]) in (True, False)
    assert world.cache.clear() is None
    assert world.cache.get("k") is None and world.cache.batch_get(["k"]) == [None]
    assert world.cache.set("k", None) is False and world.cache.batch_set(["k"], None) is False


def test_nonsense_is_no_error_either(world):
    assert world.cache.batch_set_v1(KEYS[:2], None) == [False, False]
    assert world.cache.batch_get_v1(KEYS[:2], "x") == [False, False]
    assert world.cache.batch_exists(None) == 0
    assert world.cache.batch_exists_v2(KEYS).kv_hit_pages == 0
    assert world.cache.batch_get_v2([SimpleNamespace(name="mamba", keys=["a", "b"])]) == {"mamba": [False, False]}


def test_a_daemon_that_is_away_and_comes_back(world):
    world.cache.batch_set_v1(KEYS[:2], indices(0, 1))
    world.daemon.away = True
    assert world.cache.batch_get_v1(KEYS[:2], indices(4, 5)) == [False, False]
    assert world.cache.batch_set_v1(KEYS[:2], indices(0, 1)) == [False, False]
    assert world.cache.batch_exists(KEYS[:2]) == 0
    world.daemon.away = False
    deadline = time.monotonic() + 30
    while world.cache.batch_exists(KEYS[:2]) != 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_room_is_a_shorter_prefix(world):
    world.daemon.room = 2
    assert world.cache.batch_set_v1(KEYS[:4], indices(0, 1, 2, 3)) == [True, True, False, False]
    assert world.cache.batch_exists(KEYS[:4]) == 2


def test_ranks_share_nothing_but_replicas_and_mla_do():
    """PegaFlow #367: a namespace without all sizes and ranks served others' keys."""
    daemon = Daemon()

    def model(**changes):
        one = World(HostPool(), daemon, **changes)
        one.cache.close()
        return one.cache.namespace

    names = [model(), model(tp_size=2), model(tp_size=2, tp_rank=1), model(pp_size=2), model(pp_size=2, pp_rank=1),
             model(attn_cp_size=2), model(model_name="other"), model(extra={"salt": "x"}), model(extra={"pair": "exact"}),
             model(extra={"degrade": "q8_0"}), model(extra={"degrade": "q8_0,turbo4"})]
    assert len(set(names)) == len(names)
    assert model(dp_rank=1) == model()
    assert model(is_mla_model=True, tp_size=2, tp_rank=1) == model(is_mla_model=True, tp_size=2)


def test_one_rank_writes_for_mla():
    world = World(is_mla_model=True, is_storage_writer=False)
    assert world.cache.batch_set_v1(KEYS[:2], indices(0, 1)) == [True, True]
    assert not world.daemon.blocks
    world.cache.close()


def test_what_moved_is_in_sglangs_storage_metrics():
    world = World(enable_storage_metrics=True)
    assert all(world.cache.batch_set_v1(KEYS[:4], indices(*range(4))))
    assert all(world.cache.batch_set_v1(KEYS[:6], indices(*range(6))))
    assert world.cache.batch_get_v1([*KEYS[:6], "other"], indices(*range(7))) == [True] * 6 + [False]
    assert world.cache.batch_get_v1(["other"], indices(0)) == [False]
    stats = world.cache.get_stats()
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([4, 2], [6]), "pages that moved, call by call"
    assert len(stats.backup_bandwidth) == 2 and len(stats.prefetch_bandwidth) == 1
    assert all(rate > 0 for rate in stats.backup_bandwidth + stats.prefetch_bandwidth)
    assert world.cache.get_stats().backup_pgs == [], "each is told once"
    world.cache.close()
    quiet = World()
    assert all(quiet.cache.batch_set_v1(KEYS[:1], indices(0))) and quiet.cache.get_stats() is None
    assert quiet.cache.moved == {"backup": [], "prefetch": []}
    quiet.cache.close()


def test_settings():
    assert SglangSettings.read(None) == SglangSettings()
    assert SglangSettings.read({"backend_name": "kvtide", "address": "unix:/x", "timeout": 3}).timeout == 3
    assert SglangSettings.read({"pair": "turbo4"}).pair == "turbo4/turbo4" and SglangSettings.read({"pair": "exact"}).pair == "exact"
    assert SglangSettings.read({"degrade": "turbo4, turbo3/turbo2"}).rungs == ("turbo4/turbo4", "turbo3/turbo2")
    assert SglangSettings.read({}).rungs == ()
    for wrong, words in [({"degrade": "turbo4,turbo9"}, 'pair "turbo9"'), ({"degrade": 3}, "degrade is 3"),
                         ({"pair": "exact", "degrade": "turbo4"}, "degrade: bytes as they are cannot be recoded"),
                         ({"pair": 4}, "pair is 4"), ({"pair": "turbo9"}, 'extra-config: pair "turbo9": write exact, or'),
                         ({"pair": "auto"}, "name a pair"), ({"way": "carrier"}, "way is 'carrier'; use auto, shm or grpc")]:
        with pytest.raises(InvalidArgument, match=words):
            SglangSettings.read(wrong)
    assert key_of("a" * 64) == b"a" * 64 and len(key_of("a" * 65)) == 32
