"""The coroutines are the blocking verbs in threads."""
import asyncio

import numpy as np
import pytest

import kvtide
import kvtide.aio
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
        assert (await aio.plan("aio", [1024])).verdict == "fits"
        assert "aio" in (await aio.info()).models and (await aio.stats()).sequences >= 5
        await aio.close_sequence(fork)
        assert fork.id not in {s.id for s in await aio.sequences("aio")}

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
