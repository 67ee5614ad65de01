"""Every way to a pool does the same: conformance of the verbs against attention by the book."""
import threading
import uuid

import numpy as np
import pytest

import kvtide
from kvtide import errors
from reference import attend

LAYERS = [kvtide.Layer(2, 64, 4), kvtide.Layer(1, 96, 4, head_dim_v=64), kvtide.Layer(2, 64, 4, window=100, softcap=20.0)]


@pytest.fixture
def model(pool):
    return pool.register("three-layers", LAYERS)


def tensors(seed, tokens, layer, dtype=np.float32):
    shape = LAYERS[layer]
    random = np.random.default_rng(seed)
    make = lambda heads, dim: random.standard_normal((tokens, heads, dim)).astype(np.float16).astype(dtype)  # noqa: E731
    return (make(shape.query_heads, shape.head_dim), make(shape.kv_heads, shape.head_dim),
            make(shape.kv_heads, shape.head_dim_v or shape.head_dim))


def close(got, want, tolerance=2e-3):
    got = np.asarray(got, dtype=np.float64)
    assert got.shape == want.shape
    assert np.max(np.abs(got - want)) < tolerance


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_append_attend_in_pieces_is_attention_over_all(pool, model, layer):
    q, k, v = tensors(layer, 300, layer)
    sequence = pool.create(model, pair="f16/f16")
    window, softcap = LAYERS[layer].window, LAYERS[layer].softcap
    want, want_lse = attend(q, k, v, first=0, window=window, softcap=softcap)
    begin = 0
    for n in (1, 63, 64, 65, 106, 1):
        end = begin + n
        output, lse = sequence.append_attend(layer, q[begin:end], k[begin:end], v[begin:end], lse=True)
        close(output, want[begin:end])
        close(lse, want_lse[begin:end])
        begin = end
    assert begin == 300 and sequence.layer_length(layer) == 300 and len(sequence) == 0
    close(sequence.attend(layer, q[-3:]), want[-3:])
    sequence.close()


def test_batches_options_and_positions(pool, model):
    random = np.random.default_rng(5)
    sequences = [pool.create(model, pair="f16/f16") for _ in range(3)]
    data = [tensors(10 + i, 40 + 30 * i, 0) for i in range(3)]
    for sequence, (_, k, v) in zip(sequences, data):
        sequence.append(0, k, v)
    sinks = random.standard_normal(4).astype(np.float32)
    results = pool.attend(0, [(s, q[:5]) for s, (q, _, _) in zip(sequences, data)], positions=[7, None, 20], lse=True,
                          scale=0.3, softcap=5.0, window=30, sinks=sinks)
    for i, (q, k, v) in enumerate(data):
        first = [7, k.shape[0] - 5, 20][i]
        want, want_lse = attend(q[:5], k, v, first=first, scale=0.3, softcap=5.0, window=30, sinks=sinks)
        close(results[i][0], want)
        close(results[i][1], want_lse)
    q, k, v = data[0]
    close(sequences[0].attend(0, q[:5], position=0, causal=False), attend(q[:5], k, v, causal=False)[0])


def test_rope_is_no_part_of_the_model(pool):
    """It may be said later, or anew, of all layers; what cannot be is refused by name."""
    said = lambda *ropes: [kvtide.Layer(2, 64, 4, rope=rope) for rope in ropes]  # noqa: E731
    pool.register("turned", said(None, None))
    turned, still = kvtide.Rope(tuple(1e4 ** (-i / 32) for i in range(32))), kvtide.Rope((0.0,) * 32)
    for ropes in ((turned, turned), (turned, still), (None, None)):
        assert pool.register("turned", said(*ropes)) == "turned"
    for ropes, words in (((turned, None), r"layers\[1\].rope"), ((kvtide.Rope((4.0,)), turned), "radians a position"),
                         ((kvtide.Rope((0.1,) * 33), turned), "rope")):
        with pytest.raises(kvtide.errors.InvalidArgument, match=words):
            pool.register("turned", said(*ropes))


def test_layers_together_fork_truncate(pool, model):
    data = [tensors(20 + layer, 130, layer) for layer in range(3)]
    sequence = pool.create(model, pair="f16/f16")
    assert sequence.append_layers({layer: (k[:100], v[:100]) for layer, (_, k, v) in enumerate(data)}) == 100
    fork = sequence.fork()
    assert sequence.append_layers({layer: (k[100:], v[100:]) for layer, (_, k, v) in enumerate(data)}) == 130
    assert (len(sequence), len(fork)) == (130, 100)
    for layer, (q, k, v) in enumerate(data):
        options = {"window": LAYERS[layer].window, "softcap": LAYERS[layer].softcap}
        close(sequence.attend(layer, q[129:]), attend(q[129:], k, v, **options)[0])
        close(fork.attend(layer, q[99:100]), attend(q[99:100], k[:100], v[:100], **options)[0])
    fork.truncate(64)
    assert len(fork) == 64 and len(sequence) == 130
    q, k, v = data[0]
    close(fork.append_attend(0, q[64:70], k[64:70], v[64:70]), attend(q[64:70], k[:70], v[:70])[0])
    info = sequence.info()
    assert (info.tokens, info.pair, info.model) == (130, "f16/f16", model)
    assert fork.info().forked_from == sequence.id


@pytest.mark.parametrize("pair,most", [("q8_0/q8_0", 0.02), ("turbo4/turbo4", 0.25), ("q8_0/turbo2", 0.6)])
def test_coded_pairs_stay_near(pool, model, pair, most):
    q, k, v = tensors(30, 1024, 0)
    sequence = pool.create(model, pair=pair)
    for begin in range(0, 1024, 256):
        sequence.append(0, k[begin:begin + 256], v[begin:begin + 256])
    got, want = sequence.attend(0, q[-1:]), attend(q[-1:], k, v)[0]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < most
    exact = pool.create(model, pair=pair, exact_window=(8, 8))
    exact.append(0, k, v)
    close(exact.attend(0, q[-1:]), want)


def test_coded_bytes_are_fewer(pool, model):
    before = {s.id for s in pool.sequences()}
    sizes = {}
    for pair in ("f16/f16", "q8_0/turbo4", "turbo3/turbo3"):
        sequence = pool.create(model, pair=pair)
        _, k, v = tensors(31, 1024, 0)
        sequence.append(0, k, v)
        sizes[pair] = sequence.info().bytes
        sequence.close()
    assert sizes["f16/f16"] > 1.8 * sizes["q8_0/turbo4"] > 2.2 * sizes["turbo3/turbo3"]
    assert {s.id for s in pool.sequences()} == before


def test_moves_between_tiers(pool, model):
    data = [tensors(40 + layer, 256, layer) for layer in range(3)]
    sequence = pool.create(model, pair="f16/f16")
    sequence.append_layers({layer: (k, v) for layer, (_, k, v) in enumerate(data)})
    q = data[0][0]
    want = sequence.attend(0, q[-2:])
    result = sequence.evict()
    assert result.blocks > 0 and result.blocks_left == 0
    shares = {share.tier: share.blocks for share in sequence.info().tiers}
    assert shares["device"] == 0 and shares["host"] == result.blocks
    np.testing.assert_array_equal(sequence.attend(0, q[-2:]), want)
    sequence.prefetch()  # of what the attend has not brought up already
    assert {share.tier: share.blocks for share in sequence.info().tiers}["device"] > 0
    assert pool.evict([]).blocks == 0
    assert pool.evict([sequence], "host").blocks > 0


def test_priorities(pool, model):
    sequence = pool.create(model, pair="f16/f16", priority="low")
    assert sequence.info().priority == "low"
    sequence.set_priority("high")
    assert sequence.info().priority == "high"
    with pytest.raises(errors.InvalidArgument, match="priority"):
        sequence.set_priority("urgent")
    pool.set_priority([], "low")
    sequence.close()


def test_read(pool, model):
    data = [tensors(90 + layer, 300, layer) for layer in range(3)]
    sequence = pool.create(model, pair="q8_0/turbo4")
    for begin in range(0, 300, 100):
        sequence.append_layers({layer: (k[begin:begin + 100], v[begin:begin + 100]) for layer, (_, k, v) in enumerate(data)})
    _, k, v = data[0]
    try:
        got_k, got_v = sequence.read(0)
    except errors.Unimplemented as error:  # clients of kvtided that cannot read yet
        assert pool.address != "embedded" and "embedded" in str(error)
        return
    assert got_k.dtype == np.float32 and got_k.shape == k.shape
    np.testing.assert_array_equal(got_k[:64], k[:64])  # the exact window and the tail
    np.testing.assert_array_equal(got_v[256:], v[256:])
    assert 0 < np.linalg.norm(got_k - k) / np.linalg.norm(k) < 0.01
    assert 0 < np.linalg.norm(got_v - v) / np.linalg.norm(v) < 0.12
    part_k, part_v = sequence.read(0, start=70, tokens=100, like=np.empty(0, np.float16))
    np.testing.assert_array_equal(part_k, got_k[70:170].astype(np.float16))
    assert part_v.shape == (100, 2, 64) and part_v.dtype == np.float16
    k1, v1 = sequence.read(1, start=300)
    assert k1.shape == (0, 1, 96) and v1.shape == (0, 1, 64)
    into_k, into_v = np.zeros((10, 2, 64), np.float32), np.zeros((10, 2, 64), np.float32)
    sequence.read_into(0, into_k, into_v, start=5)
    np.testing.assert_array_equal(into_k, got_k[5:15])
    with pytest.raises(errors.OutOfRange):
        sequence.read(0, start=290, tokens=20)
    with pytest.raises(errors.OutOfRange, match="window"):
        sequence.read(2, start=0, tokens=64)
    with pytest.raises(errors.InvalidArgument, match="expected|the place has"):
        sequence.read_into(0, into_k[:, :1].copy(), into_v)
    with pytest.raises(errors.InvalidArgument, match="dense"):
        sequence.read_into(0, into_k[::2], into_v[::2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numpy_dtypes_and_strides(pool, model, dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    q, k, v = (x.astype(kind) for x in tensors(50, 70, 0))
    sequence = pool.create(model, pair="f16/f16")
    # [heads][tokens][dim], seen as [tokens][heads][dim].
    strided = np.ascontiguousarray(k.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert not strided.flags.c_contiguous
    output, lse = sequence.append_attend(0, q, strided, v, lse=True)
    assert output.dtype == kind and lse.dtype == np.float32
    close(output.astype(np.float32), attend(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32))[0], 2e-2)


def test_attach_and_sequences(pool, model, request):
    # Over TCP nobody knows who calls: that is tenant "default", for whom there are no others.
    mine = "default" if "[tcp]" in request.node.name else "me"
    if mine == "default":
        with pytest.raises(kvtide.errors.PermissionDenied, match="leave the tenant away"):
            pool.create(model, tenant="me")
    sequence = pool.create(model, pair="f16/f16", tenant=mine)
    q, k, v = tensors(60, 10, 0)
    sequence.append_layers({layer: tensors(60 + layer, 10, layer)[1:] for layer in range(3)})
    other = pool.attach(sequence.id)
    assert len(other) == 10
    np.testing.assert_array_equal(other.attend(0, q[:1]), sequence.attend(0, q[:1]))
    assert [s.tenant for s in pool.sequences(model) if s.id == sequence.id] == [mine]
    del other
    assert sequence.info().tokens == 10  # attached objects close nothing


def test_dropping_the_object_closes_the_sequence(pool, model):
    sequence = pool.create(model)
    id = sequence.id
    assert id in {s.id for s in pool.sequences()}
    del sequence
    assert id not in {s.id for s in pool.sequences()}
    with pool.create(model) as sequence:
        id = sequence.id
    assert id not in {s.id for s in pool.sequences()}
    sequence.close()  # again


def test_many_threads(pool, model):
    failures = []

    def work(seed):
        try:
            sequence = pool.create(model, pair="f16/f16")
            q, k, v = tensors(seed, 200, 0)
            for begin in range(0, 200, 40):
                output = sequence.append_attend(0, q[begin:begin + 40], k[begin:begin + 40], v[begin:begin + 40])
            close(output, attend(q[160:], k, v)[0])
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


def test_info_stats_plan(pool, model):
    info = pool.info()
    assert info.version and [tier.name for tier in info.tiers] == ["device", "host"]
    assert info.block_tokens == 64 and {"f16", "turbo4"} <= {one.name for one in info.cache_types}
    assert model in pool.models()
    before = pool.stats()
    sequence = pool.create(model)
    sequence.append_layers({layer: tensors(70, 64, layer)[1:] for layer in range(3)})
    after = pool.stats()
    assert after.appended_tokens - before.appended_tokens == 64
    assert after.sequences_created - before.sequences_created == 1
    assert (after.deferred_seals, after.failed_seals) == (0, 0)
    plan = pool.plan(model, [1024, 65536], pairs=["f16", "q8_0/turbo4"])
    assert plan.contexts[0].verdict == "fits" and plan.contexts[0].chosen_pair == "f16/f16"
    assert {c.pair for c in plan.contexts[1].candidates} == {"f16/f16", "q8_0/turbo4"}


def test_what_cold_blocks_may_become(pool, model):
    sequence = pool.create(model, pair="turbo4", degrade=["turbo3", "turbo2"])
    (info,) = [one for one in pool.sequences() if one.id == sequence.id]
    assert info.degrade == ["turbo3/turbo3", "turbo2/turbo2"] and info.degraded_blocks == 0
    assert sequence.info().id == sequence.id and sequence.info().degraded == []
    assert all((tier.degraded_blocks, tier.degraded_bytes) == (0, 0) for tier in pool.stats().tiers)
    with pytest.raises(kvtide.errors.InvalidArgument, match=r"degrade\[0\]"):
        pool.create(model, pair="turbo4", degrade=["turbo9"])


def test_pieces_beyond_the_message_limit(daemon):
    """A prompt larger than a message goes in pieces, with the same result."""
    with kvtide.connect(daemon.address) as pool:
        pool.register("three-layers", LAYERS)
        q, k, v = tensors(80, 500, 0)
        whole = pool.create("three-layers", pair="f16/f16").append_attend(0, q, k, v, lse=True)
        pool._limits()
        object.__setattr__(pool._info, "max_message_bytes", 100_000)
        pieces, other = pool.create("three-layers", pair="f16/f16"), pool.create("three-layers", pair="f16/f16")
        calls = []
        core = pool._core

        class Counting:
            def __getattr__(self, name):
                calls.append(name)
                return getattr(core, name)

        pool._core = Counting()
        results = pool.append_attend(0, [(pieces, q, k, v), (other, q[:9], k[:9], v[:9])], lse=True)
        pool._core = core
        assert calls.count("append_attend") > 10
        np.testing.assert_allclose(results[0][0], whole[0], atol=1e-5)
        np.testing.assert_allclose(results[0][1], whole[1], atol=1e-5)
        np.testing.assert_allclose(results[1][0], whole[0][:9], atol=1e-5)
        assert pieces.layer_length(0) == 500 and other.layer_length(0) == 9
        attended = pool.attend(0, [(pieces, q)])[0]
        np.testing.assert_allclose(attended, whole[0], atol=1e-5)
        assert pieces.append(1, *tensors(81, 400, 1)[1:]) == 0 and pieces.layer_length(1) == 400


def test_auto_finds_the_daemon_or_stays_here(daemon, monkeypatch, tmp_path):
    monkeypatch.setenv("KVTIDE_ADDRESS", daemon.address)
    with kvtide.connect() as pool:
        assert pool.address == daemon.address
    monkeypatch.setenv("KVTIDE_ADDRESS", f"unix:{tmp_path}/none.sock")
    with pytest.raises(errors.Unavailable):
        kvtide.connect(connect_timeout=0.2)


def test_arrays_of_the_pool_are_used_where_they_lie(pool):
    model = pool.register("in-place", [kvtide.Layer(kv_heads=2, head_dim=64, query_heads=4)])
    rng = np.random.default_rng(5)
    k, v = pool.empty((100, 2, 64)), pool.empty((100, 2, 64), np.float16)
    assert k.dtype == np.float32 and v.dtype == np.float16 and k.shape == v.shape == (100, 2, 64)
    k[:] = rng.standard_normal(k.shape)
    v[:] = rng.standard_normal(v.shape)
    with pool.create(model, pair="f16") as sequence:
        sequence.append(0, k, v)
        got_k, got_v = sequence.read(0)
        assert np.array_equal(np.asarray(got_k, np.float16), k.astype(np.float16))
        assert np.array_equal(np.asarray(got_v, np.float16), v)
    assert pool.empty(0).size == 0 and pool.empty(3).shape == (3,)


def test_the_way_is_told(pool, request):
    asked = request.node.callspec.params["pool"]
    assert pool.way == {"embedded": "embedded", "shm": "shared memory"}.get(asked, "gRPC")
    assert pool.why == "asked for"


def test_auto_takes_shared_memory_of_a_local_daemon(daemon, monkeypatch):
    monkeypatch.setenv("KVTIDE_ADDRESS", daemon.address)
    with kvtide.connect() as pool:
        assert pool.way == "shared memory" and daemon.address in pool.why
    with kvtide.connect("auto:" + daemon.tcp) as pool:
        assert pool.way == "gRPC"


def test_what_is_larger_than_the_arena_goes_in_pieces(daemon):
    with kvtide.connect("shm:" + daemon.address, arena_bytes=1 << 16) as pool:
        model = pool.register("pieces", [kvtide.Layer(kv_heads=2, head_dim=64, query_heads=4)])
        rng = np.random.default_rng(6)
        k, v, q = (rng.standard_normal((300, heads, 64)).astype(np.float32) for heads in (2, 2, 4))
        with pool.create(model, pair="f16") as sequence:
            out = sequence.append_attend(0, q, k, v)
            assert out.shape == (300, 4, 64) and len(sequence) == 300
            got_k, _ = sequence.read(0)
            assert np.array_equal(np.asarray(got_k, np.float16), k.astype(np.float16))


def test_a_prompt_begins_with_what_another_has_left(pool, model):
    options = {"pair": "f16/f16", "prefix_salt": uuid.uuid4().hex}  # the daemon serves all ways to it
    ids = [index * index % 997 for index in range(320)]
    data = [tensors(40 + layer, 320, layer) for layer in range(3)]
    first = pool.create(model, **options)
    first.append_layers({layer: (k, v) for layer, (_, k, v) in enumerate(data)}, token_ids=np.asarray(ids))
    assert first.info().known_tokens == 320
    first.close()
    found = pool.cached(model, ids[:200] + [7] * 60, **options)
    assert found.tokens == 192 and sum(tokens for _, tokens in found.tiers) == 192
    assert pool.cached(model, ids, pair="f16/f16", prefix_salt="another").tokens == 0
    second = pool.create(model, begin_with=ids[:-1], **options)
    assert len(second) == 256 and [second.layer_length(layer) for layer in range(3)] == [256] * 3
    assert second.info().reused_tokens == 256
    with pytest.raises(errors.InvalidArgument, match="3 token ids for 64 tokens"):
        second.append(0, data[0][1][256:], data[0][2][256:], token_ids=[1, 2, 3])
    for layer, (q, k, v) in enumerate(data):
        named = {"token_ids": ids[256:]} if layer == 1 else {}
        want = attend(q, k, v, first=0, window=LAYERS[layer].window, softcap=LAYERS[layer].softcap)[0]
        close(second.append_attend(layer, q[256:], k[256:], v[256:], **named), want[256:])
    assert second.info().known_tokens == 320
    assert pool.cached(model, ids, **options).tokens == 320
    second.close()
    third = pool.create(model, begin_with=[1, 2, 3], **options)
    assert len(third) == 0
    third.close()
