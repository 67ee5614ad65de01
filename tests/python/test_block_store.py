"""The block store by every way: blocks come back as they were stored, lookups count from the start, leases end."""
import threading
from dataclasses import replace

import numpy as np
import pytest

import kvtide
from kvtide.block_store import Namespace, OpaqueBlocks, PageLayout, TensorBlocks

LAYERS, TOKENS, HEADS, DIM = 3, 16, 2, 64


def tensors(pair="f16/f16", salt=""):
    content = TensorBlocks(layers=LAYERS, kv_heads=HEADS, head_dim_k=DIM, head_dim_v=DIM, pair=pair)
    return Namespace(model="test", block_tokens=TOKENS, content=content, salt=salt)


def rows(blocks, dtype=np.float16, seed=0):
    random = np.random.default_rng(seed)
    return random.uniform(-1, 1, (blocks, LAYERS, 2, TOKENS, HEADS, DIM)).astype(dtype)


def keys(count, first=0):
    return [b"key %d" % i for i in range(first, first + count)]


@pytest.fixture
def store(pool):
    made = pool.block_store(tensors())
    yield made
    made.delete()


def test_half_pages_come_back_bit_for_bit(store):
    payload = rows(5)
    assert store.pair == "f16/f16" and store.block_bytes >= payload.nbytes // 5
    result = store.store(keys(5), payload)
    assert (result.stored, result.present, result.left_out) == (5, 0, 0)
    assert store.store(keys(5), payload).present == 5
    found = store.lookup(keys(7))
    assert found.hits == 5 and sum(blocks for _, blocks in found.tiers) == 5 and found.lease_id
    out = np.empty_like(payload)
    assert store.load(found.lease_id, out) == []
    assert np.array_equal(out, payload)
    assert store.load(found.lease_id, out[:2], first_block=3) == []
    assert np.array_equal(out[:2], payload[3:])
    assert store.release(found.lease_id) and not store.release(found.lease_id)
    assert store.lookup(keys(7), lease_seconds=0).lease_id == 0
    assert store.lookup(keys(1, first=9)).hits == 0
    with pytest.raises(kvtide.errors.NotFound, match="look the keys up again"):
        store.load(found.lease_id, out)


def test_coded_pages_keep_their_values_and_travel_as_they_rest(pool):
    store = pool.block_store(tensors("q8_0/q8_0"))
    payload = rows(3, np.float32)
    store.store(keys(3), payload)
    found = store.lookup(keys(3))
    out = np.empty_like(payload)
    store.load(found.lease_id, out)
    assert np.linalg.norm(out - payload) < 0.01 * np.linalg.norm(payload)
    coded = np.empty((3, store.block_bytes), dtype=np.uint8)
    store.load(found.lease_id, coded, coded=True)
    assert coded.nbytes < payload.nbytes / 2
    store.store(keys(3, first=10), coded, coded=True)
    again = np.empty_like(payload)
    store.load(store.lookup(keys(3, first=10)).lease_id, again)
    assert np.array_equal(again, out)
    store.delete()


def test_opaque_blocks(pool):
    store = pool.block_store(Namespace(model="mla", block_tokens=64, content=OpaqueBlocks(block_bytes=1000, encoding="fp8")))
    payload = np.random.default_rng(1).integers(0, 256, (4, 1000), dtype=np.uint8)
    assert store.pair == "" and store.codec_versions == (0, 0)
    store.store(keys(4), payload)
    out = np.empty_like(payload)
    store.load(store.lookup(keys(4)).lease_id, out)
    assert np.array_equal(out, payload)
    assert store.delete() == 4


def test_priorities(pool):
    store = pool.block_store(tensors(salt="priorities"), priority="low")
    assert store.store(keys(2), rows(2), priority="high").stored == 2
    assert store.store(keys(1, first=5), rows(1)).stored == 1
    with pytest.raises(kvtide.errors.InvalidArgument, match="priority 'urgent' is unknown"):
        store.store(keys(1), rows(1), priority="urgent")
    store.delete()


def test_what_cold_blocks_may_become(pool):
    space = tensors("q8_0/q8_0", salt="degrade")
    store = pool.block_store(replace(space, degrade=("turbo4", "turbo3")))
    assert store.namespace_id != pool.block_store(space).namespace_id
    payload = rows(2)
    store.store(keys(2), payload)
    found = store.lookup(keys(2))
    assert found.hits == 2 and found.degraded == (), "there is room"
    assert store.load(found.lease_id, np.empty_like(payload)) == []
    assert store.delete() == 2
    with pytest.raises(kvtide.errors.InvalidArgument, match=r"degrade\[1\]: turbo4"):
        pool.block_store(replace(space, degrade=("turbo3", "turbo4")))
    with pytest.raises(kvtide.errors.InvalidArgument, match="opaque bytes cannot be recoded"):
        pool.block_store(replace(space, content=OpaqueBlocks(1000), degrade=("turbo3",)))


def test_a_pool_that_is_full_holds_more_pages_in_fewer_bits():
    there = {}
    for ladder in ((), ("turbo4", "turbo3")):
        with kvtide.connect("embedded", device="cpu", device_memory="1MiB", host_memory="1MiB", threads=1) as pool:
            store = pool.block_store(replace(tensors("q8_0/q8_0"), degrade=ladder))
            for key in range(300):
                store.store(keys(1, first=key), rows(1, seed=key))
            degraded = there[ladder] = 0
            for key in range(300):
                found = store.lookup(keys(1, first=key))
                if not found.hits:
                    continue
                out = np.empty_like(rows(1))
                store.load(found.lease_id, out)
                want = rows(1, seed=key).astype(np.float32)
                assert np.linalg.norm(out - want) < (0.35 if found.degraded else 0.01) * np.linalg.norm(want)
                assert found.degraded in ((), (0,))
                degraded += len(found.degraded)
                there[ladder] += 1
                store.release(found.lease_id)
            assert degraded > there[ladder] / 2 if ladder else degraded == 0
    assert there[("turbo4", "turbo3")] > 1.5 * there[()]


def test_strided_buffers(store):
    payload = rows(4)
    store.store(keys(4), payload)
    page = TOKENS * HEADS * DIM
    layout = PageLayout(heads_first=True, block_stride=page, value_offset=4 * page, layer_stride=8 * page)
    out = np.empty((LAYERS, 2, 4, HEADS, TOKENS, DIM), dtype=np.float16)
    store.load(store.lookup(keys(4)).lease_id, out, blocks=4, layout=layout)
    assert np.array_equal(out, payload.transpose(1, 2, 0, 4, 3, 5))
    store.store(keys(4, first=10), out, layout=layout)
    again = np.empty_like(payload)
    store.load(store.lookup(keys(4, first=10)).lease_id, again)
    assert np.array_equal(again, payload)


def test_more_than_a_message_goes_in_pieces(pool):
    store = pool.block_store(Namespace(model="large", block_tokens=64, content=OpaqueBlocks(block_bytes=1 << 20)))
    payload = np.random.default_rng(2).integers(0, 256, (40, 1 << 20), dtype=np.uint8)
    assert store.store(keys(40), payload).stored == 40
    out = np.empty_like(payload)
    assert store.load(store.lookup(keys(40)).lease_id, out) == []
    assert np.array_equal(out, payload)
    store.delete()


def test_mistakes_are_named(store):
    with pytest.raises(kvtide.errors.InvalidArgument, match="has 3 blocks, expected 2"):
        store.store(keys(2), rows(3))
    with pytest.raises(kvtide.errors.InvalidArgument, match="65 bytes"):
        store.store([b"x" * 65], rows(1))
    with pytest.raises(kvtide.errors.InvalidArgument, match="coded=True"):
        store.store(keys(1), np.zeros((1, store.block_bytes), dtype=np.uint8))
    bad = rows(1)
    bad[0, 1, 0, 3, 1, 5] = np.nan
    with pytest.raises(kvtide.errors.InvalidArgument, match="K has NaN at layer 1, token 3, head 1, index 5"):
        store.store(keys(1), bad)


def test_many_threads(store):
    errors = []

    def work(number):
        try:
            payload = rows(2, seed=number)
            store.store(keys(2, first=100 * number), payload)
            for _ in range(10):
                found = store.lookup(keys(2, first=100 * number))
                out = np.empty_like(payload)
                store.load(found.lease_id, out)
                store.release(found.lease_id)
                assert np.array_equal(out, payload)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
