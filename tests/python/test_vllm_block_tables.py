"""The host's copy of vLLM's block tables, against a stand-in with the names and the behaviour of the runner's class; needs no engine."""

import random
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest

BLOCK = 64


class Table:
    """What the copy sees of a torch tensor."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def data_ptr(self):
        return self.array.ctypes.data

    def __getitem__(self, rows):
        return Table(self.array[rows])

    def numpy(self):
        return self.array

    def cpu(self):
        return self


class BlockTables:
    """As in vllm/v1/worker/gpu/block_table.py: rows of requests, rows of the step's batch."""

    def __init__(self, requests, columns, groups=1):
        self.block_sizes = [BLOCK] * groups
        self.block_tables = [SimpleNamespace(gpu=Table(np.zeros((requests, columns), np.int32))) for _ in range(groups)]
        self.input_block_tables = [Table(np.zeros((requests, columns), np.int32)) for _ in range(groups)]
        self.num_blocks = SimpleNamespace(np=np.zeros((groups, requests), np.int32))

    def append_block_ids(self, req_index, new_block_ids, overwrite):
        for group, ids in enumerate(new_block_ids):
            start = 0 if overwrite else self.num_blocks.np[group, req_index]
            self.block_tables[group].gpu.array[req_index, start:start + len(ids)] = ids
            self.num_blocks.np[group, req_index] = start + len(ids)

    def gather_block_tables(self, idx_mapping, num_reqs_padded, out=None):
        for group, table in enumerate(self.input_block_tables):
            table.array[:num_reqs_padded] = 0
            table.array[:len(idx_mapping)] = self.block_tables[group].gpu.array[idx_mapping]

    def get_dummy_block_tables(self, num_reqs):
        for table in self.input_block_tables:
            table.array[:num_reqs] = 0


@pytest.fixture
def block_tables(monkeypatch):
    for name in ("vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.block_table"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    followed = type("BlockTables", (BlockTables,), {name: getattr(BlockTables, name) for name in (
        "__init__", "append_block_ids", "gather_block_tables", "get_dummy_block_tables")})
    sys.modules["vllm.v1.worker.gpu.block_table"].BlockTables = followed
    from kvtide.vllm import block_tables

    monkeypatch.setattr(block_tables, "_copies", {})
    assert block_tables.follow() and block_tables.follow()  # vLLM loads plugins more than once
    return SimpleNamespace(module=block_tables, make=followed)


def metadata(table, rows, requests, lengths):
    return SimpleNamespace(block_table_tensor=table[:rows], num_reqs=rows, req_idx=np.array(requests), seq_lens_cpu_upper_bound=Table(
        np.array(lengths, np.int32)))


def test_rows_are_those_of_the_device(block_tables):
    rng = random.Random(1)
    tables = block_tables.make(8, 16, groups=2)
    lengths = [0] * 8
    for step in range(300):
        request = rng.randrange(8)
        if rng.random() < 0.2 or lengths[request] + 200 > 16 * BLOCK:
            lengths[request] = 0  # another request in this row
        new = rng.randrange(1, 200)
        have = -(-lengths[request] // BLOCK)
        count = -(-(lengths[request] + new) // BLOCK) - have
        tables.append_block_ids(request, tuple([rng.randrange(1, 1000) for _ in range(count)] for _ in range(2)), have == 0)
        lengths[request] += new
        batch = [r for r in rng.sample(range(8), 8) if lengths[r]]
        padded = len(batch) + rng.randrange(3)
        padded = min(padded, 8)
        tables.gather_block_tables(np.array(batch), padded)
        for group in range(2):
            m = metadata(tables.input_block_tables[group], padded, batch, [lengths[r] for r in batch] + [0] * (padded - len(batch)))
            found, pages = block_tables.module.of_step(m)
            assert found.tolist() == m.seq_lens_cpu_upper_bound.array.tolist()
            for row, length in enumerate(found):
                blocks = -(-int(length) // BLOCK)
                assert pages[row, :blocks].tolist() == tables.input_block_tables[group].array[row, :blocks].tolist()


def test_warm_ups_are_nobodys_rows(block_tables):
    tables = block_tables.make(4, 4)
    tables.append_block_ids(0, ([7, 8],), True)
    tables.gather_block_tables(np.array([0]), 1)
    m = metadata(tables.input_block_tables[0], 1, [0], [100])
    assert block_tables.module.of_step(m)[0].tolist() == [100]
    m.seq_lens = Table(np.array([98], np.int32))  # two drafts were refused
    assert block_tables.module.of_step(m, ask=True)[0].tolist() == [98]
    tables.get_dummy_block_tables(2)
    assert block_tables.module.of_step(metadata(tables.input_block_tables[0], 2, [0, 1], [100, 1]))[0].tolist() == [0, 0]


def test_what_the_host_does_not_know_is_said(block_tables):
    tables = block_tables.make(4, 4)
    m = metadata(tables.input_block_tables[0], 1, [0], [100])
    assert block_tables.module.of_step(metadata(Table(np.zeros((4, 4), np.int32)), 1, [0], [100])) is None  # another table
    assert block_tables.module.of_step(SimpleNamespace(**{**vars(m), "req_idx": None})) is None  # a release that does not name rows
    del tables
    assert block_tables.module.of_step(m) is None  # a runner that is gone


def test_releases_without_such_a_runner(block_tables, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm.v1.worker.gpu.block_table"], "BlockTables", type("BlockTables", (), {}))
    assert not block_tables.module.follow()
