"""Steps on the pool's own device: the same attention as by calls, the same sequences afterwards, and clear errors. On the CPU here;
tests/gpu/run.sh runs tests/gpu/python with torch tensors on a GPU."""
import numpy as np
import pytest

import kvtide
import reference
from kvtide.errors import Aborted, FailedPrecondition, InvalidArgument

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 64


@pytest.fixture
def pool():
    with kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="8MiB", threads=1, direct_device="cpu") as made:
        made.register("steps", [kvtide.Layer(KV_HEADS, DIM, HEADS)] * LAYERS)
        yield made


class Rows:
    """Random tensors, of every layer, and all that a sequence has been given."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.k, self.v = ([np.zeros((0, KV_HEADS, DIM), np.float32)] * LAYERS for _ in range(2))

    def take(self, layer, tokens):
        q, k, v = (self.random.standard_normal((tokens, heads, DIM), dtype=np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.k[layer], self.v[layer] = np.concatenate([self.k[layer], k]), np.concatenate([self.v[layer], v])
        return q, k, v

    def want(self, layer, q):
        return reference.attend(q, self.k[layer], self.v[layer])[0]


def run(steps, sequences, rows, counts):
    """One step; compares with attention by the book and returns the outputs."""
    with steps.step(list(zip(sequences, counts))) as step:
        assert step.starts == [len(one) for one in sequences]
        for layer in range(LAYERS):
            parts = [one.take(layer, count) for one, count in zip(rows, counts)]
            output = step.append_attend(layer, *(np.concatenate([part[i] for part in parts]) for i in range(3)))
            done = 0
            for one, count, part in zip(rows, counts, parts):
                yield layer, output[done : done + count], one.want(layer, part[0]), one
                done += count
    assert [len(one) for one in sequences] == [len(one.k[0]) for one in rows]


def test_as_by_the_book(pool):
    sequences = [pool.create("steps", pair="f16/f16") for _ in range(3)]
    rows = [Rows(seed) for seed in range(3)]
    steps = pool.device_steps("steps", "f16/f16", dtype="float32", max_sequences=3, max_new_tokens=400, max_sequence_tokens=1024)
    for counts in [(100, 64, 3), (1, 1, 1), (5, 200, 1), (1, 1, 1)]:
        for _, got, want, _ in run(steps, sequences, rows, counts):
            np.testing.assert_allclose(got, want, atol=2e-3)
    assert steps.device_bytes > 0


@pytest.mark.parametrize("named", [True, False])
def test_pairs_in_one_step(pool, named):
    """Sequences of several pairs get in one step what steps of each pair alone give them, to the bit."""
    pairs = ["q8_0/turbo4", "f16/f16", "turbo4/turbo3"]
    together, alone = ([pool.create("steps", pair=pair) for pair in pairs] for _ in range(2))
    mixed = pool.device_steps("steps", pairs if named else None, dtype="float32", max_sequences=3, max_new_tokens=600)
    single = [pool.device_steps("steps", pair, dtype="float32", max_sequences=1, max_new_tokens=200) for pair in pairs]
    rows = [Rows(seed) for seed in range(3)]
    for counts in [(200, 64, 150), (1, 1, 1), (3, 100, 1), (1, 1, 1)]:
        taken = [[one.take(layer, count) for one, count in zip(rows, counts)] for layer in range(LAYERS)]
        with mixed.step(list(zip(together, counts))) as step:
            outputs = [step.append_attend(layer, *(np.concatenate(part) for part in zip(*taken[layer]))) for layer in range(LAYERS)]
        first = 0
        for i, count in enumerate(counts):
            with single[i].step([(alone[i], count)]) as step:
                for layer in range(LAYERS):
                    want = step.append_attend(layer, *taken[layer][i])
                    np.testing.assert_array_equal(outputs[layer][first : first + count], want)
            first += count
    if named:
        with pytest.raises(InvalidArgument, match="coded as turbo2/turbo2, this object was made for"):
            mixed.step([(pool.create("steps", pair="turbo2/turbo2"), 1)])


def test_as_by_calls(pool):
    """Blocks are coded, with the bytes that the pool itself would make."""
    pair = "q8_0/turbo4"
    direct, called = pool.create("steps", pair=pair), pool.create("steps", pair=pair)
    rows = Rows(7)
    steps = pool.device_steps("steps", pair, dtype="float32", max_sequences=1, max_new_tokens=512, max_sequence_tokens=1024)
    for count in (400, 1, 1, 130, 1):
        outputs = []
        with steps.step([(direct, count)]) as step:
            for layer in range(LAYERS):
                q, k, v = rows.take(layer, count)
                outputs.append((step.append_attend(layer, q, k, v), called.append_attend(layer, q, k, v)))
        for got, want in outputs:
            np.testing.assert_allclose(got, want, atol=6e-2)  # blocks are coded a step later
    with steps.step([(direct, 1)]) as step:  # what waits is coded by now
        for layer in range(LAYERS):
            q, k, v = rows.take(layer, 1)
            step.append_attend(layer, q, k, v)
            called.append_attend(layer, q, k, v)
    coded = lambda one: sorted((share.tier, share.bytes) for share in one.info().tiers)  # noqa: E731
    assert coded(direct) == coded(called)
    for layer in range(LAYERS):
        for mine, theirs in zip(direct.read(layer), called.read(layer)):
            np.testing.assert_array_equal(mine, theirs)


def test_rows_may_have_any_distance(pool):
    sequence, rows = pool.create("steps", pair="f16/f16"), Rows(3)
    steps = pool.device_steps("steps", "f16/f16", dtype="float32", max_sequences=1, max_new_tokens=64)
    with steps.step([(sequence, 10)]) as step:
        for layer in range(LAYERS):
            q, k, v = rows.take(layer, 10)
            fused = np.concatenate([q, k, v], axis=1)
            output = np.full((10, HEADS, DIM), np.nan, np.float32)
            found = step.append_attend(layer, fused[:, :HEADS], fused[:, HEADS : HEADS + KV_HEADS], fused[:, HEADS + KV_HEADS :], out=output)
            assert found is output
            np.testing.assert_allclose(output, rows.want(layer, q), atol=2e-3)


def test_an_exception_takes_the_step_back(pool):
    sequence, rows = pool.create("steps", pair="f16/f16"), Rows(4)
    steps = pool.device_steps("steps", "f16/f16", dtype="float32", max_sequences=1, max_new_tokens=64)
    with pytest.raises(ZeroDivisionError), steps.step([(sequence, 10)]) as step:
        step.append_attend(0, *Rows(5).take(0, 10))
        1 // 0
    assert len(sequence) == 0 == sequence.info().tokens
    for _, got, want, _ in run(steps, [sequence], [rows], [10]):
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_pool_outlives_its_steps(pool):
    """Dropped with a step open, in any order."""
    sequence = pool.create("steps", pair="f16/f16")
    steps = pool.device_steps("steps", "f16/f16", dtype="float32", max_sequences=1)
    step = steps.step([(sequence, 1)])
    assert step.starts == [0]
    del step, steps
    assert sequence.append(0, *Rows(1).take(0, 3)[1:]) == 0  # nobody writes there any more


def test_errors(pool):
    sequence = pool.create("steps", pair="f16/f16")
    steps = pool.device_steps("steps", "f16/f16", dtype="float32", max_sequences=1, max_new_tokens=8)
    row = lambda heads, tokens=1, dim=DIM, dtype=np.float32: np.zeros((tokens, heads, dim), dtype)  # noqa: E731
    with pytest.raises(InvalidArgument, match="made for 1 and 8"):
        steps.step([(sequence, 9)])
    with steps.step([(sequence, 1)]) as step:
        with pytest.raises(FailedPrecondition, match="a step is open"):
            steps.step([(sequence, 1)])
        with pytest.raises((Aborted, FailedPrecondition)):
            sequence.append(0, row(KV_HEADS), row(KV_HEADS))
        for args, message in [((2, row(4), row(2), row(2)), "layers 0 to 1"),
                              ((0, row(3), row(2), row(2)), "q has the shape"),
                              ((0, row(4), row(2, 2), row(2)), "k has the shape"),
                              ((0, row(4), row(2), row(2, dtype=np.float16)), "v is float16"),
                              ((0, row(4, dim=2 * DIM)[:, :, ::2], row(2), row(2)), "side by side"),
                              ((0, row(4), [[1.0]], row(2)), "k is a list")]:
            with pytest.raises(InvalidArgument, match=message):
                step.append_attend(*args)
        step.roll_back()
        with pytest.raises(FailedPrecondition, match="has ended"):
            step.append(0, row(KV_HEADS), row(KV_HEADS))
    with pytest.raises(InvalidArgument, match="dtype"):
        pool.device_steps("steps", "f16/f16", dtype="int8")
    with pytest.raises(InvalidArgument):
        pool.device_steps("steps", "nonsense")
    with kvtide.connect("embedded", device="cpu", device_memory="8MiB", host_memory=0) as other:
        other.register("steps", [kvtide.Layer(KV_HEADS, DIM, HEADS)])
        with pytest.raises(FailedPrecondition, match="direct_device"):
            other.device_steps("steps", "f16/f16")


def test_tokens_that_are_said_are_found(pool):
    """When a step begins or when it ends; the next sequence begins with what the first one has."""
    ids = np.arange(200) % 97
    steps = pool.device_steps("steps", "f16/f16", dtype="float32", max_sequences=2, max_new_tokens=400)
    made = [pool.create("steps", pair="f16/f16") for _ in range(2)]
    zeros = lambda heads: np.zeros((200, heads, DIM), np.float32)
    for begin in (0, 100):
        with steps.step([(one, 100) for one in made], token_ids=[ids[begin : begin + 100], None]) as step:
            for layer in range(LAYERS):
                step.append(layer, zeros(KV_HEADS), zeros(KV_HEADS))
            step.end(token_ids=[None, ids[begin : begin + 100]])
    assert [info.known_tokens for info in pool.sequences()] == [200, 200]
    assert pool.stats().shared_blocks == 3
    assert len(pool.create("steps", pair="f16/f16", begin_with=ids)) == 192
    with pytest.raises(InvalidArgument, match="items.1.: 3 token ids for 2 tokens"):
        steps.step([(made[0], 1), (made[1], 2)], token_ids=[None, [1, 2, 3]])
    with pytest.raises(InvalidArgument, match="token ids of 1 items, the step has 2"):
        steps.step([(made[0], 1), (made[1], 2)], token_ids=[[1]])


def test_a_pinned_step_shows_what_was_there(pool):
    """Whatever becomes of the sequences, and prefixes of them."""
    pairs, lengths = ["q8_0/turbo4", "f16/f16"], [300, 80]
    made = [pool.create("steps", pair=pair, exact_window=(1, 1)) for pair in pairs]
    steps = pool.device_steps("steps", dtype="float32", max_sequences=2, max_new_tokens=400)
    rows = [Rows(seed) for seed in range(2)]
    for _ in run(steps, made, rows, lengths):
        pass
    q = rows[0].random.standard_normal((5, HEADS, DIM), dtype=np.float32)
    with steps.pin(list(zip(made, [3, 2]))) as step:
        assert step.starts == [297, 78]
        before = [step.attend(layer, q) for layer in range(LAYERS)]
        with pytest.raises(FailedPrecondition, match="takes no rows"):
            step.append_attend(0, q, q[:, :KV_HEADS], q[:, :KV_HEADS])
        made[1].truncate(10)
        for layer in range(LAYERS):
            made[0].append(layer, *(np.ones((20, KV_HEADS, DIM), np.float32),) * 2)
        for layer in range(LAYERS):
            np.testing.assert_array_equal(step.attend(layer, q), before[layer])
    with steps.pin([(made[0], 5)], prefix=64) as step:
        for layer in range(LAYERS):
            want = reference.attend(q, rows[0].k[layer][:64], rows[0].v[layer][:64])[0]
            np.testing.assert_allclose(step.attend(layer, q), want, atol=2e-3)
    assert [len(one) for one in made] == [320, 10]
