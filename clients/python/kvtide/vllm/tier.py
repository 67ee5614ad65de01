"""A kvtided as a tier below vLLM's own offloading: chunks that its CPU tier lets go rest there, and come back.

vLLM's ``OffloadingConnector`` moves pages between the GPU and pinned memory by its own kernels and cascades them to secondary tiers;
it loads this one by its path::

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config":
      {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592, "block_size": 64, "secondary_tiers":
       [{"type": "KvtideTier", "module_path": "kvtide.vllm.tier", "address": "unix:/run/kvtide/kvtided.sock"}]}}'

A chunk's bytes are those of vLLM's CPU tier, all layers and ranks; nothing says what is in them, so they rest as they are.
``KvtideConnector`` codes them. All methods run on vLLM's scheduler thread and wait for nothing but a lookup; a daemon that is away is
a miss.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from dataclasses import asdict, dataclass, fields
from typing import Any, Callable, ClassVar, Collection, Dict, Iterable, List, Mapping, Optional, Tuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (Locality, LookupResult, Medium, OffloadingCounterMetadata, OffloadingEvent,
                                     RequestOffloadingContext)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from .. import store_link
from ..block_store import Namespace, OpaqueBlocks
from ..block_watch import FIRST_TIER, BlockWatch, runs, tiers_of
from ..errors import InvalidArgument
from ..fingerprint import name_of, weights_of
from ..store_link import StoreLink, in_pieces
from ..store_settings import StoreSettings

logger = init_logger("vllm.kvtide")

OWNER = "kvtide"
LOADED = "vllm:kvtide_tier_loaded_chunks"


@dataclass(frozen=True)
class TierSettings(StoreSettings):
    """Keys of the tier's entry in ``secondary_tiers``, beside vLLM's own.

    Attributes:
        lookup_timeout: seconds that the scheduler waits for an answer.
        event_seconds: where KV events are published, from one round of asking which chunks are still there to the next.
    """

    pair: str = "exact"
    timeout: float = 30.0
    lookup_timeout: float = 1.0
    event_seconds: float = 5.0

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "TierSettings":
        out = cls.make(config, "secondary_tiers: KvtideTier")
        if out.pair != "exact":
            raise InvalidArgument(f"secondary_tiers: pair is {out.pair!r}, and the chunks of vLLM's CPU tier are bytes that nobody here "
                                  "understands: leave it out, or use KvtideConnector (kvtide connect vllm), which codes them")
        return out


def fingerprint(config: Any, chunk_bytes: int) -> str:
    """Names what the bytes under a key mean: differs whenever the model, its types or how ranks and layers lie in them would."""
    said = {"weights": weights_of(config.model.name, ""), "dtype": config.model.dtype, "groups": [asdict(one) for one in config.groups],
            "cache": asdict(config.cache), "layout": str(getattr(config, "kv_cache_layout", None)), "chunk": chunk_bytes,
            "parallel": [config.parallel.tp_size, config.parallel.pp_size, config.parallel.pcp_size, config.parallel.dcp_size],
            "replicated": bool(getattr(config, "replicated_layout", False)), "canonical": bool(getattr(config, "canonical_layout", False))}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return f"{name_of(config.model.name)} {digest} vLLM's CPU tier"


class KvtideTier(SecondaryTierManager):
    """Chunks of the CPU tier in a kvtided. Two threads move them, each with a connection of its own, so that a load waits for no
    store."""

    medium: ClassVar[Medium] = Medium.CPU

    def __init__(self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None,
                 locality: Optional[str] = None, **config: Any) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.settings = TierSettings.read(config)
        self.locality = Locality(locality) if locality is not None else None
        self.rows = np.asarray(primary_kv_view).view(np.uint8)  # [chunks, bytes]
        cache, groups = offloading_spec.config.cache, offloading_spec.config.groups
        namespace = Namespace(fingerprint(offloading_spec.config, self.block_size_bytes),
                              groups[0].tokens_per_block * cache.blocks_per_chunk,
                              OpaqueBlocks(self.block_size_bytes, "a chunk of vLLM's CPU tier"), self.settings.salt)
        self.lock = threading.Condition()
        self.under_way = 0
        self.done: List[JobResult] = []
        self.loaded: Dict[str, int] = {}
        self.said: set = set()
        self.links = {name: self._link(timeout) for name, timeout in (("lookup", self.settings.lookup_timeout),
                                                                      ("store", self.settings.timeout), ("load", self.settings.timeout))}
        there = [link.start([namespace], wait=self.settings.connect_wait) for link in self.links.values()]
        self.watch: Optional[BlockWatch] = None
        if offloading_spec.kv_events_config.enable_kv_cache_events:
            self.watch = BlockWatch(self.links["lookup"], seconds=self.settings.event_seconds)
        self.queues: Dict[str, "queue.SimpleQueue[Any]"] = {"store": queue.SimpleQueue(), "load": queue.SimpleQueue()}
        self.threads = [threading.Thread(target=self._work, args=(name, move), name=f"kvtide-{name}", daemon=True)
                        for name, move in (("store", self._store), ("load", self._load))]
        for thread in self.threads:
            thread.start()
        store_link.close_at_exit(self)
        if all(there):
            logger.info("kvtide: chunks of %d bytes of vLLM's CPU tier rest in kvtided at %s", self.block_size_bytes, self._where())

    def _where(self) -> str:
        return self.settings.address or "its default socket"

    def _link(self, timeout: float) -> StoreLink:
        settings = self.settings

        def open_pool() -> Any:
            arena = max(4 * (settings.piece_mib << 20), 4 * self.block_size_bytes)
            return store_link.connect(settings.address, way=settings.way, timeout=timeout, arena_bytes=arena, log=logger)

        return StoreLink(open_pool, self._where(), persist=settings.persist, log=logger)

    # --- vLLM's thread ---

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        stores = self.links["lookup"].stores()
        try:
            hit = bool(stores) and stores[0].lookup([bytes(key)], lease_seconds=-1).hits == 1
        except Exception as error:  # a lookup that fails is a miss
            self.links["lookup"].failed(error)
            hit = False
            stores = None
        if stores and not hit and self.watch is not None:
            self.watch.gone([bytes(key)])
        return LookupResult.HIT if hit else LookupResult.MISS

    def submit_store(self, job_metadata: Any) -> None:
        self._submit("store", job_metadata)

    def submit_load(self, job_metadata: Any) -> None:
        self._submit("load", job_metadata)

    def _submit(self, name: str, job: Any) -> None:
        with self.lock:
            self.under_way += 1
        self.queues[name].put(job)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        with self.lock:
            done, self.done = self.done, []
        return done

    def has_pending_work(self) -> bool:
        with self.lock:
            return self.under_way > 0 or bool(self.done)

    def take_events(self) -> Iterable[OffloadingEvent]:
        if self.watch is None:
            return []
        self.watch.poll()
        return [OffloadingEvent([one.key for one in run], Medium.STORAGE if run[0].tier in ("disk", "remote") else Medium.CPU,
                                run[0].removed, self.locality, OWNER, removal_expected=True)
                for run in runs(self.watch.take(), lambda before, after: True)]

    @classmethod
    def build_metric_definitions(cls, extra_config: Dict[str, Any]) -> Dict[str, Any]:
        return {LOADED: OffloadingCounterMetadata("Chunks that came back from kvtided, by its tier.", ("tier",))}

    def get_stats(self) -> Optional[OffloadingConnectorStats]:
        with self.lock:
            loaded, self.loaded = self.loaded, {}
        stats = OffloadingConnectorStats()
        for tier, chunks in loaded.items():
            stats.increase_counter(LOADED, chunks, (tier,))
        return stats if loaded else None

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def touch(self, keys: Collection[bytes], req_context: Any) -> None:
        """Lookups have."""

    def drain_jobs(self) -> None:
        with self.lock:
            self.lock.wait_for(lambda: self.under_way == 0)

    def shutdown(self) -> None:
        self.close()

    def close(self) -> None:
        for one in self.queues.values():
            one.put(None)
        for thread in self.threads:
            thread.join(timeout=10)
        for link in self.links.values():
            link.close()

    # --- threads of the tier ---

    def _work(self, name: str, move: Callable[[Any, List[bytes], List[int]], List[bool]]) -> None:
        while (job := self.queues[name].get()) is not None:
            began, keys, chunks = time.monotonic(), [bytes(key) for key in job.keys], [int(chunk) for chunk in job.chunk_ids]
            try:
                good = move(self.links[name], keys, chunks)
            except Exception as error:
                self.links[name].failed(error)
                self._say(name, error)
                good = [False] * len(keys)
            moved = [key for key, ok in zip(job.keys, good) if ok]
            result = result_of(job.job_id, all(good), successful_keys=moved if name == "load" and not all(good) else None,
                               transfer_time=time.monotonic() - began, transfer_bytes=len(moved) * self.block_size_bytes)
            with self.lock:
                self.done.append(result)
                self.under_way -= 1
                self.lock.notify_all()

    def _pieces(self, count: int) -> Iterable[Tuple[int, int]]:
        return in_pieces(count, self.block_size_bytes, self.settings.piece_mib << 20)

    def _store(self, link: StoreLink, keys: List[bytes], chunks: List[int]) -> List[bool]:
        """Behind a chunk that found no room none is stored."""
        good, stores = [False] * len(keys), link.stores()
        if not stores:
            return good
        for first, end in self._pieces(len(keys)):
            payload = link.empty((end - first, self.block_size_bytes), np.uint8)
            payload[:] = self.rows[chunks[first:end]]
            result = stores[0].store(keys[first:end], payload)
            there = result.stored + result.present
            good[first:first + there] = [True] * there
            if self.watch is not None:
                piece = keys[first:end]  # where some were left out nobody said which
                tiers = tiers_of(stores[:1], piece) if result.left_out else dict.fromkeys(piece, FIRST_TIER)
                for key, tier in tiers.items():
                    self.watch.there(key, tier)
            if result.left_out:
                self._say("store", result.problem)
                break
        return good

    def _load(self, link: StoreLink, keys: List[bytes], chunks: List[int]) -> List[bool]:
        good, stores, at = [False] * len(keys), link.stores(), 0
        while stores and at < len(keys):
            found = stores[0].lookup(keys[at:])
            tiers = [tier for tier, count in found.tiers for _ in range(count)]
            try:
                for first, end in self._pieces(found.hits):
                    payload = link.empty((end - first, self.block_size_bytes), np.uint8)
                    lost = set(stores[0].load(found.lease_id, payload, first_block=first))
                    for i in range(first, end):
                        if i not in lost:
                            self.rows[chunks[at + i]] = payload[i - first]
                            good[at + i] = True
                            with self.lock:
                                self.loaded[tiers[i]] = self.loaded.get(tiers[i], 0) + 1
            finally:
                if found.lease_id:
                    link.later(lambda lease=found.lease_id: stores[0].release(lease))
            at += found.hits + 1  # the next one has gone since it was looked up
        return good

    def _say(self, what: str, problem: Any) -> None:
        """Once for each kind of trouble."""
        key = f"{what} {type(problem).__name__}"
        if key not in self.said:
            self.said.add(key)
            logger.warning("kvtide: a %s did not work, vLLM goes on without (said once): %s", what, problem)


def result_of(job_id: int, success: bool, **more: Any) -> JobResult:
    """With what this release of vLLM asks for."""
    known = {one.name for one in fields(JobResult)}
    return JobResult(job_id, success, **{name: value for name, value in more.items() if name in known})
