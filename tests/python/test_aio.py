"""The coroutines are the blocking verbs in threads."""
import asyncio
import inspect

import numpy as np
import pytest

import kvtide
import kvtide.aio
from kvtide import block_store
from reference import attend


def test_coroutines(pool):
    async def work():
        aio = pool.aio
        await aio.register("aio", [kvtide.Layer(2, 64, 4)])
        random = np.random.default_rng(1)
        data = [[random.standard_normal((90, heads, 64), np.float32) for heads in (4, 2, 2)] for _ in range(4)]
        sequences = await asyncio.gather(*(aio.create("aio", pair="f16/f16") for _ in data))
        results = await asyncio.gather(*(aio.append_attend(0, [(s, *x)]) for s, x in zip(sequences, data)))
        for (output,), (q, k, v) in zip(results, data):
            np.testing.assert_allclose(output, attend(q, k, v)[0], atol=5e-3)
        fork = await aio.fork(sequences[0])
        await aio.truncate(fork, 64)
        assert await aio.append(fork, {0: (data[0][1][:1], data[0][2][:1])}) == 65
        [output] = await aio.attend(0, [(fork, data[0][0][:1])])
        assert output.shape == (1, 4, 64)
        assert (await aio.evict([fork])).blocks_left == 0
        await aio.prefetch([fork])
        await aio.set_priority([fork], "low")
        assert fork.info().priority == "low"
        assert (await aio.plan("aio", [1024])).verdict == "fits"
        assert "aio" in (await aio.info()).models and (await aio.stats()).sequences >= 5
        await aio.close_sequence(fork)
        assert fork.id not in {s.id for s in await aio.sequences("aio")}

    asyncio.run(work())


def test_every_verb_has_a_twin():
    """What blocks has a coroutine of its name; `append` of a sequence is `append_layers` there."""
    verbs = lambda kind: {name for name, verb in vars(kind).items() if not name.startswith("_") and inspect.isfunction(verb)}  # noqa: E731
    coroutines = lambda kind: {name for name in verbs(kind) if inspect.iscoroutinefunction(getattr(kind, name))}  # noqa: E731
    here = {"empty", "close", "layer_length", "release", "append_layers", "device_steps", "drop_host_tier"}  # of this process alone; `async with` closes
    assert (verbs(kvtide.Pool) | verbs(kvtide.Sequence)) - here - coroutines(kvtide.aio.AsyncPool) == set()
    mapped = {"in_place"}  # addresses in memory of this process, inside of a `with`
    assert verbs(block_store._Open) - mapped - coroutines(kvtide.aio.AsyncBlockStore) == set()


def test_blocks(pool):
    async def work():
        blocks = await pool.aio.block_store(block_store.Namespace("aio", 64, block_store.OpaqueBlocks(block_bytes=256)))
        payload = np.arange(512, dtype=np.uint8).reshape(2, 256)
        keys = [bytes([n] * 16) for n in range(2)]
        assert (await blocks.store(keys, payload)).stored == 2
        found = await blocks.lookup(keys)
        out = np.zeros_like(payload)
        await blocks.load(found.lease_id, out)
        np.testing.assert_array_equal(out, payload)
        assert await blocks.release(found.lease_id)
        assert await blocks.delete() == 2

    asyncio.run(work())


def test_a_cancelled_wait_leaves_the_pool_usable(embedded):
    async def work():
        await embedded.aio.register("aio", [kvtide.Layer(8, 128, 32)])
        sequence = await embedded.aio.create("aio", pair="f16/f16")
        x = np.ones((1024, 8, 128), np.float32)
        task = asyncio.create_task(embedded.aio.append(sequence, {0: (x, x)}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())
    assert embedded.stats().checksum_failures == 0


def test_connect():
    async def work():
        async with await kvtide.aio.connect("embedded", device="cpu", device_memory="8MiB", host_memory=0) as pool:
            assert (await pool.info()).tiers[0].capacity_bytes == 8 << 20

    asyncio.run(work())
