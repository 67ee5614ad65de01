"""The storage in SGLang's own factory and over its own host pools, without a GPU: tests/engines/sglang.sh installs what it takes.
The daemon is a double unless KVTIDE_TEST_ADDRESS names a real one; pages then rest as f16, which bfloat16's normal numbers survive."""

import os
import pathlib
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

import torch  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python"))

from block_store_double import Daemon  # noqa: E402
from kvtide import sglang as kvtide_sglang  # noqa: E402
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, HiCacheStorageConfig  # noqa: E402
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402
from sglang.srt.observability.metrics_collector import StorageMetrics  # noqa: E402

LAYERS, HEADS, DIM, PAGE, TOKENS = 6, 2, 128, 64, 512
ADDRESS = os.environ.get("KVTIDE_TEST_ADDRESS", "")


def host_pool(layout, allocator):
    """As SGLang makes it beside its device pool; of that, which wants a GPU, it needs sizes and addresses only."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    device = [torch.randn(TOKENS + PAGE, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]

    def addresses(tensors):
        return torch.tensor([one.data_ptr() for one in tensors], dtype=torch.uint64)

    keys, values = device[:LAYERS], device[LAYERS:]
    try:
        from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    except ImportError:  # before 0.5.23
        of, options = SimpleNamespace(layer_num=LAYERS, device="cpu", dtype=torch.bfloat16, store_dtype=torch.bfloat16, head_num=HEADS,
                                      head_dim=DIM, v_head_dim=DIM, row_dim=HEADS * DIM, size=TOKENS, start_layer=0, end_layer=LAYERS,
                                      page_size=PAGE, k_buffer=keys, v_buffer=values, k_data_ptrs=addresses(keys),
                                      v_data_ptrs=addresses(values)), {}
    else:
        of = MHABufferInfo(buffers=KVBuffers(k=tuple(keys), v=tuple(values), k_data_ptrs=addresses(keys), v_data_ptrs=addresses(values),
                                             layout=KVBufferLayout.NHD),
                           page_size=PAGE, head_num=HEADS, head_dim=DIM, v_head_dim=DIM, dtype=torch.bfloat16,
                           device=torch.device("cpu"))
        options = dict(device_capacity_tokens=TOKENS, start_layer=0, end_layer=LAYERS)
    pool = MHATokenToKVPoolHost(of, 2.0, 0, PAGE, layout, pin_memory=False, allocator_type=allocator, **options)
    pool.kv_buffer.normal_()
    return pool


def backend(pool, monkeypatch):
    if not ADDRESS:
        daemon = Daemon()
        monkeypatch.setattr(kvtide_sglang.KvtideHiCache, "_open_pool", lambda self, **options: daemon.open_pool(**options))
    extra = {"backend_name": "kvtide", "module_path": "kvtide.sglang", "class_name": "KvtideHiCache", "interface_v1": 1,
             "allocator": "shm", "pair": "f16/f16", "address": ADDRESS, "connect_wait": 20.0, "salt": os.urandom(8).hex()}
    config = HiCacheStorageConfig(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
                                  enable_storage_metrics=True, is_page_first_layout=True, model_name="tide", extra_config=extra)
    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    made.register_mem_pool_host(pool)
    return made


def bits(pool, indices):
    import ctypes

    return [ctypes.string_at(p, n) for p, n in zip(*pool.get_page_buffer_meta(indices))]


@pytest.mark.parametrize("allocator", ["default", "shm"])
@pytest.mark.parametrize("layout", ["page_first", "page_first_direct", "layer_first"])
def test_pages_of_sglangs_host_pool_come_back(layout, allocator, monkeypatch):
    pool = host_pool(layout, allocator)
    cache = backend(pool, monkeypatch)
    keys = [f"{i:064x}" for i in range(5)]
    there, places = pool.alloc(3 * PAGE), pool.alloc(4 * PAGE)
    want = bits(pool, there)
    assert cache.batch_exists(keys) == 0
    assert cache.batch_set_v1(keys[:3], there) == [True] * 3
    assert cache.batch_exists(keys) == 3
    assert cache.batch_get_v1(keys[:4], places) == [True, True, True, False]
    assert bits(pool, places[:3 * PAGE]) == want
    stats = cache.get_stats()
    assert isinstance(stats, StorageMetrics) and (stats.backup_pgs, stats.prefetch_pgs) == ([3], [3])
    cache.close()


def test_it_is_the_class_that_sglang_wants():
    assert issubclass(kvtide_sglang.KvtideHiCache, HiCacheStorage)
    assert not kvtide_sglang.KvtideHiCache.__abstractmethods__
