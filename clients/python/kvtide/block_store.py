"""The block store of a pool: blocks without a sequence, found by key, for engines that keep pages of their own.

``pool.block_store(Namespace(...))`` opens one::

    store = pool.block_store(Namespace(model="llama-3.1-8b 0e9e39f tp0/1", block_tokens=64,
                                       content=TensorBlocks(layers=32, kv_heads=8, head_dim_k=128, head_dim_v=128,
                                                            pair="turbo4/turbo4")))
    store.store(keys, pages)                      # pages [blocks, layers, 2, tokens, kv_heads, head_dim]
    found = store.lookup(keys)                    # hits from the first key on, and a lease
    store.load(found.lease_id, pages[:found.hits])
    store.release(found.lease_id)

What the calls mean, their limits and errors: ``proto/kvtide/v1/blocks.proto``. All methods may be called from any thread and
release the GIL while they work. A block that is not there is a miss, never an error.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Iterator, List, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import numpy as np

from . import _arrays
from ._types import PRIORITIES
from .errors import InvalidArgument

if TYPE_CHECKING:
    from .pool import Pool


@dataclass(frozen=True)
class TensorBlocks:
    """Blocks of K and V rows, coded in ``pair`` at rest."""

    layers: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    pair: str = "f16/f16"


@dataclass(frozen=True)
class OpaqueBlocks:
    """Blocks of bytes that only the engine understands; they come back bit for bit."""

    block_bytes: int
    encoding: str = ""


@dataclass(frozen=True)
class Namespace:
    """What keys are unique in. Namespaces that differ in any field share nothing.

    Attributes:
        model: fingerprint of what computes the blocks: model and revision of its weights, rank and size of tensor and pipeline
            parallelism, the engine's KV dtype.
        block_tokens: tokens of a block.
        salt: keeps namespaces apart that are equal otherwise.
        degrade: pairs of fewer and fewer bits, such as ``("turbo4", "turbo3")``, that blocks which were not used for a while may be
            recoded as when their tier needs room, and others before they would be dropped. ``Found.degraded`` names those that
            were; they load as what is left of their rows. Not of opaque blocks.
    """

    model: str
    block_tokens: int
    content: Union[TensorBlocks, OpaqueBlocks]
    salt: str = ""
    degrade: Tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreResult:
    """Blocks stored by the call, there already, and left out for want of room (``problem`` says why)."""

    stored: int
    present: int = 0
    left_out: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Found:
    """Hits from the first key on; ``tiers`` = neighbouring hits of one tier ``(name, blocks)``; lease 0 = none; ``degraded`` = those
    of the hits that have fewer bits than the namespace's pair (``Namespace.degrade``), which stays so while the lease lasts: whoever
    wants none of these loads what comes before the first."""

    hits: int
    tiers: Tuple[Tuple[str, int], ...] = ()
    lease_id: int = 0
    lease_seconds: float = 0.0
    degraded: Tuple[int, ...] = ()


class LoadedPages(NamedTuple):
    """What became of a load into pages.

    Attributes:
        blocks: whose pages are written.
        lost: the first one that could not be read, if any.
        error: that ended the load, if one did.
        in_place: blocks that were copied from where they lie in the daemon's host memory.
    """

    blocks: int
    lost: Optional[int]
    error: Optional[Exception]
    in_place: int = 0


class BlockStore(Protocol):
    """One open namespace.

    Payloads are dense arrays of host memory (memory of ``pool.empty`` is not copied). Of tensor namespaces:
    ``[blocks, layers, 2, block_tokens, kv_heads, head_dim]`` in float16, bfloat16 or float32 with K before V (where head_dim_k and
    head_dim_v differ: ``[blocks, elements]`` in that order); with ``coded=True``, and of opaque namespaces: uint8
    ``[blocks, block_bytes]``.
    """

    namespace: Namespace
    namespace_id: int
    block_bytes: int
    pair: str
    codec_versions: Tuple[int, int]

    def store(self, keys: Sequence[bytes], payload: Any, *, coded: bool = False) -> StoreResult: ...

    def lookup(self, keys: Sequence[bytes], *, lease_seconds: float = 30.0, peek: bool = False) -> Found: ...

    def load(self, lease_id: int, out: Any, *, first_block: int = 0, coded: bool = False) -> List[int]:
        """Writes ``len(out)`` blocks of the lease into ``out``; returns those that could not be read, counted in the lease."""
        ...

    def release(self, lease_id: int) -> bool: ...

    def persist(self) -> "Persisted": ...

    def delete(self) -> int: ...


@dataclass(frozen=True)
class Persisted:
    """Blocks and bytes written by the call, and blocks that would be there after a restart."""

    blocks: int
    bytes: int
    durable_blocks: int


@dataclass(frozen=True)
class PageLayout:
    """Where K and V lie in one buffer for all blocks of a call, in elements; 0 = dense ``[blocks][layers][K page, V page]``.

    ``heads_first``: pages are ``[kv_heads, tokens, head_dim]`` instead of ``[tokens, kv_heads, head_dim]``. ``value_offset``: from
    the first value of K to that of V of the same layer and block. See ``PageLayout`` of ``blocks.proto``.
    """

    heads_first: bool = False
    block_stride: int = 0
    layer_stride: int = 0
    value_offset: int = 0
    token_stride_k: int = 0
    token_stride_v: int = 0
    head_stride_k: int = 0
    head_stride_v: int = 0


def _payload(array: Any, name: str, write: bool) -> Any:
    """The array as the compiled part takes it: uint8 as it is, else floating point."""
    if isinstance(array, (bytes, bytearray, memoryview)) and not write:
        return np.frombuffer(array, dtype=np.uint8)
    if str(getattr(array, "dtype", "")) in ("uint8", "torch.uint8"):
        dense = array.is_contiguous() if _arrays.is_torch(array) else array.flags.c_contiguous
        if not dense:
            raise InvalidArgument(f"{name} is not dense")
        return array
    return _arrays.writable(array, name) if write else _arrays.borrow(array, name)


class _Open:
    """A :class:`BlockStore` of a pool."""

    def __init__(self, pool: "Pool", namespace: Namespace, core: Any) -> None:
        self.namespace = namespace
        self.namespace_id: int = core.namespace_id
        self.block_bytes: int = core.block_bytes
        self.pair: str = core.pair
        self.codec_versions: Tuple[int, int] = core.codec_versions
        #: True if it was there before.
        self.existed: bool = core.existed
        self._pool = pool
        self._core = core

    def __repr__(self) -> str:
        return f"<kvtide.BlockStore {self.namespace.model!r}, {self.block_bytes} bytes a block, {self._pool.address}>"

    def _check(self, array: Any, coded: bool, layout: Optional[PageLayout]) -> None:
        as_bytes = str(array.dtype) in ("uint8", "torch.uint8")
        if as_bytes and layout is not None:
            raise InvalidArgument("a layout says where rows lie; blocks as bytes lie one after the other")
        if coded and not as_bytes:
            raise InvalidArgument(f"coded blocks are uint8, not {array.dtype}")
        if as_bytes and not coded and not isinstance(self.namespace.content, OpaqueBlocks):
            raise InvalidArgument("the namespace has tensors: say coded=True for blocks as they rest")

    def _step(self, array: Any, blocks: int, layout: Optional[PageLayout]) -> int:
        """Blocks for one call. Strided buffers go at once."""
        if layout is not None:
            return blocks
        if blocks > 0 and int(array.shape[0]) != blocks:
            raise InvalidArgument(f"the payload has {int(array.shape[0])} blocks, expected {blocks}")
        size = int(array.nbytes) // max(1, blocks)
        return self._pool._items_per_call(size)

    def store(
        self,
        keys: Sequence[bytes],
        payload: Any,
        *,
        coded: bool = False,
        layout: Optional[PageLayout] = None,
        priority: Optional[str] = None,
    ) -> StoreResult:
        """Stores blocks; keys that are there stay as they are. ``layout``: the payload is one buffer with these strides.
        ``priority``: ``low``, ``normal`` or ``high``; None = the namespace's. Blocks that are there get it if it is higher."""
        keys = list(keys)
        if priority is not None and priority not in PRIORITIES:
            raise InvalidArgument(f"priority {priority!r} is unknown; use low, normal or high")
        level = 0 if priority is None else PRIORITIES[priority]
        if not keys:
            return StoreResult(0)
        payload = _payload(payload, "payload", False)
        self._check(payload, coded, layout)
        step = self._step(payload, len(keys), layout)
        strides = asdict(layout) if layout is not None else {}
        total = [0, 0, 0]
        problem = ""
        for begin in range(0, len(keys), step):
            piece = payload if step >= len(keys) else payload[begin : begin + step]
            *counts, why = self._core.store(keys[begin : begin + step], piece, strides, level)
            total = [a + b for a, b in zip(total, counts)]
            problem = problem or why
        return StoreResult(*total, problem)

    def lookup(self, keys: Sequence[bytes], *, lease_seconds: float = 30.0, peek: bool = False) -> Found:
        """Counts the keys that are there from the first one on, and takes a lease (``lease_seconds`` <= 0: none)."""
        return Found(*self._core.lookup(list(keys), lease_seconds if lease_seconds > 0 else -1.0, peek))

    def load(
        self,
        lease_id: int,
        out: Any,
        *,
        first_block: int = 0,
        blocks: Optional[int] = None,
        coded: bool = False,
        layout: Optional[PageLayout] = None,
    ) -> List[int]:
        """Writes blocks of the lease into ``out``: ``len(out)`` of them, or ``blocks`` of them with a ``layout``. Returns those
        that could not be read, counted in the lease; what is in their place means nothing."""
        if layout is not None and blocks is None:
            raise InvalidArgument("with a layout, say how many blocks")
        out = _payload(out, "out", True)
        self._check(out, coded, layout)
        count = int(out.shape[0]) if blocks is None else blocks
        step = self._step(out, count, layout)
        strides = asdict(layout) if layout is not None else {}
        lost: List[int] = []
        for begin in range(0, count, step):
            end = min(begin + step, count)
            piece = out if step >= count else out[begin:end]
            lost += self._core.load(lease_id, first_block + begin, end - begin, piece, strides)
        return lost

    def pin_tier(self, copier: Any) -> Optional[Any]:
        """Makes the pool's tier of host memory fast for the copier (``_core.PageCopier``), so that ``load_pages`` may copy blocks from
        where they lie; on a GPU that takes about a second for 16 GiB. ``close()`` of what comes back undoes it. None: the pool has no
        such tier (``kvtide.connect(host_tier=True)``, ``kvtided --host-sharing``)."""
        return copier.pin_tier(self._core)

    def load_pages(
        self, copier: Any, lease_id: int, chunks: int, pages: Any, buffers: Sequence[Any], *, skip: int = 0, in_place: bool = False
    ) -> LoadedPages:
        """Writes the first blocks of the lease into an engine's pages, all in one call (``clients/cpp/page_load.h``).

        Args:
            copier: ``_core.PageCopier`` of the pages.
            pages: int32 numbers of pages, in the order of the tokens.
            buffers: two arrays of ``pool.empty`` for the pieces.
            skip: pages of the first block that are left alone.
            in_place: blocks in the tier of ``pin_tier``, which is not closed meanwhile, are copied from where they lie.
        """
        done, lost, error, places = copier.load(self._core, lease_id, chunks, skip, pages, *buffers, in_place)
        return LoadedPages(done, lost if lost >= 0 else None, error, places)

    @contextlib.contextmanager
    def in_place(self, lease_id: int, first_block: int, blocks: int) -> Iterator[Tuple[List[int], List[int]]]:
        """Addresses of ``block_bytes`` bytes for reading, 0 for blocks that lie elsewhere (``load`` has them), and those that are lost,
        counted in the lease. They are good inside the ``with`` alone. FailedPrecondition without ``pool.host_tier_bytes``."""
        loaded = self._core.load_in_place(lease_id, first_block, blocks)
        try:
            yield loaded.addresses, loaded.lost
        finally:
            if loaded.places:
                self._core.give_back([loaded.places])

    def release(self, lease_id: int) -> bool:
        """Gives a lease back; False if it was over."""
        return self._core.release(lease_id)

    def persist(self) -> Persisted:
        """Makes what is there now durable: found again after a stop, a crash or a kill of the daemon."""
        return Persisted(*self._core.persist())

    def delete(self) -> int:
        """Deletes the namespace with all of its blocks; returns how many there were."""
        return self._core.delete()


def _open(pool: "Pool", namespace: Namespace, persist_all: bool, priority: int) -> BlockStore:
    spec = {
        "model": namespace.model, "block_tokens": namespace.block_tokens, "salt": namespace.salt, "persist_all": persist_all,
        "priority": priority, "degrade": list(namespace.degrade),
    }
    spec.update(asdict(namespace.content))
    return _Open(pool, namespace, pool._core.open_block_store(spec))
