"""Every mistake has an exception of its kind, with words that say what to do, and changes nothing."""
import numpy as np
import pytest

import kvtide
from kvtide import errors

LAYER = kvtide.Layer(2, 64, 4)


@pytest.fixture
def sequence(pool):
    pool.register("two-layers", [LAYER] * 2)
    made = pool.create("two-layers")
    made.append_layers({0: kv(10), 1: kv(10)})
    return made


def kv(tokens, heads=2, dim=64, dtype=np.float32):
    return np.ones((tokens, heads, dim), dtype), np.ones((tokens, heads, dim), dtype)


def q(tokens, heads=4, dim=64):
    return np.ones((tokens, heads, dim), np.float32)


def test_shapes(pool, sequence):
    for bad in (kv(3, heads=1), kv(3, dim=32), (kv(3)[0], kv(4)[1]), kv(0)):
        with pytest.raises(errors.InvalidArgument, match="expected|tokens"):
            sequence.append(0, *bad)
    with pytest.raises(errors.InvalidArgument, match=r"expected \[tokens"):
        sequence.append(0, np.ones((3, 128), np.float32), np.ones((3, 128), np.float32))
    for bad in (q(1, heads=2), q(1, dim=128)):
        with pytest.raises(errors.InvalidArgument, match=r"items\[0\].*expected \[tokens, 4, 64\]"):
            sequence.attend(0, bad)
    with pytest.raises(errors.InvalidArgument, match="q has 2 tokens"):
        sequence.append_attend(0, q(2), *kv(3))
    with pytest.raises(ValueError, match="layer is 2"):
        sequence.append(2, *kv(3))
    with pytest.raises(errors.InvalidArgument, match="sinks has 3"):
        sequence.attend(0, q(1), sinks=np.zeros(3, np.float32))
    assert sequence.info().max_layer_tokens == 10


def test_dtypes(pool, sequence):
    with pytest.raises(errors.InvalidArgument, match="k is float64; use float32, float16 or bfloat16"):
        sequence.append(0, *kv(1, dtype=np.float64))
    with pytest.raises(errors.InvalidArgument, match="uint16"):
        sequence.append(0, *kv(1, dtype=np.uint16))
    with pytest.raises(errors.InvalidArgument, match="list"):
        sequence.append(0, [1.0], [1.0])


def test_values(pool, sequence):
    k, v = kv(2)
    v[1, 1, 7] = np.nan
    with pytest.raises(errors.InvalidArgument, match="NaN"):
        sequence.append(0, k, v)
    k[0, 0, 0] = 1e6
    with pytest.raises(errors.InvalidArgument):
        sequence.append(0, k, kv(2)[1])
    bad = q(1)
    bad[0, 0, 0] = np.inf
    with pytest.raises(errors.InvalidArgument, match="inf"):
        sequence.attend(0, bad)
    assert sequence.layer_length(0) == 10 and sequence.info().max_layer_tokens == 10
    assert sequence.append_layers({0: kv(1), 1: kv(1)}) == 11


def test_positions(pool, sequence):
    with pytest.raises(errors.OutOfRange):
        sequence.append(0, *kv(1), start=5)
    with pytest.raises(IndexError):
        sequence.truncate(11)
    with pytest.raises(errors.KvtideError):
        sequence.truncate(-1)
    sequence.append(0, *kv(3))
    sequence.append(0, *kv(3), start=10)  # a repeat of the last append is recognised
    assert sequence.layer_length(0) == 13


def test_names(pool, sequence):
    with pytest.raises(errors.InvalidArgument, match="turbo4"):
        pool.create("two-layers", pair="turbo5/turbo4")
    with pytest.raises(LookupError):
        pool.create("nobody")
    with pytest.raises(errors.FailedPrecondition):
        pool.register("two-layers", [kvtide.Layer(4, 64, 4)] * 2)
    with pytest.raises(errors.InvalidArgument, match="multiple"):
        pool.register("odd", [kvtide.Layer(3, 64, 4)])
    with pytest.raises(errors.InvalidArgument, match="first_block"):
        pool.create("two-layers", key_centring="middle")
    with pytest.raises(errors.KvtideError):
        pool.evict([sequence], "moon")
    with pytest.raises(errors.FailedPrecondition, match="holds no sequence"):
        pool.attach(12345)


def test_closed(pool, sequence):
    sequence.close()
    with pytest.raises(errors.NotFound):
        sequence.attend(0, q(1))
    pool.close()
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        pool.register("two-layers", [LAYER] * 2)
    pool.close()  # again


def test_no_room():
    with kvtide.connect("embedded", device="cpu", device_memory="1MiB", host_memory=0) as pool:
        pool.register("two-layers", [LAYER] * 2)
        made = pool.create("two-layers", pair="f16/f16")
        with pytest.raises(MemoryError, match="bytes|room"):
            made.append_layers({0: kv(4096), 1: kv(4096)})
        assert len(made) == 0
        assert made.append_layers({0: kv(64), 1: kv(64)}) == 64


def test_connecting():
    with pytest.raises(ConnectionError, match="kvtided"):
        kvtide.connect("unix:/nowhere/kvtided.sock", connect_timeout=0.2)
    for address in ("nonsense", "localhost", "unix:", "http://localhost:50051", "", "shm:"):
        with pytest.raises(errors.InvalidArgument, match="is no address of a pool; write 'auto'"):
            kvtide.connect(address)
    with pytest.raises(errors.InvalidArgument, match="device"):
        kvtide.connect("embedded", device="tpu")
    with pytest.raises(errors.InvalidArgument, match="host memory"):
        kvtide.connect("embedded", device="cpu", device_memory="900TiB")
    with pytest.raises(errors.KvtideError):
        kvtide.connect("embedded", device="cpu", device_memory="lots")


def test_every_status_code_has_a_class():
    """The codes of gRPC but OK and UNKNOWN, each with a class of its own that Python's words fit."""
    codes = ("CANCELLED INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED "
             "FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED").split()
    classes = [type(errors.from_status(code, "text")) for code in codes]
    assert len(set(classes)) == len(codes) and errors.KvtideError not in classes
    for code, kind in zip(codes, classes):
        assert kind.code == code and issubclass(kind, errors.KvtideError) and str(kind("text")) == "text"
        assert kind.__name__ in dir(errors) and kind.__doc__
    for kind, builtin in ((errors.InvalidArgument, ValueError), (errors.NotFound, LookupError), (errors.OutOfRange, IndexError),
                          (errors.ResourceExhausted, MemoryError), (errors.DeadlineExceeded, TimeoutError),
                          (errors.Unavailable, ConnectionError), (errors.Unimplemented, NotImplementedError),
                          (errors.PermissionDenied, PermissionError)):
        assert issubclass(kind, builtin)


def test_classes_have_codes():
    for code in ("INVALID_ARGUMENT", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
        assert errors.from_status(code, "text").code == code
    assert isinstance(errors.from_status("DEADLINE_EXCEEDED", ""), TimeoutError)
    assert type(errors.from_status("SOMETHING_NEW", "text")) is errors.KvtideError
