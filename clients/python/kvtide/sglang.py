"""The storage below SGLang's hierarchical cache: pages of its host pool rest in a kvtided, coded, and come back.

SGLang loads it by its path::

    python3 -m sglang.launch_server --model-path MODEL --enable-hierarchical-cache --page-size 64 \\
      --hicache-mem-layout page_first --hicache-storage-backend dynamic --hicache-storage-backend-extra-config \\
      '{"backend_name": "kvtide", "module_path": "kvtide.sglang", "class_name": "KvtideHiCache", "interface_v1": 1,
        "address": "unix:/run/kvtide/kvtided.sock", "pair": "turbo4/turbo4"}'

``kvtide connect sglang`` prints the line for a model and this machine.

SGLang calls from threads of its own which it does not start again: a call that raises ends the storage for the life of the
process. So none raises: what goes wrong is a miss, said once.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import logging
import threading
import time
from dataclasses import dataclass, fields
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from . import store_link
from .block_store import Namespace, OpaqueBlocks, PageLayout, TensorBlocks
from .errors import InvalidArgument
from .fingerprint import name_of, weights_of
from .store_link import StoreLink, in_pieces
from .store_settings import StoreSettings

logger = logging.getLogger("kvtide.sglang")

_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}
_LEASE_SECONDS = 30.0
_MOST_LEASES = 256


@dataclass(frozen=True)
class SglangSettings(StoreSettings):
    """Keys of ``--hicache-storage-backend-extra-config``, beside SGLang's own."""

    @classmethod
    def read(cls, extra: Optional[Mapping[str, Any]]) -> "SglangSettings":
        """Keys that are not kvtide's are SGLang's."""
        return cls.make({one.name: extra[one.name] for one in fields(cls) if extra and one.name in extra},
                        "--hicache-storage-backend-extra-config")


def never_raises(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """``otherwise(self, *arguments)`` is the answer where the call fails."""

    def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def safe(self: "KvtideHiCache", *arguments: Any, **options: Any) -> Any:
            try:
                return call(self, *arguments, **options)
            except Exception as error:
                self._say(call.__name__, error)
                return otherwise(self, *arguments)

        return safe

    return decorate


class KvtideHiCache(HiCacheStorage):
    """One namespace for each rank that has other keys and values; MLA models have one for all."""

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        self.config = storage_config
        self.settings = SglangSettings.read(storage_config.extra_config)
        self.said: set = set()
        self.leases: Deque[Tuple[List[bytes], int, float]] = collections.deque()
        self.lock = threading.Lock()
        self.links: Dict[str, StoreLink] = {}
        self.page_bytes = 0
        self.moved: Dict[str, List[Tuple[int, float]]] = {"backup": [], "prefetch": []}

    # --- the pool ---

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        pool = mem_pool_host
        _, sizes = pool.get_page_buffer_meta(torch.arange(pool.page_size))
        self.parts, self.page_bytes = sizes, sum(sizes)
        self.layout: Optional[PageLayout] = None
        self.dtype: Any = np.uint8
        content: Any = OpaqueBlocks(self.page_bytes, f"{type(pool).__name__} {pool.layout} {pool.dtype}"[:256])
        if self.settings.pair != "exact" and (rows := rows_of(pool, sizes)) is not None:
            self.layout, (layers, heads, dim) = rows[0], rows[1]
            content, self.dtype = TensorBlocks(layers, heads, dim, dim, self.settings.pair), _TYPES[pool.dtype]
        rungs = self.settings.rungs if self.layout is not None else ()
        self.namespace = Namespace(fingerprint(self.config, pool), pool.page_size, content, self.settings.salt, rungs)
        where = self.settings.address or "its default socket"
        for name in ("save", "load"):
            # Pages that rest as they are come from where they lie, if kvtided lets this engine map its host memory.
            open_pool = functools.partial(self._open_pool, host_tier=name == "load" and self.layout is None)
            self.links[name] = StoreLink(open_pool, where, persist=self.settings.persist, log=logger)
        there = [link.start([self.namespace], wait=self.settings.connect_wait) for link in self.links.values()]
        if all(there):
            logger.info("kvtide: pages of %d tokens rest %s in kvtided at %s: %d bytes instead of %d", pool.page_size,
                        f"in {self.settings.pair}" + f", later {', '.join(rungs)}" * bool(rungs) if self.layout
                        else "as the bytes that they are", where,
                        self.links["save"].stores()[0].block_bytes, self.page_bytes)

    def _open_pool(self, host_tier: bool = False) -> Any:
        return store_link.connect(self.settings.address, way=self.settings.way, timeout=self.settings.timeout,
                                  arena_bytes=4 * (self.settings.piece_mib << 20), host_tier=host_tier, log=logger)

    # --- the zero-copy interface: one copy, between SGLang's pool and the memory that the daemon sees ---

    @never_raises(lambda self, keys, *_: [False] * len(keys))
    def batch_set_v1(self, keys: List[str], host_indices: torch.Tensor, extra_info: Any = None) -> List[bool]:
        """True for pages that are there now. Behind one that found no room none is stored: it would not be found."""
        results = [False] * len(keys)
        if not getattr(self.config, "is_storage_writer", True):
            return [True] * len(keys)  # another rank has the same bytes and stores them
        link = self.links["save"]
        stores = link.stores()
        if not stores:
            return results
        names, pages, began = [key_of(key) for key in keys], self._pages(len(keys), host_indices), time.monotonic()
        present = 0
        try:
            present = stores[0].lookup(names, lease_seconds=-1, peek=True).hits
            results[:present] = [True] * present
            for first, end in in_pieces(len(keys) - present, self.page_bytes, self.settings.piece_mib << 20):
                first, end = first + present, end + present
                payload, raw = self._payload(link, end - first)
                for row, parts in zip(raw, pages[first:end]):
                    at = 0
                    for address, size in parts:
                        ctypes.memmove(row.ctypes.data + at, address, size)
                        at += size
                done = stores[0].store(names[first:end], payload, **self._form())
                good = done.stored + done.present
                results[first:first + good] = [True] * good
                if done.left_out:
                    self._say("batch_set_v1", MemoryError(done.problem))
                    break
        except Exception as error:
            link.failed(error)
            self._say("batch_set_v1", error)
        self._count("backup", sum(results) - present, began)
        return results

    @never_raises(lambda self, keys, *_: [False] * len(keys))
    def batch_get_v1(self, keys: List[str], host_indices: torch.Tensor, extra_info: Any = None) -> List[bool]:
        """True up to the first page that cannot be had; those are in their places."""
        results = [False] * len(keys)
        link = self.links["load"]
        stores = link.stores()
        if not stores:
            return results
        names, pages, began = [key_of(key) for key in keys], self._pages(len(keys), host_indices), time.monotonic()
        lease = 0
        try:
            lease, hits = self._leased(stores[0], names)
            for first, end in in_pieces(hits, self.page_bytes, self.settings.piece_mib << 20):
                good = self._from_places(link, stores[0], lease, pages, first, end)
                if good is None:
                    payload, raw = self._payload(link, end - first)
                    lost = stores[0].load(lease, payload, first_block=first, **self._form(end - first))
                    good = min([end, *lost])
                    _scatter([row.ctypes.data for row in raw[:good - first]], pages[first:good])
                results[first:good] = [True] * (good - first)
                if good < end:
                    break
        except Exception as error:
            link.failed(error)
            self._say("batch_get_v1", error)
        if lease:
            link.later(functools.partial(stores[0].release, lease))
        self._count("prefetch", sum(results), began)
        return results

    def _from_places(self, link: StoreLink, store: Any, lease: int, pages: List[List[Tuple[int, int]]], first: int,
                     end: int) -> Optional[int]:
        """Copies pages from where their blocks lie in kvtided's host memory; the first that is lost, or ``end``. None: they do not lie
        there, or this engine does not read it."""
        if self.layout is not None or not getattr(link.pool, "host_tier_bytes", 0):
            return None
        with store.in_place(lease, first, end - first) as (addresses, lost):
            good = min([end, *lost])
            if not all(addresses[:good - first]):
                return None
            _scatter(addresses[:good - first], pages[first:good])
            return good

    @never_raises(lambda self, keys, *_: 0)
    def batch_exists(self, keys: List[str], extra_info: Any = None) -> int:
        """Pages from the first one on; they are kept until they are fetched, or for half a minute."""
        link = self.links["load"]
        stores = link.stores()
        if not stores or not keys:
            return 0
        names = [key_of(key) for key in keys]
        try:
            found = stores[0].lookup(names, lease_seconds=_LEASE_SECONDS)
        except Exception as error:
            link.failed(error)
            raise
        if found.lease_id:
            with self.lock:
                self.leases.append((names[:found.hits], found.lease_id, time.monotonic() + _LEASE_SECONDS / 2))
                old = self.leases.popleft() if len(self.leases) > _MOST_LEASES else None
            if old is not None:
                link.later(functools.partial(stores[0].release, old[1]))
        return found.hits

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def _leased(self, store: Any, names: Sequence[bytes]) -> Tuple[int, int]:
        """A lease over the pages, that of `batch_exists` if there was one, and how many it has."""
        now, found = time.monotonic(), None
        with self.lock:
            for one in self.leases:
                if one[0][:len(names)] == names[:len(one[0])] and one[2] > now:
                    found = one
                    break
            if found is not None:
                self.leases.remove(found)
        if found is not None:
            return found[1], min(len(found[0]), len(names))
        new = store.lookup(names, lease_seconds=_LEASE_SECONDS)
        return new.lease_id, new.hits

    def _pages(self, pages: int, host_indices: torch.Tensor) -> List[List[Tuple[int, int]]]:
        """Of each page (address, bytes) of its parts."""
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        each = len(addresses) // max(1, pages)
        parts = list(zip(addresses, sizes))
        return [parts[i * each:(i + 1) * each] for i in range(pages)]

    def _payload(self, link: StoreLink, pages: int) -> Tuple[Any, np.ndarray]:
        """Memory for pages: what the store takes, and its bytes page by page."""
        array = link.empty((pages, self.page_bytes // np.dtype(self.dtype).itemsize), self.dtype)
        raw = array.view(np.uint8)
        return (torch.from_numpy(array).view(torch.bfloat16) if self.dtype is np.uint16 else array), raw

    def _form(self, blocks: Optional[int] = None) -> Dict[str, Any]:
        if self.layout is None:
            return {}
        return {"layout": self.layout, **({} if blocks is None else {"blocks": blocks})}

    # --- what SGLang does not need of it ---

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        self._say("get", InvalidArgument('write "interface_v1": 1 into the extra config'))

    def batch_get(self, keys: List[str], target_locations: Any = None, target_sizes: Any = None) -> List[None]:
        self.get("")
        return [None] * len(keys)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        self.get("")
        return False

    def batch_set(self, keys: List[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None) -> bool:
        return self.set("")

    # Pools beside keys and values (state, windows, indexers) are not kept: their models compute.

    def batch_exists_v2(self, keys: List[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        return PoolTransferResult.empty()

    def batch_get_v2(self, transfers: List[Any], extra_info: Any = None) -> Dict[str, List[bool]]:
        return {one.name: [False] * len(one.keys or ()) for one in transfers}

    batch_set_v2 = batch_get_v2

    def _count(self, what: str, pages: int, began: float) -> None:
        if pages and getattr(self.config, "enable_storage_metrics", False):
            with self.lock:
                self.moved[what].append((pages, pages * self.page_bytes / 1e9 / max(1e-9, time.monotonic() - began)))

    @never_raises(lambda self, *_: None)
    def get_stats(self) -> Any:
        """Pages of each call and GB/s of pages as SGLang has them, since it was last asked (``--enable-metrics``)."""
        if not getattr(self.config, "enable_storage_metrics", False):
            return None
        from sglang.srt.observability.metrics_collector import StorageMetrics

        with self.lock:
            moved, self.moved = self.moved, {what: [] for what in self.moved}
        return StorageMetrics(**{f"{what}_{name}": [one[at] for one in calls] for what, calls in moved.items()
                                 for at, name in enumerate(("pgs", "bandwidth"))})

    @never_raises(lambda self, *_: None)
    def clear(self) -> None:
        stores = self.links["save"].stores()
        if stores:
            stores[0].delete()
            for link in self.links.values():
                link.reopen()

    def close(self) -> None:
        for link in self.links.values():
            link.close()

    def _say(self, what: str, error: BaseException) -> None:
        key = (what, type(error).__name__)
        if key not in self.said:
            self.said.add(key)
            logger.warning("kvtide: %s did not work, SGLang computes instead (said once): %s", what, error)


def _scatter(blocks: Sequence[int], pages: Sequence[List[Tuple[int, int]]]) -> None:
    """Bytes from each block's address on into the parts of its page."""
    for block, parts in zip(blocks, pages):
        at = 0
        for address, size in parts:
            ctypes.memmove(address, block + at, size)
            at += size


def key_of(key: str) -> bytes:
    """SGLang's hash as a key of the store, of up to 64 bytes."""
    raw = key.encode()
    return raw if len(raw) <= 64 else hashlib.sha256(raw).digest()


def rows_of(pool: Any, sizes: Sequence[int]) -> Optional[Tuple[PageLayout, Tuple[int, int, int]]]:
    """Where rows lie in a page, K before V, and (layers, heads, head dim); None if the pool's pages are not understood."""
    layers, heads, dim = (getattr(pool, name, 0) for name in ("layer_num", "head_num", "head_dim"))
    if pool.dtype not in _TYPES or getattr(pool, "v_head_dim", dim) != dim or len(sizes) != 2:
        return None
    tokens, side = pool.page_size, pool.page_size * layers * heads * dim
    if list(sizes) != [side * pool.dtype.itemsize] * 2 or dim % 16:
        return None
    if pool.layout == "page_first":  # [tokens][layers][heads][dim]
        return (PageLayout(block_stride=2 * side, layer_stride=heads * dim, value_offset=side, token_stride_k=layers * heads * dim,
                           token_stride_v=layers * heads * dim, head_stride_k=dim, head_stride_v=dim), (layers, heads, dim))
    if pool.layout == "page_first_direct":  # [layers][tokens][heads][dim]
        return (PageLayout(block_stride=2 * side, layer_stride=tokens * heads * dim, value_offset=side, token_stride_k=heads * dim,
                           token_stride_v=heads * dim, head_stride_k=dim, head_stride_v=dim), (layers, heads, dim))
    return None


def fingerprint(config: Any, pool: Any) -> str:
    """Names what computes the pages. Replicas of data parallelism share; so do the ranks of MLA models."""
    digest = hashlib.sha256(repr((weights_of(str(config.model_name)), str(pool.dtype), getattr(pool, "start_layer", 0),
                                  getattr(pool, "end_layer", 0), config.tp_lcm_size, config.should_split_heads)).encode()).hexdigest()
    tensor = "mla" if config.is_mla_model else f"tp{config.tp_rank}/{config.tp_size}"
    return (f"sglang {name_of(str(config.model_name))} {digest[:32]} pp{config.pp_rank}/{config.pp_size} {tensor} "
            f"cp{config.attn_cp_rank}/{config.attn_cp_size} dcp{getattr(config, 'dcp_rank', 0)}/{getattr(config, 'dcp_size', 1)}")
