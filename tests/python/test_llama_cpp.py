"""States and slot files of llama.cpp in pools: bytes made by hand here, llama.cpp itself in tests/python/llama."""
import struct

import numpy as np
import pytest

import kvtide
from kvtide.errors import DataLoss, InvalidArgument, Unimplemented
from kvtide.llama_cpp import KvtideCache, ModelShape, SlotFile, parse_state
from kvtide.llama_cpp.__main__ import main
from llama_states import cache, cells, rows, state, whole

LAYERS, HEADS, DIM = 3, 2, 32
WIDTH = HEADS * DIM


def gguf(path, architecture="llama", heads=4, kv_heads=HEADS, dim=DIM, layers=LAYERS):
    """The header of a model file: what is needed to know its layers."""
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {"block_count": layers, "embedding_length": heads * dim, "attention.head_count": heads,
               "attention.head_count_kv": kv_heads, "attention.key_length": dim, "attention.value_length": dim,
               "context_length": 4096, "feed_forward_length": 64}
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 1 + len(numbers))
    data += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    for name, value in numbers.items():
        data += text(f"{architecture}.{name}") + struct.pack("<II", 4, value)
    path.write_bytes(data)
    return path


@pytest.fixture
def model(tmp_path):
    return gguf(tmp_path / "model.gguf")


def filled(parsed, data):
    """The state with the rows that it was taken apart into."""
    out = parsed.empty()
    for part in parsed.parts:
        for one in part.keys + part.values:
            one.of(out)[:] = one.of(data)
    return bytes(out)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("extra", [0, 8, 12])
@pytest.mark.parametrize("dtype, number", [("<f2", 1), ("<f4", 0)])
@pytest.mark.parametrize("rotations", [None, (0, 0)])
def test_a_state_comes_apart_and_together(transposed, extra, dtype, number, rotations):
    k, v = rows(LAYERS, 70, WIDTH, 1), rows(LAYERS, 70, WIDTH, 2)
    data = whole(cache(k, v, transposed=transposed, extra=extra, dtype=dtype, number=number, rotations=rotations))
    parsed = parse_state(data)
    assert parsed.architecture == "llama" and len(parsed.parts) == 1 and parsed.parts[0].plain
    for layer in range(LAYERS):
        np.testing.assert_array_equal(parsed.parts[0].keys[layer].of(data), k[layer])
        np.testing.assert_array_equal(parsed.parts[0].values[layer].of(data), v[layer])
    assert filled(parsed, data) == data
    # Nothing of the rows is kept beside them.
    assert sum(len(gap) for _, gap in parsed.gaps) < 70 * (12 + extra) + 200


def test_sliding_layers_have_a_cache_of_their_own():
    data = whole(cache(rows(2, 100, 64), rows(2, 100, 64)), cache(rows(4, 40, 32), rows(4, 40, 32), range(60, 100)))
    parsed = parse_state(data)
    assert [len(part.positions) for part in parsed.parts] == [100, 40]
    assert [part.plain for part in parsed.parts] == [True, False]
    assert filled(parsed, data) == data


def test_empty_streams_and_cells_of_several_sequences():
    k, v = rows(1, 2, 32), rows(1, 2, 32)
    body = struct.pack("<II", 0, 1) + b"".join(struct.pack("<iQ", 1, 64) + one[0].tobytes() for one in (k, v))
    shared = struct.pack("<iIii", 0, 2, 0, 1) + struct.pack("<iIi", 1, 1, 1)
    data = struct.pack("<III", 2, 0, 2) + shared + body
    parsed = parse_state(data, whole=False)
    assert len(parsed.parts) == 1 and parsed.parts[0].positions.tolist() == [0, 1]
    assert filled(parsed, data) == data


def test_quantised_caches_are_refused_by_name():
    data = struct.pack("<II", 1, 1) + cells([0]) + struct.pack("<II", 0, 1) + struct.pack("<iQ", 8, 34) + b"\0" * 34
    with pytest.raises(Unimplemented, match="keys of layer 0 are stored as q8_0: only f16 and f32"):
        parse_state(data, whole=False)
    for words in ((64, 64), (0, 64), (128, 0)):
        rotated = struct.pack("<II", 1, 1) + cells([0]) + struct.pack("<II", 0, 1) + struct.pack("<II", *words)
        with pytest.raises(Unimplemented, match="rotated by matrices of"):
            parse_state(rotated + struct.pack("<iQ", 8, 34) + b"\0" * 34, whole=False)


def test_the_beginning_of_a_real_slot_file():
    """SmolLM2-135M in llama.cpp b11549, 4 tokens: what stands before the first row, the second layer's head, and the size."""
    head = bytes.fromhex(
        "7173676704000000" "04000000" "f8010000" "12120000" "23220000" "19010000"
        "0100000004000000" "000000000100000000000000" "010000000100000000000000" "020000000100000000000000"
        "030000000100000000000000" "010000001e000000" "0000000000000000" "010000008001000000000000")
    layer = 4 * 192
    data = head + bytes(2 * layer)
    for _ in range(29):
        data += struct.pack("<iQ", 1, 384) + bytes(2 * layer)
    for _ in range(30):
        data += struct.pack("<iII", 1, 2, 192) + bytes(2 * layer)
    assert len(data) == 92980
    parsed = SlotFile.parse(data)
    assert parsed.tokens.tolist() == [504, 4626, 8739, 281] and parsed.version == 4
    [part] = parsed.state.parts
    assert part.plain and len(part.keys) == len(part.values) == 30
    assert part.keys[0].width == 192 and part.values[0].transposed


def test_damaged_states_are_refused():
    """Every cut and many flipped bytes: an answer or InvalidArgument, never another exception."""
    data = whole(cache(rows(2, 5, 32), rows(2, 5, 32), transposed=True))
    for end in range(4, len(data), 7):
        with pytest.raises((InvalidArgument, Unimplemented)):
            parse_state(data[:end])
    random = np.random.default_rng(5)
    for _ in range(400):
        damaged = bytearray(data)
        for at in random.integers(0, 200, 2):
            damaged[at] = random.integers(256)
        try:
            parsed = parse_state(bytes(damaged))
        except (InvalidArgument, Unimplemented):
            continue
        assert filled(parsed, bytes(damaged)) == bytes(damaged)


def test_shapes_of_models(tmp_path, model):
    shape = ModelShape.of(model)
    assert shape.architecture == "llama" and shape.rope_pairs == "neighbours"
    assert shape.heads == {(WIDTH, WIDTH): (DIM, DIM)}
    assert ModelShape.of(gguf(tmp_path / "other.gguf", "qwen2")).rope_pairs == "halves"
    with pytest.raises(InvalidArgument, match="another model"):
        shape.layers(parse_state(whole(cache(rows(1, 2, 96), rows(1, 2, 96)))).parts[0])
    with pytest.raises(InvalidArgument, match="neither a llama_cpp.Llama nor the path"):
        ModelShape.of(3)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_f16_pair_gives_the_same_bytes(pool, model, transposed):
    store = KvtideCache(model, pool=pool, pair="f16/f16")
    tokens = list(range(1, 301))
    data = whole(cache(rows(LAYERS, 300, WIDTH, 1), rows(LAYERS, 300, WIDTH, 2), transposed=transposed))
    store[tokens] = state(tokens, data)
    back = store[tokens[:200] + [9999]]
    assert back.llama_state == data and back.llama_state_size == len(data)
    assert back.n_tokens == 300 and back.input_ids[:300].tolist() == tokens and back.input_ids[300] == -1 and back.seed == 3
    assert back.scores.shape == (1, 8) and not back.scores.any()
    assert store and tokens in store and [77, 78] not in store
    with pytest.raises(KeyError):
        store[[77, 78]]
    store.close()
    assert not [one for one in pool.sequences() if one.model.startswith("llama.cpp-")]


def test_a_coded_pair_is_smaller_and_near(embedded, model):
    store = KvtideCache(model, pool=embedded, pair="q8_0/turbo4", exact_window=(1, 2))
    tokens = list(range(1000))
    k, v = rows(LAYERS, 1000, WIDTH, 1), rows(LAYERS, 1000, WIDTH, 2)
    data = whole(cache(k, v))
    store[tokens] = state(tokens, data)
    assert store.cache_size < 0.6 * LAYERS * 1000 * WIDTH * 4
    back = store[tokens].llama_state
    part = parse_state(back).parts[0]
    for layer in range(LAYERS):
        keys, values = part.keys[layer].of(back), part.values[layer].of(back)
        np.testing.assert_array_equal(keys[:64], k[layer][:64])  # the exact window
        assert np.abs(keys - k[layer]).max() < 0.03
        assert 0 < np.abs(values.astype(np.float32) - v[layer]).mean() < 0.15


def test_the_longest_prefix_wins_and_shares_its_blocks(embedded, model):
    store = KvtideCache(model, pool=embedded, pair="f16/f16")
    k, v = rows(LAYERS, 400, WIDTH, 1), rows(LAYERS, 400, WIDTH, 2)
    first = list(range(200))
    grown = first + list(range(1000, 1200))
    store[first] = state(first, whole(cache([one[:200] for one in k], [one[:200] for one in v])))
    alone = embedded.stats().stored_bytes
    data = whole(cache(k, v))
    store[grown] = state(grown, data)
    assert store.entries == 2
    # 192 of the first 200 tokens are shared.
    assert embedded.stats().stored_bytes - alone < 1.3 * alone
    assert store[grown[:350]].llama_state == data
    assert store[first + [5]].n_tokens == 200
    other = first[:100] + [7] * 50
    assert store[other].n_tokens in (200, 400)
    # The same tokens again take the place of the old ones.
    store[grown] = state(grown, data)
    assert store.entries == 2
    store.clear()
    assert embedded.stats().sequences == 0


def test_a_full_pool_lets_the_oldest_go(model):
    with kvtide.connect("embedded", device="cpu", device_memory="2MiB", host_memory=0) as pool:
        store = KvtideCache(model, pool=pool, pair="f16/f16")
        for i in range(6):
            tokens = [i] * 600
            store[tokens] = state(tokens, whole(cache(rows(LAYERS, 600, WIDTH, i), rows(LAYERS, 600, WIDTH, 9))))
        assert 0 < store.entries < 6
        assert [5] in store and [0] not in store
        huge = [8] * 3000
        with pytest.warns(RuntimeWarning, match="no room"):
            store[huge] = state(huge, whole(cache(rows(LAYERS, 3000, WIDTH), rows(LAYERS, 3000, WIDTH))))
    with kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory=0) as pool:
        store = KvtideCache(model, pool=pool, pair="f16/f16", capacity_bytes=600 * WIDTH * 4 * LAYERS * 5 // 2)
        for i in range(4):
            tokens = [i] * 600
            store[tokens] = state(tokens, whole(cache(rows(LAYERS, 600, WIDTH, i), rows(LAYERS, 600, WIDTH, 9))))
        assert store.entries == 2 and store.cache_size <= store.capacity_bytes


def test_models_with_quantised_caches_are_refused(model):
    class Parameters:
        type_k, type_v = 1, 8

    class Llama:
        model_path, context_params = str(model), Parameters

    with pytest.raises(Unimplemented, match="type_v=8"):
        KvtideCache(Llama)


def test_a_daemon_that_died_is_a_miss(tmp_path, model):
    from ways import Daemon

    daemon = Daemon(tmp_path)
    pool = kvtide.connect(daemon.address, timeout=5)
    store = KvtideCache(model, pool=pool, pair="f16/f16")
    value = state([1, 2], whole(cache(rows(LAYERS, 2, WIDTH), rows(LAYERS, 2, WIDTH))))
    store[[1, 2]] = value
    daemon.stop()
    with pytest.warns(RuntimeWarning, match="lost"), pytest.raises(KeyError):
        store[[1, 2]]
    with pytest.warns(RuntimeWarning, match="not stored"):
        store[[1, 2]] = value
    pool.close()


def slot(tokens, state_bytes, version=3):
    return struct.pack("<III", 0x67677371, version, len(tokens)) + np.array(tokens, "<i4").tobytes() + state_bytes


@pytest.mark.parametrize("version, rotations", [(3, None), (4, (0, 0))])
def test_slot_files_by_the_command(tmp_path, daemon, model, capsys, version, rotations):
    tokens = list(range(500))
    data = slot(tokens, cache(rows(LAYERS, 500, WIDTH, 1), rows(LAYERS, 500, WIDTH, 2), rotations=rotations), version)
    file = tmp_path / "chat.bin"
    file.write_bytes(data)
    assert SlotFile.parse(data).tokens.tolist() == tokens
    assert main(["save", str(file), "--model", str(model), "--address", daemon.address, "--pair", "f16/f16"]) == 0
    ticket = tmp_path / "chat.bin.kvtide"
    assert ticket.stat().st_size < 20000
    file.unlink()
    # The sequences outlive the command.
    assert main(["restore", str(ticket)]) == 0
    assert file.read_bytes() == data
    assert main(["forget", str(ticket)]) == 0 and not ticket.exists()
    with kvtide.connect(daemon.address) as pool:
        assert not [one for one in pool.sequences() if one.tenant.startswith("kvtide-llama")]
    assert "500 tokens" in capsys.readouterr().out


def test_slot_files_that_are_none_and_tickets_of_the_past(tmp_path, daemon, model, capsys):
    for text, data in (("shorter than a header", b"abc"), ("not a slot file", b"x" * 64),
                       ("version 9", struct.pack("<III", 0x67677371, 9, 0)),
                       ("before its 5 tokens", struct.pack("<III", 0x67677371, 3, 5))):
        file = tmp_path / "bad.bin"
        file.write_bytes(data)
        assert main(["save", str(file), "--model", str(model), "--address", daemon.address]) == 1
        assert text in capsys.readouterr().err
    assert main(["restore", str(file)]) == 1
    assert "not a ticket" in capsys.readouterr().err
    file.write_bytes(slot([1], cache(rows(LAYERS, 1, WIDTH), rows(LAYERS, 1, WIDTH))))
    assert main(["save", str(file), "--model", str(model), "--address", daemon.address]) == 0
    ticket = str(file) + ".kvtide"
    with kvtide.connect(daemon.address, session=False) as pool:
        for one in pool.sequences():
            if one.tenant.startswith("kvtide-llama"):
                pool.close_sequence(one.id)
        from kvtide.llama_cpp.slots import Ticket, restore_slot

        with pytest.raises(DataLoss, match="no longer has sequence"):
            restore_slot(pool, Ticket.parse(open(ticket, "rb").read()))
    assert main(["restore", ticket]) == 1
    assert "read the prompt again" in capsys.readouterr().err
