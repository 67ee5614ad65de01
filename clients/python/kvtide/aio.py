"""The blocking verbs as coroutines. Calls run in threads of the default executor and hold no GIL while they wait."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from typing import TYPE_CHECKING, Any, Callable, Iterable, List, Mapping, Optional, Tuple, TypeVar

from ._types import CachedPrefix, MoveResult, PersistResult, PoolInfo, PoolPlan, PoolStats, SequenceInfo
from .pool import Pool, Sequence, connect as _connect

if TYPE_CHECKING:
    from .block_store import BlockStore, Found, LoadedPages, Namespace, Persisted, StoreResult

_T = TypeVar("_T")


async def _run(call: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()  # kvtide.trace counts there too
    return await loop.run_in_executor(None, functools.partial(context.run, call, *args, **kwargs))


async def connect(address: str = "auto", **options: Any) -> "AsyncPool":
    """:func:`kvtide.connect` as a coroutine; ``async with await kvtide.aio.connect() as pool`` closes it."""
    return AsyncPool(await _run(_connect, address, **options))


class AsyncPool:
    """A pool with coroutines; sequences are the same :class:`kvtide.Sequence` objects. ``.pool`` is the blocking one."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    async def __aenter__(self) -> "AsyncPool":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """See :meth:`Pool.close`."""
        await _run(self.pool.close)

    async def info(self) -> PoolInfo:
        """See :meth:`Pool.info`."""
        return await _run(self.pool.info)

    async def stats(self) -> PoolStats:
        """See :meth:`Pool.stats`."""
        return await _run(self.pool.stats)

    async def sequences(self, model: str = "") -> List[SequenceInfo]:
        """See :meth:`Pool.sequences`."""
        return await _run(self.pool.sequences, model)

    async def plan(self, model: str, contexts: Iterable[int], **options: Any) -> PoolPlan:
        """See :meth:`Pool.plan`."""
        return await _run(self.pool.plan, model, list(contexts), **options)

    async def models(self) -> List[str]:
        """See :meth:`Pool.models`."""
        return await _run(self.pool.models)

    async def register(self, model: str, layers: Iterable[Any], **options: Any) -> str:
        """See :meth:`Pool.register`."""
        return await _run(self.pool.register, model, list(layers), **options)

    async def unregister(self, model: str) -> None:
        """See :meth:`Pool.unregister`."""
        await _run(self.pool.unregister, model)

    async def create(self, model: str, **options: Any) -> Sequence:
        """See :meth:`Pool.create`."""
        return await _run(self.pool.create, model, **options)

    async def attach(self, id: int) -> Sequence:
        """See :meth:`Pool.attach`."""
        return await _run(self.pool.attach, id)

    async def cached(self, model: str, token_ids: Any, **options: Any) -> CachedPrefix:
        """See :meth:`Pool.cached`."""
        return await _run(self.pool.cached, model, token_ids, **options)

    async def fork(self, sequence: Sequence) -> Sequence:
        """See :meth:`Pool.fork`."""
        return await _run(self.pool.fork, sequence)

    async def truncate(self, sequence: Sequence, tokens: int) -> None:
        """See :meth:`Sequence.truncate`."""
        await _run(sequence.truncate, tokens)

    async def close_sequence(self, sequence: Sequence) -> None:
        """See :meth:`Sequence.close`."""
        await _run(sequence.close)

    async def append(self, sequence: Sequence, layers: Mapping[int, Tuple[Any, Any]], **options: Any) -> int:
        """See :meth:`Sequence.append_layers`."""
        return await _run(sequence.append_layers, layers, **options)

    async def attend(self, layer: int, items: Iterable[Tuple[Sequence, Any]], **options: Any) -> List[Any]:
        """See :meth:`Pool.attend`."""
        return await _run(self.pool.attend, layer, list(items), **options)

    async def append_attend(self, layer: int, items: Iterable[Tuple[Sequence, Any, Any, Any]], **options: Any) -> List[Any]:
        """See :meth:`Pool.append_attend`."""
        return await _run(self.pool.append_attend, layer, list(items), **options)

    async def read(self, sequence: Sequence, layer: int, **options: Any) -> Tuple[Any, Any]:
        """See :meth:`Sequence.read`."""
        return await _run(sequence.read, layer, **options)

    async def read_into(self, sequence: Sequence, layer: int, k: Any, v: Any, *, start: int = 0) -> None:
        """See :meth:`Sequence.read_into`."""
        await _run(sequence.read_into, layer, k, v, start=start)

    async def evict(self, sequences: Optional[Iterable[Sequence]] = None, tier: str = "", *, drop: bool = False) -> MoveResult:
        """See :meth:`Pool.evict`."""
        return await _run(self.pool.evict, sequences, tier, drop=drop)

    async def persist(self, sequences: Iterable[Sequence]) -> PersistResult:
        """See :meth:`Pool.persist`."""
        return await _run(self.pool.persist, list(sequences))

    async def set_priority(self, sequences: Iterable[Sequence], priority: str) -> None:
        """See :meth:`Pool.set_priority`."""
        await _run(self.pool.set_priority, list(sequences), priority)

    async def prefetch(self, sequences: Iterable[Sequence]) -> MoveResult:
        """See :meth:`Pool.prefetch`."""
        return await _run(self.pool.prefetch, list(sequences))

    async def block_store(self, namespace: "Namespace", **options: Any) -> "AsyncBlockStore":
        """See :meth:`Pool.block_store`."""
        return AsyncBlockStore(await _run(self.pool.block_store, namespace, **options))


class AsyncBlockStore:
    """A namespace of blocks with coroutines; ``.blocking`` is the other one."""

    def __init__(self, blocks: "BlockStore") -> None:
        self.blocking = blocks

    async def store(self, keys: Iterable[bytes], payload: Any, **options: Any) -> "StoreResult":
        """See :meth:`BlockStore.store`."""
        return await _run(self.blocking.store, list(keys), payload, **options)

    async def lookup(self, keys: Iterable[bytes], **options: Any) -> "Found":
        """See :meth:`BlockStore.lookup`."""
        return await _run(self.blocking.lookup, list(keys), **options)

    async def load(self, lease_id: int, out: Any, **options: Any) -> List[int]:
        """See :meth:`BlockStore.load`."""
        return await _run(self.blocking.load, lease_id, out, **options)

    async def pin_tier(self, copier: Any) -> Optional[Any]:
        """See :meth:`BlockStore.pin_tier`."""
        return await _run(self.blocking.pin_tier, copier)

    async def load_pages(
        self, copier: Any, lease_id: int, chunks: int, pages: Any, buffers: Any, **options: Any
    ) -> "LoadedPages":
        """See :meth:`BlockStore.load_pages`."""
        return await _run(self.blocking.load_pages, copier, lease_id, chunks, pages, buffers, **options)

    async def release(self, lease_id: int) -> bool:
        """See :meth:`BlockStore.release`."""
        return await _run(self.blocking.release, lease_id)

    async def persist(self) -> "Persisted":
        """See :meth:`BlockStore.persist`."""
        return await _run(self.blocking.persist)

    async def delete(self) -> int:
        """See :meth:`BlockStore.delete`."""
        return await _run(self.blocking.delete)
