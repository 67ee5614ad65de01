"""vLLM's block tables on the host, so that no step waits for the GPU.

vLLM hands a backend block tables in the GPU's memory only. Its model runner (V2) fills them from lists of pages that the scheduler
sent: this keeps a copy of the lists, for each table that a runner makes, and finds it again by the address of the table that a step
names. What is not found (other runners, other releases) is None; the caller then copies from the GPU, which waits.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np


class Copy:
    """The pages of a runner's requests: [group][row of a request, block]."""

    def __init__(self, tables: Any) -> None:
        self.tables = weakref.ref(tables)
        self.pages: List[np.ndarray] = [np.zeros(tuple(table.gpu.shape), np.int32) for table in tables.block_tables]
        self.batch = False  # the tables of the step at hand are those of requests, not a warm-up's

    def append(self, request: int, new: Tuple[List[int], ...]) -> None:
        tables = self.tables()
        for group, ids in enumerate(new):
            end = int(tables.num_blocks.np[group, request])
            ids = [0] * len(ids) if getattr(tables, "redirect_writes_to_null_block", False) else ids
            self.pages[group][request, end - len(ids):end] = ids


_copies: Dict[int, Tuple[Copy, int]] = {}
"""By the address of the table that a step names."""


def of_step(m: Any, ask: bool = False) -> Optional[Tuple[np.ndarray, np.ndarray]]:
    """Lengths and pages of the rows of vLLM's metadata for a step; all lengths are 0 in a warm-up. None if the host does not know.

    Args:
        ask: lengths from the GPU, which waits: with drafts, the host learns late how many were accepted.
    """
    copy, group = _copies.get(m.block_table_tensor.data_ptr(), (None, 0))
    tables = copy.tables() if copy is not None else None
    requests, lengths = getattr(m, "req_idx", None), getattr(m, "seq_lens_cpu_upper_bound", None)
    if tables is None or requests is None or lengths is None:
        return None
    if tables.input_block_tables[group].data_ptr() != m.block_table_tensor.data_ptr():
        return None
    out = np.zeros(m.num_reqs, np.int32)
    if not copy.batch:
        return out, np.zeros((m.num_reqs, 1), np.int32)
    count = min(len(requests), m.num_reqs)
    out[:count] = (m.seq_lens[:count].cpu() if ask else lengths[:count]).numpy()
    columns = max(1, -(-int(out.max(initial=0)) // tables.block_sizes[group]))
    pages = np.zeros((m.num_reqs, columns), np.int32)
    pages[:count] = copy.pages[group][requests[:count], :columns]
    return out, pages


def follow() -> bool:
    """From now on, copies what runners write into their tables. False: this vLLM has no such runner."""
    try:
        from vllm.v1.worker.gpu.block_table import BlockTables
    except ImportError:
        return False
    names = ("__init__", "append_block_ids", "gather_block_tables", "get_dummy_block_tables")
    if not all(callable(getattr(BlockTables, name, None)) for name in names):
        return False
    if not getattr(BlockTables, "kvtide_follows", False):
        for name, after in zip(names, (_made, _appended, _gathered, _dummy)):
            setattr(BlockTables, name, _then(getattr(BlockTables, name), after))
        BlockTables.kvtide_follows = True
    return True


def _then(method: Callable, after: Callable) -> Callable:
    @functools.wraps(method)
    def both(self: Any, *arguments: Any, **options: Any) -> Any:
        result = method(self, *arguments, **options)
        after(self, *arguments, **options)
        return result

    return both


def _made(tables: Any, *_: Any, **__: Any) -> None:
    tables.kvtide_copy = Copy(tables)
    for address in [address for address, (copy, _) in _copies.items() if copy.tables() is None]:
        del _copies[address]
    for group, table in enumerate(tables.input_block_tables):
        _copies[table.data_ptr()] = (tables.kvtide_copy, group)


def _appended(tables: Any, req_index: int, new_block_ids: Tuple[List[int], ...], *_: Any, **__: Any) -> None:
    tables.kvtide_copy.append(req_index, new_block_ids)


def _gathered(tables: Any, *_: Any, out: Any = None, **__: Any) -> None:
    if out is None:
        tables.kvtide_copy.batch = True


def _dummy(tables: Any, *_: Any, **__: Any) -> None:
    tables.kvtide_copy.batch = False
