"""The worker's half of the vLLM connector: orders of pages that it learns, saves, loads, fences and faults, over a double of the
daemon."""

import itertools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvtide  # noqa: E402
from block_store_double import Daemon  # noqa: E402
from kvtide import _trace  # noqa: E402
from kvtide.block_store import Namespace, OpaqueBlocks, TensorBlocks  # noqa: E402
from kvtide.store_link import StoreLink  # noqa: E402
from kvtide.vllm.connector_pages import OwnPages, Pages, learn  # noqa: E402
from kvtide.vllm.connector_plan import Load, Save, Saved, Step  # noqa: E402
from kvtide.vllm.connector_worker import ConnectorWorker, Staging, codec_versions  # noqa: E402
from kvtide.vllm.devices import paged_device  # noqa: E402

HEADS, TOKENS, DIM, LAYERS, BLOCKS = 2, 16, 32, 3, 24
CHUNK = 4  # blocks


# Backends: where a page of [heads, tokens, 2 * dim] keeps the key and the value of a token.

def beside(cache):
    """FlashAttention: V behind K in the cell of a token and head."""
    return cache[..., :DIM].transpose(1, 2), cache[..., DIM:].transpose(1, 2)


def transposed(cache):
    """vLLM's CPU backend: all K of a head, a value of all tokens after the other, then all V."""
    page = cache.view(len(cache), HEADS, 2, TOKENS * DIM)
    return page[:, :, 0].view(-1, HEADS, DIM, TOKENS).permute(0, 3, 1, 2), page[:, :, 1].view(-1, HEADS, TOKENS, DIM).transpose(1, 2)


def packed(cache):
    """Pairs of values of 16 tokens side by side, as matrix units want them: no even steps."""
    page = cache.view(len(cache), HEADS, 2, TOKENS * DIM)
    keys = page[:, :, 0].view(-1, HEADS, DIM // 2, TOKENS, 2).permute(0, 3, 1, 2, 4)
    return keys, page[:, :, 1].view(-1, HEADS, TOKENS, DIM).transpose(1, 2)


class Backend:
    def __init__(self, views):
        self.views = views

    def do_kv_cache_update(self, layer, key, value, cache, slots):
        k, v = self.views(cache)
        for i, slot in enumerate(slots.tolist()):
            k[slot // TOKENS, slot % TOKENS] = key[i].view(k.shape[2:])
            v[slot // TOKENS, slot % TOKENS] = value[i].view(v.shape[2:])


class Lossy(Backend):
    def do_kv_cache_update(self, layer, key, value, cache, slots):
        super().do_kv_cache_update(layer, key / 2, value, cache, slots)


def layer(views, backend=Backend):
    return SimpleNamespace(impl=backend(views))


def new_cache(dtype=torch.bfloat16, nhd=False):
    if nhd:  # tokens first in memory
        return torch.zeros(BLOCKS, TOKENS, HEADS, 2 * DIM, dtype=dtype).transpose(1, 2)
    return torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM, dtype=dtype)


def filled(views, seed=0, **options):
    """Caches of all layers, written by the backend, and the rows [layers, 2, tokens, heads, dim] that went in."""
    generator = torch.Generator().manual_seed(seed)
    caches = [new_cache(**options) for _ in range(LAYERS)]
    rows = torch.randn(LAYERS, 2, BLOCKS * TOKENS, HEADS, DIM, generator=generator).to(caches[0].dtype)
    for cache, (k, v) in zip(caches, rows):
        layer(views).impl.do_kv_cache_update(None, k, v, cache, torch.arange(BLOCKS * TOKENS))
    return caches, rows


ORDERS = [("beside", beside, {}), ("beside, tokens first", beside, {"nhd": True}), ("transposed", transposed, {}),
          ("packed", packed, {}), ("float32", transposed, {"dtype": torch.float32})]


@pytest.fixture(params=ORDERS, ids=[name for name, _, _ in ORDERS])
def order(request):
    return request.param[1], request.param[2]


def test_rows_come_out_of_any_order_and_go_back(order):
    views, options = order
    caches, rows = filled(views, **options)
    learned = learn(layer(views), caches[0])
    assert (learned.tokens, learned.heads, learned.head_dim) == (TOKENS, HEADS, DIM)
    assert (learned.strides is None) == (views is packed)
    pages = Pages(caches, BLOCKS, CHUNK, learned)
    blocks = [5, 3, 9, 7, 1, 2, 20, 23]
    out = torch.empty((2, *pages.shape), dtype=pages.dtype)
    pages.read(blocks, out)
    for chunk in range(2):
        tokens = [block * TOKENS + i for block in blocks[4 * chunk:4 * chunk + 4] for i in range(TOKENS)]
        assert torch.equal(out[chunk], rows[:, :, tokens])
    others, _ = filled(views, seed=1, **options)
    before = [cache.clone() for cache in others]
    Pages(others, BLOCKS, CHUNK, learned).write(out, blocks[2:7], skip=2)
    for cache, old, mine in zip(others, before, caches):
        for block in range(BLOCKS):
            assert torch.equal(cache[block], mine[block] if block in blocks[2:7] else old[block])


def test_learning_leaves_the_null_block_as_it_was():
    caches, _ = filled(beside)
    before = caches[0].clone()
    learn(layer(beside), caches[0])
    assert torch.equal(caches[0], before)


@pytest.mark.parametrize("cache,how", [
    (new_cache(torch.bfloat16), layer(beside, Lossy)), (new_cache().to(torch.float8_e4m3fn), layer(beside)),
    (torch.zeros(8, 576, dtype=torch.bfloat16), layer(beside)), (new_cache(), SimpleNamespace(impl=object()))],
    ids=["scaled", "fp8", "latents", "another interface"])
def test_pages_that_are_no_rows_are_bytes(cache, how):
    assert learn(how, cache) is None


@pytest.mark.parametrize("options", [{}, {"nhd": True}], ids=["heads first", "tokens first"])
def test_bytes_come_back_as_they_are(options):
    caches, _ = filled(beside, **options)
    pages = Pages(caches, BLOCKS, CHUNK, None)
    out = torch.empty((1, *pages.shape), dtype=torch.uint8)
    pages.read([4, 2, 6, 8], out)
    others, _ = filled(beside, seed=1, **options)
    Pages(others, BLOCKS, CHUNK, None).write(out, [1, 2, 3, 4])
    for cache, mine in zip(others, caches):
        assert torch.equal(cache[1:5], mine[[4, 2, 6, 8]])


def test_an_engine_whose_kernels_have_smaller_blocks():
    """vLLM's manager counts in blocks of 4 pages."""
    caches, rows = filled(beside)
    pages = Pages(caches, BLOCKS // 4, 1, learn(layer(beside), caches[0]))
    out = torch.empty((1, *pages.shape), dtype=pages.dtype)
    pages.read([2], out)
    assert torch.equal(out[0], rows[:, :, 8 * TOKENS:12 * TOKENS])


# Compiled code moves the pages.

def shaped(views, dtype, tokens, heads, dim, blocks, layers=2, seed=0):
    """Caches of blocks of another size, in the order of ``views``, and who writes them."""
    generator = torch.Generator().manual_seed(seed)
    make = {"beside": lambda: torch.empty(blocks, heads, tokens, 2 * dim, dtype=dtype),
            "nhd": lambda: torch.empty(blocks, tokens, heads, 2 * dim, dtype=dtype).transpose(1, 2),
            "transposed": lambda: torch.empty(blocks, heads, tokens, 2 * dim, dtype=dtype)}[views]

    def of(cache):
        if views == "transposed":
            page = cache.view(len(cache), heads, 2, tokens * dim)
            return page[:, :, 0].view(-1, heads, dim, tokens).permute(0, 3, 1, 2), page[:, :, 1].view(-1, heads, tokens, dim).transpose(1, 2)
        return cache[..., :dim].transpose(1, 2), cache[..., dim:].transpose(1, 2)

    def write(_, key, value, cache, slots):
        for rows, side in zip((key, value), of(cache)):
            for i, slot in enumerate(slots.tolist()):
                side[slot // tokens, slot % tokens] = rows[i].view(side.shape[2:])

    caches = [make().copy_(torch.randn(blocks, heads, tokens, 2 * dim, generator=generator)) for _ in range(layers)]
    return caches, SimpleNamespace(impl=SimpleNamespace(do_kv_cache_update=write))


SHAPES = [(views, dtype, tokens, pair)
          for (views, dtype), (tokens, pair) in itertools.product(
              [("beside", torch.bfloat16), ("nhd", torch.float16), ("transposed", torch.bfloat16), ("nhd", torch.float32)],
              [(16, "turbo4/turbo4"), (32, "q8_0/turbo4"), (64, "f16/f16"), (128, "q8_0/q5_0")])]


@pytest.mark.parametrize("views,dtype,tokens,pair", SHAPES)
def test_compiled_code_makes_what_the_daemon_makes_of_the_rows_of_each_layer(views, dtype, tokens, pair):
    """Bit for bit, both ways, though the other end of a transfer may be an engine that does it otherwise."""
    heads, dim, blocks, per = 3, 64, 14 * max(1, 64 // tokens), max(1, 64 // tokens)
    caches, impl = shaped(views, dtype, tokens, heads, dim, blocks)
    order = learn(impl, caches[0])
    plain, coded = Pages(caches, blocks, per, order), Pages(caches, blocks, per, order)
    assert coded.use_copiers(paged_device("cpu"), 1, pair)
    chosen = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))[:5 * per].tolist()
    with kvtide.connect("embedded", device="cpu", device_memory="8MiB", host_memory="16MiB") as pool:
        store = pool.block_store(Namespace("m", plain.shape[2], TensorBlocks(len(caches), heads, dim, dim, pair)))
        rows = torch.empty((5, *plain.shape), dtype=plain.dtype)
        plain.read(chosen, rows)
        store.store(KEYS5, rows if dtype == torch.bfloat16 else rows.numpy())
        want = np.empty((5, store.block_bytes), np.uint8)
        lease = store.lookup(KEYS5).lease_id
        store.load(lease, want, coded=True)
        assert coded.bytes == store.block_bytes
        for chunk in range(5):
            got = torch.empty((1, *coded.shape), dtype=torch.uint8)
            coded.read(chosen[chunk * per:(chunk + 1) * per], got)
            assert np.array_equal(got[0].numpy(), want[chunk])

        # Into other pages, not from the first and not to the last of them; one call with pieces of one chunk or two.
        back = torch.empty_like(rows)
        store.load(lease, back if dtype == torch.bfloat16 else back.numpy())
        skip, left = (1, 1) if per > 2 else (0, 0)
        to = torch.randperm(blocks, generator=torch.Generator().manual_seed(2))[:5 * per - skip - left].tolist()
        expected, _ = shaped(views, dtype, tokens, heads, dim, blocks, seed=3)
        Pages(expected, blocks, per, order).write(back, to, skip)
        for pieces in (1, 2):
            others, _ = shaped(views, dtype, tokens, heads, dim, blocks, seed=3)
            pages = Pages(others, blocks, per, order)
            assert pages.use_copiers(paged_device("cpu"), pieces * coded.bytes, pair)
            buffers = [pool.empty((pieces * coded.bytes,), np.uint8) for _ in range(2)]
            assert store.load_pages(pages.copiers.loading, lease, 5, pages.ids(to), buffers, skip=skip) == (5, None, None, 0)
            assert all(torch.equal(a, b) for a, b in zip(others, expected))
            # And from where the blocks lie.
            others, _ = shaped(views, dtype, tokens, heads, dim, blocks, seed=3)
            pages = Pages(others, blocks, per, order)
            assert pages.use_copiers(paged_device("cpu"), pieces * coded.bytes, pair)
            pin = store.pin_tier(pages.copiers.loading)
            assert pin.bytes == pool.host_tier_bytes == 16 << 20
            got = store.load_pages(pages.copiers.loading, lease, 5, pages.ids(to), buffers, skip=skip, in_place=True)
            assert got == (5, None, None, 5)
            assert all(torch.equal(a, b) for a, b in zip(others, expected))
            pin.close()
        done, lost, error, _ = store.load_pages(pages.copiers.loading, lease, 6, pages.ids(to), buffers)
        assert (done, lost) == (4, None) and isinstance(error, kvtide.errors.OutOfRange)  # the third piece is beyond the lease
        done, lost, error, _ = store.load_pages(pages.copiers.loading, 12345, 5, pages.ids(to), buffers)
        assert (done, lost) == (0, None) and isinstance(error, kvtide.errors.NotFound)


KEYS5 = [bytes([i]) * 16 for i in range(5)]


@pytest.mark.parametrize("options", [{}, {"nhd": True}], ids=["heads first", "tokens first"])
def test_bytes_that_compiled_code_moves_come_back_as_they_are(options):
    """Tokens before heads was a page with gaps to the connector, and torch moved it: 75 ms instead of 25 on a GPU."""
    caches, _ = filled(beside, **options)
    pages = Pages(caches, BLOCKS, CHUNK, None)
    out, want = (torch.empty((2, *pages.shape), dtype=torch.uint8) for _ in range(2))
    pages.read([4, 2, 6, 8, 1, 9, 3, 0], want)
    assert pages.use_copiers(paged_device("cpu"), 2 * pages.bytes)
    out = out.view(2, *pages.shape)
    pages.read([4, 2, 6, 8, 1, 9, 3, 0], out)
    assert torch.equal(out, want.view(out.shape))
    others, _ = filled(beside, seed=1, **options)
    other = Pages(others, BLOCKS, CHUNK, None)
    assert other.use_copiers(paged_device("cpu"), 2 * pages.bytes)
    other.write(out, [11, 12, 13], skip=3)
    for cache, mine in zip(others, caches):
        assert torch.equal(cache[11:14], mine[[8, 1, 9]])


def test_pages_that_compiled_code_cannot_move_are_left_to_torch():
    caches, _ = filled(packed)
    assert not Pages(caches, BLOCKS, CHUNK, learn(layer(packed), caches[0])).use_copiers(paged_device("cpu"), 1, "f16/f16")
    caches, _ = filled(beside)
    assert not Pages(caches, BLOCKS, 3, learn(layer(beside), caches[0])).use_copiers(paged_device("cpu"), 1, "f16/f16")  # 48 tokens
    gaps = [torch.zeros(BLOCKS, HEADS, TOKENS, 3 * DIM)[..., :2 * DIM] for _ in range(2)]
    assert not Pages(gaps, BLOCKS, CHUNK, None).use_copiers(paged_device("cpu"), 1)


def test_values_that_f16_does_not_hold_are_not_saved():
    world = World(copiers=True)
    world.caches[1][6, 0, 0, 0] = float("inf")
    world.save("a", KEYS[:2], range(1, 9), held=["a"])
    world.done(saved=["a"])
    assert not world.daemon.blocks.get(world.space)
    until(lambda: any("InvalidArgument" in one for one in world.worker.said))
    world.close()


def test_memory_that_cannot_be_pinned_is_used_as_it_is():
    """The connector saved and loaded nothing."""
    said = []

    class Copier:
        def pin(self, buffer):
            raise kvtide.errors.Internal("cudaHostRegister: not permitted")

        def unpin(self, buffer):
            raise AssertionError("never pinned")

    link = StoreLink(Daemon().open_pool, "here")
    link.start([Namespace("m", 64, OpaqueBlocks(64))], wait=20)
    staging = Staging(link, 64, "a GPU", Copier(), said.append)
    assert staging.take().nbytes == staging.take().nbytes == 64
    assert "ulimit -l" in str(said[0]) and "slower" in str(said[0])
    staging.close()
    link.close()


# The worker.

class World:
    def __init__(self, daemon=None, copiers=False, **options):
        self.daemon = daemon or Daemon()
        self.caches, self.rows = filled(transposed, **({"dtype": torch.float16} if copiers else {}))
        self.pages = Pages(self.caches, BLOCKS, CHUNK, learn(layer(transposed), self.caches[0]))
        if copiers:  # f16/f16 changes nothing
            assert self.pages.use_copiers(paged_device("cpu"), options.get("piece_bytes", 16 << 20), "f16/f16")
            options["coded"] = True
        self.space = Namespace("m", 64, TensorBlocks(LAYERS, HEADS, DIM, DIM))
        self.links = [StoreLink(self.daemon.open_pool, "here", pauses=(0.001, 0.01)) for _ in range(3)]
        for link in self.links:
            link.start([self.space], wait=20)
        self.worker = ConnectorWorker(self.pages, *self.links[:2], (0, 0), **options)

    def save(self, request, keys, blocks, held=(), number=0):
        self.worker.start_saves(Step(saves=[Save(request, tuple(keys), tuple(blocks), number)], held=set(held)))

    def saved(self, number):
        until(lambda: number in self.worker.results)
        return self.worker.take_saved().pop(number)

    def load(self, request, keys, blocks, skip=0):
        found = self.links[2].stores()[0].lookup(keys)
        self.worker.start_loads(Step(loads=[Load(request, {(0, 0): found.lease_id}, found.hits, tuple(blocks), skip)]))
        return found.hits

    def done(self, saved=(), received=(), seconds=30):
        """Waits until these are reported; returns blocks with errors."""
        saved, received, bad, deadline = set(saved), set(received), set(), time.monotonic() + seconds
        while saved or received:
            # The engine asks in this order.
            a, b = self.worker.take_done()
            bad |= self.worker.take_bad_blocks()
            assert a <= saved and b <= received
            saved, received = saved - a, received - b
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return bad

    def close(self):
        self.worker.close()
        self.links[2].close()


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def world(request):
    one = World(copiers=request.param)
    yield one
    one.close()


KEYS = [bytes([i]) * 32 for i in range(4)]


def test_blocks_come_back_in_other_pages(world):
    want = [cache.clone() for cache in world.caches]
    world.save("a", KEYS[:2], range(1, 9), held=["a"])
    assert world.done(saved=["a"]) == set()
    for cache in world.caches:
        cache[9:].zero_()
    while len(world.daemon.blocks.get(world.space, ())) < 2:  # what was read is still on its way
        time.sleep(0.001)
    assert world.load("b", KEYS[:2], range(10, 18)) == 2
    assert world.done(received=["b"]) == set()
    for cache, old in zip(world.caches, want):
        assert torch.equal(cache[10:18], old[1:9])


def test_calls_are_called_as_their_requests_in_the_daemons_log(world):
    seen = {}
    world.daemon.before = lambda verb: seen.setdefault(verb, _trace._current.get())
    world.save("cmpl-17", KEYS[:1], range(1, 5), held=["cmpl-17"])
    world.done(saved=["cmpl-17"])
    until(lambda: len(world.daemon.blocks.get(world.space, ())) == 1)
    world.load("cmpl-18", KEYS[:1], range(10, 14))
    world.done(received=["cmpl-18"])
    assert seen["store"] == ("cmpl-17", "") and seen["load"] == ("cmpl-18", "")


def test_only_missing_blocks_travel(world):
    world.save("a", KEYS[:2], range(1, 9), held=["a"])
    world.done(saved=["a"])
    world.save("b", KEYS[:3], range(1, 13), held=["b"])
    world.done(saved=["b"])
    world.save("c", KEYS[:3], range(1, 13), held=["c"])
    world.done(saved=["c"])
    until(lambda: len(world.daemon.blocks[world.space]) == 3)
    counts = world.worker.take_counts()
    assert counts.saved_blocks == 3 and counts.present_blocks == 5


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Gate:
    """Holds the daemon's verb until it is opened."""

    def __init__(self, daemon, verb):
        self.reached, self.open = threading.Event(), threading.Event()

        def before(called):
            if called == verb:
                self.reached.set()
                assert self.open.wait(30)

        daemon.before = before


def test_a_fence_does_not_wait_for_the_daemon(world):
    """Preempted while the daemon hangs: what has not been read is not saved, and nobody waits."""
    gate = Gate(world.daemon, "peek")
    world.save("a", KEYS[:2], range(1, 9))
    assert gate.reached.wait(30)
    world.worker.fence({"a"})
    for cache in world.caches:
        cache.fill_(7)  # the blocks are somebody else's
    gate.open.set()
    until(lambda: not world.worker.jobs)
    assert not world.daemon.blocks.get(world.space)


def test_a_fence_waits_for_a_copy_that_has_begun(world, monkeypatch):
    begun, go, read = threading.Event(), threading.Event(), world.pages.read

    def slow(blocks, out):
        begun.set()
        assert go.wait(30)
        read(blocks, out)

    monkeypatch.setattr(world.pages, "read", slow)
    world.save("a", KEYS[:1], range(1, 5))
    assert begun.wait(30)
    fence = threading.Thread(target=world.worker.fence, args=({"a"},))
    fence.start()
    fence.join(0.05)
    assert fence.is_alive()
    go.set()
    fence.join(30)
    assert not fence.is_alive()


def test_blocks_are_kept_until_every_save_of_a_request_has_read_them(world):
    """PegaFlow #418: the first of many saves marked all done."""
    gate = Gate(world.daemon, "peek")
    world.save("a", KEYS[:1], range(1, 5))
    world.save("a", KEYS[1:2], range(5, 9), held=["a"])
    assert gate.reached.wait(30)
    assert world.worker.take_done() == (set(), set())
    gate.open.set()
    world.done(saved=["a"])


def test_blocks_may_go_while_the_daemon_stores(world):
    """What was read does not keep the blocks until it is there."""
    gate = Gate(world.daemon, "store")
    world.save("a", KEYS[:1], range(1, 5), held=["a"])
    assert gate.reached.wait(30)
    world.done(saved=["a"])
    gate.open.set()


def test_a_daemon_that_is_away_drops_saves_and_fails_loads(world):
    world.save("a", KEYS[:2], range(1, 9), held=["a"])
    world.done(saved=["a"])
    until(lambda: len(world.daemon.blocks[world.space]) == 2)
    world.daemon.away = True
    world.worker.start_loads(Step(loads=[Load("b", {(0, 0): 1}, 2, tuple(range(10, 18)))]))
    assert world.done(received=["b"]) == set(range(10, 18))
    world.save("c", KEYS[2:3], range(1, 5), held=["c"])
    world.done(saved=["c"])
    assert world.worker.take_counts().failed_loads == 1


def test_it_works_again_when_the_daemon_is_back(world):
    world.daemon.away = True
    world.save("a", KEYS[:1], range(1, 5), held=["a"])
    world.done(saved=["a"])
    until(lambda: world.links[0].stores() is None)
    world.daemon.away = False
    until(lambda: world.links[0].stores())
    world.save("b", KEYS[:1], range(1, 5), held=["b"])
    world.done(saved=["b"])
    until(lambda: world.daemon.blocks.get(world.space))


def test_a_lost_block_ends_the_load_there(world):
    """Dynamo #15079: a failed leg of a transfer is never a completion."""
    world.save("a", KEYS[:4], range(1, 17), held=["a"])
    world.done(saved=["a"])
    until(lambda: len(world.daemon.blocks[world.space]) == 4)
    want = [cache[1:9].clone() for cache in world.caches]
    world.daemon.lose.add(KEYS[2])
    world.load("b", KEYS, [*range(17, 24), *range(1, 10)])
    assert world.done(received=["b"]) == {*range(2, 10)}
    for cache, old in zip(world.caches, want):
        assert torch.equal(cache[[*range(17, 24), 1]], old)


def test_a_load_in_pieces_that_fails_in_the_middle(world):
    world.worker.piece_bytes = world.pages.bytes
    world.save("a", KEYS[:4], range(1, 17), held=["a"])
    world.done(saved=["a"])
    until(lambda: len(world.daemon.blocks[world.space]) == 4)
    loads = []

    def before(verb):
        if verb == "load":
            loads.append(verb)
            if len(loads) == 3:
                raise ConnectionError("gone")

    world.daemon.before = before
    world.load("b", KEYS, range(2, 18))
    assert world.done(received=["b"]) == {*range(10, 18)}


def test_a_load_begins_in_the_middle_of_a_chunk(world):
    want = [cache[1:9].clone() for cache in world.caches]
    world.save("a", KEYS[:2], range(1, 9), held=["a"])
    world.done(saved=["a"])
    until(lambda: len(world.daemon.blocks[world.space]) == 2)
    world.worker.piece_bytes = world.pages.bytes
    world.load("b", KEYS[:2], range(13, 18), skip=3)
    assert world.done(received=["b"]) == set()
    for cache, old in zip(world.caches, want):
        assert torch.equal(cache[13:18], old[3:])


def test_no_room_leaves_the_rest_out(world):
    """LMCache #1330: a full store crashed the engine."""
    world.daemon.room = 2
    world.worker.piece_bytes = world.pages.bytes
    world.save("a", KEYS[:4], range(1, 17), held=["a"])
    world.done(saved=["a"])
    until(lambda: world.worker.said)
    assert len(world.daemon.blocks[world.space]) == 2


def test_saves_with_a_number_say_what_became_of_them(world):
    world.save("a", KEYS[:2], range(1, 9), number=1)
    assert world.saved(1) == Saved(1, ("host",) * 2)
    world.save("a", KEYS[:3], range(1, 13), number=2)
    assert world.saved(2) == Saved(1, ("host",) * 3), "what was there is there too"
    world.save("b", KEYS[:1], range(1, 5))
    world.daemon.away = True
    world.save("c", KEYS[3:], range(1, 5), number=3)
    assert world.saved(3) == Saved(1, ()) and world.worker.asked_for == 0


def test_saves_that_find_no_room_say_how_far_they_came(world):
    world.daemon.room = 2
    world.worker.piece_bytes = world.pages.bytes
    world.save("a", KEYS[:4], range(1, 17), number=7)
    assert world.saved(7) == Saved(1, ("host",) * 2)
    world.daemon.room = 3
    world.worker.piece_bytes = 4 * world.pages.bytes
    world.save("a", KEYS[:4], range(1, 17), number=8)
    assert world.saved(8) == Saved(1, ("host",) * 3), "a call that stored a part of what it was given"


def test_saves_that_are_given_up_are_answered_too():
    world = World(most_blocks=4)
    gate = Gate(world.daemon, "peek")
    world.save("a", KEYS[:1], range(1, 5), number=1)
    assert gate.reached.wait(30)
    world.save("b", KEYS[1:2], range(5, 9), number=2)
    assert world.saved(2) == Saved(1, ()), "more than may wait"
    world.worker.fence({"a"})
    gate.open.set()
    assert world.saved(1) == Saved(1, ()), "preempted"
    world.close()


def test_what_cannot_be_kept_up_with_is_not_saved():
    world = World(most_blocks=8)
    gate = Gate(world.daemon, "peek")
    world.save("a", KEYS[:2], range(1, 9))
    assert gate.reached.wait(30)
    world.save("b", KEYS[2:3], range(9, 13), held=["b"])
    world.done(saved=["b"])
    assert world.worker.take_counts().dropped_blocks == 1, "chunks, as what is saved and loaded is counted"
    gate.open.set()
    world.close()


def test_seconds_of_pieces_are_counted_once():
    world = World(piece_bytes=1)
    world.daemon.before = lambda verb: time.sleep(0.02 if verb in ("store", "load") else 0)
    began = time.monotonic()
    world.save("a", KEYS, range(1, 17), held=["a"])
    world.done(saved=["a"])
    until(lambda: len(world.daemon.blocks.get(world.space, ())) == 4)
    world.load("b", KEYS, range(1, 17))
    world.done(received=["b"])
    world.worker.saves.put(None)
    world.worker.threads[0].join(30)
    elapsed, counts = time.monotonic() - began, world.worker.take_counts()
    assert counts.saved_blocks == counts.loaded_blocks == 4
    assert 0.08 <= counts.save_seconds and 0.08 <= counts.load_seconds and counts.save_seconds + counts.load_seconds <= elapsed
    world.close()


def test_opaque_blocks():
    world = World()
    world.worker.close()
    pages = Pages(world.caches, BLOCKS, CHUNK, None)
    space = Namespace("m", 64, OpaqueBlocks(pages.bytes))
    links = [StoreLink(world.daemon.open_pool, "here") for _ in range(2)]
    for link in links:
        link.start([space], wait=20)
    worker = ConnectorWorker(pages, *links, (0, 0))
    want = [cache[1:5].clone() for cache in world.caches]
    worker.start_saves(Step(saves=[Save("a", tuple(KEYS[:1]), (1, 2, 3, 4))], held={"a"}))
    until(lambda: world.daemon.blocks.get(space))
    lease = links[0].stores()[0].lookup(KEYS[:1]).lease_id
    worker.start_loads(Step(loads=[Load("b", {(0, 0): lease}, 1, (11, 12, 13, 14))]))
    until(lambda: "b" in worker.take_done()[1])
    for cache, old in zip(world.caches, want):
        assert torch.equal(cache[11:15], old)
    worker.close()


class Part:
    """Of kvtide's attention backend: decoding steps leave blocks to be sealed by the next one."""

    def __init__(self, caches):
        self.caches, self.unsealed, self.forgotten = caches, {}, []

    def will_be_read(self, pages):
        for page in set(pages) & set(self.unsealed):
            for cache in self.caches:
                cache[page] = self.unsealed[page]
            del self.unsealed[page]

    def will_be_written(self, pages):
        self.forgotten += pages


@pytest.fixture
def own(monkeypatch):
    """Pages of the backend, and a daemon that codes as this package does."""
    import block_store_double

    pair = "turbo4/turbo4"
    monkeypatch.setattr(block_store_double.Store, "codec_versions", property(lambda _: own.versions, lambda *_: None), raising=False)
    own = SimpleNamespace(daemon=Daemon(), versions=codec_versions(pair), caches=[torch.zeros(BLOCKS, 2, 96, dtype=torch.uint8) for _ in range(LAYERS)])
    own.part = Part(own.caches)
    own.space = Namespace("m", 64, TensorBlocks(LAYERS, HEADS, DIM, DIM, pair))
    own.links = [StoreLink(own.daemon.open_pool, "here", pauses=(0.001, 0.01)) for _ in range(3)]
    for link in own.links:
        link.start([own.space], wait=20)
    own.worker = ConnectorWorker(OwnPages(own.caches, BLOCKS, lambda: [own.part]), *own.links[:2], (0, 0), coded=True)
    yield own
    own.worker.close()
    own.links[2].close()


def test_own_pages_are_sealed_before_they_are_saved_and_forgotten_before_they_are_loaded(own):
    own.part.unsealed[5] = 7
    World.save(own, "a", KEYS[:2], [4, 5], held=["a"])
    World.done(own, saved=["a"])
    assert own.part.unsealed == {}
    until(lambda: len(own.daemon.blocks.get(own.space, ())) == 2)
    assert World.load(own, "b", KEYS[:2], [8, 9]) == 2
    assert own.part.forgotten == [8, 9]  # on the engine's thread, at once
    assert World.done(own, received=["b"]) == set()
    for cache in own.caches:
        assert (cache[8] == 0).all() and (cache[9] == 7).all()


def test_a_daemon_that_codes_otherwise_gets_and_gives_nothing(own, caplog):
    World.save(own, "a", KEYS[:2], [4, 5], held=["a"])
    World.done(own, saved=["a"])
    until(lambda: len(own.daemon.blocks.get(own.space, ())) == 2)
    own.versions = (1000, 1000)
    World.save(own, "b", KEYS[2:], [6, 7], held=["b"])
    World.done(own, saved=["b"])
    World.load(own, "c", KEYS[:2], [8, 9])
    assert World.done(own, received=["c"]) == {8, 9}
    assert len(own.daemon.blocks[own.space]) == 2
    assert "install the same release of both" in caplog.text
