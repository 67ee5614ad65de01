"""The cache below vLLM: full blocks rest in a kvtided and come back when a prompt begins with the same tokens.

vLLM loads it by its path::

    --kv-transfer-config '{"kv_connector": "KvtideConnector", "kv_connector_module_path": "kvtide.vllm.connector",
                           "kv_role": "kv_both", "kv_connector_extra_config": {"address": "unix:/run/kvtide/kvtided.sock"}}'

vLLM makes one object in its scheduler and one in each worker. This file is vLLM's interface; ``connector_plan`` decides,
``connector_worker`` moves, ``connector_pages`` knows what is in a page, ``store_link`` the daemon that may be away.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (KVConnectorBase_V1, KVConnectorHandshakeMetadata, KVConnectorMetadata,
                                                               KVConnectorRole, KVConnectorWorkerMetadata)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.logger import init_logger

from .. import store_link
from ..block_store import Namespace, OpaqueBlocks, TensorBlocks
from ..block_watch import BlockWatch
from ..errors import KvtideError
from . import connector_config, connector_events
from .backend import KvtideImpl
from .connector_config import ConnectorSettings
from .connector_pages import OwnPages, Pages, learn
from .connector_plan import ConnectorPlan, Rank, Saved, Step
from .connector_worker import ConnectorWorker, codec_versions
from .devices import paged_device
from .pages import profile_of, settings_of

logger = init_logger("vllm.kvtide")


@dataclass
class KvtideMetadata(KVConnectorMetadata):
    step: Step


@dataclass
class KvtideHandshake(KVConnectorHandshakeMetadata):
    """What a worker's blocks are: the scheduler looks them up for all."""

    namespace: Namespace


@dataclass
class KvtideSaved(KVConnectorWorkerMetadata):
    """What became of saves, of one worker or of several."""

    results: Dict[int, Saved]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "KvtideSaved":
        assert isinstance(other, KvtideSaved)
        both = {number: one.and_of(other.results[number]) for number, one in self.results.items() if number in other.results}
        return KvtideSaved({**self.results, **other.results, **both})


class KvtideConnector(KVConnectorBase_V1):
    """One namespace for each rank. A daemon that is away means computing, never an error."""

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self.settings = ConnectorSettings.read(transfer.kv_connector_extra_config or {})
        if transfer.kv_load_failure_policy != "recompute":
            # A request must not fail because its cache did.
            transfer.kv_load_failure_policy = "recompute"
        self.reasons = connector_config.refusals(vllm_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            self.reasons.append("layers of several kinds with tables of their own: use --disable-hybrid-kv-cache-manager")
        if self.reasons and role == KVConnectorRole.SCHEDULER:
            logger.warning("kvtide: nothing rests in kvtided: %s", "; ".join(self.reasons))
        self.block_tokens = vllm_config.cache_config.block_size
        self.chunk_tokens = connector_config.chunk_tokens(self.block_tokens)
        self.plan: Optional[ConnectorPlan] = None
        self.worker: Optional[ConnectorWorker] = None
        self.namespace: Optional[Namespace] = None
        self.events: Optional[connector_events.EventMaker] = None
        if role == KVConnectorRole.SCHEDULER and not self.reasons:
            self.plan = self._new_plan()

    def _new_plan(self) -> ConnectorPlan:
        config, cache, transfer = self._vllm_config, self._kv_cache_config, self._vllm_config.kv_transfer_config
        link, per_hash, more = self._link(self.settings.lookup_timeout), hash_tokens(config, cache), {}
        if connector_events.wanted(config):
            self.events = connector_events.EventMaker(self.block_tokens, per_hash, cache.kv_cache_groups[0].kv_cache_spec,
                                                      store_link.is_here(self.settings.address))
            more = {"watch": BlockWatch(link, seconds=self.settings.event_seconds), "describe": self.events.describe}
        return ConnectorPlan(link, self.block_tokens, self.chunk_tokens, hash_tokens=per_hash, load=transfer.is_kv_consumer,
                             save=transfer.is_kv_producer, **more)

    def _link(self, timeout: float, host_tier: bool = False) -> store_link.StoreLink:
        settings = self.settings

        def open_pool() -> Any:
            return store_link.connect(settings.address, way=settings.way, timeout=timeout,
                                      arena_bytes=4 * (settings.piece_mib << 20), host_tier=host_tier, log=logger)

        return store_link.StoreLink(open_pool, settings.address or "its default socket", persist=settings.persist, log=logger)

    # --- worker ---

    def register_kv_caches(self, kv_caches: Dict[str, torch.Tensor]) -> None:
        if self.reasons:
            return
        config, context = self._vllm_config, self._vllm_config.compilation_config.static_forward_context
        own = isinstance(context[next(iter(kv_caches))].impl, KvtideImpl)
        names = [name for name in self._kv_cache_config.kv_cache_groups[0].layer_names
                 if name in kv_caches and not (own and context[name].impl.owner_name)]
        layers, caches = [context[name] for name in names], [kv_caches[name] for name in names]
        pages, content, what = self._own_pages(layers, caches) if own else self._pages(layers, caches)
        coded = (self._use_copiers(pages, content) or own) and isinstance(content, TensorBlocks)
        parallel, rank = config.parallel_config, self._rank()
        rungs = self.settings.rungs if isinstance(content, TensorBlocks) else ()
        if rungs:
            what += f", where room is short in {', then '.join(rungs)},"
        elif self.settings.rungs:
            logger.warning("kvtide: degrade does nothing here: blocks rest as bytes that the daemon does not know how to recode")
        self.namespace = Namespace(
            connector_config.fingerprint(config, names, hash_tokens(config, self._kv_cache_config), rank,
                                         (parallel.pipeline_parallel_size, parallel.tensor_parallel_size)),
            self.chunk_tokens, content, self.settings.salt, rungs)
        links = [self._link(self.settings.timeout), self._link(self.settings.timeout, host_tier=pages.copiers is not None)]
        there = [link.start([self.namespace], wait=self.settings.connect_wait) for link in links]
        self.worker = ConnectorWorker(pages, links[0], links[1], rank, coded=coded, piece_bytes=self.settings.piece_mib << 20,
                                      most_blocks=max(64, self._kv_cache_config.num_blocks // 4), log=logger)
        if all(there):
            logger.info("kvtide: blocks of %d tokens rest %s in kvtided at %s: %d bytes%s", self.chunk_tokens, what,
                        self.settings.address or "its default socket", links[0].stores()[0].block_bytes,
                        "" if own else f" instead of {pages.raw_bytes}")

    def _pages(self, layers: List[Any], caches: List[torch.Tensor]) -> Tuple[Pages, Any, str]:
        """The pages, what the daemon is told that they are, and the same for the log."""
        order = learn(layers[0], caches[0]) if self.settings.pair != "exact" and alike(caches) else None
        pages = Pages(caches, self._kv_cache_config.num_blocks, self.chunk_tokens // self.block_tokens, order)
        if order is not None:
            content = TensorBlocks(len(caches), order.heads, order.head_dim, order.head_dim, self.settings.pair)
            return pages, content, f"in {self.settings.pair}"
        encoding = f"memory {caches[0].dtype} {tuple(caches[0].shape[1:])} {caches[0].stride()[1:]}"[:256]
        return pages, OpaqueBlocks(pages.bytes, encoding), "as the bytes that they are"

    def _use_copiers(self, pages: Pages, content: Any) -> bool:
        """Compiled code moves the pages, and codes them before they cross the bus."""
        try:
            pair = content.pair if isinstance(content, TensorBlocks) else ""
            if pages.use_copiers(paged_device(pages.caches[0].device.type), self.settings.piece_mib << 20, pair):
                return True
            why = "their layout is not one of rows or bytes side by side"
        except KvtideError as error:
            why = str(error)
        logger.warning("kvtide: torch moves the pages, layer by layer, which is slower: %s", why)
        return False

    def _own_pages(self, layers: List[Any], caches: List[torch.Tensor]) -> Tuple[Pages, Any, str]:
        """Of kvtide's attention backend. The daemon codes blocks as the backend does, so a stock vLLM with the same pair and block
        size finds them too, unless keys are coded by a profile: then only who has the same one does."""
        pages = OwnPages(caches, self._kv_cache_config.num_blocks, lambda: {id(one.impl.part): one.impl.part for one in layers}.values())
        pair, profile = settings_of(self._vllm_config).pair, profile_of(self._vllm_config)
        shapes = {layer.impl.shape for layer in layers}
        what = f"as kvtide's pages of {pair}" + (f" by profile {profile.digest}" if profile is not None else "")
        if len(shapes) > 1 or profile is not None:
            # Bytes that a backend like this one alone understands: with the same shapes, versions of codecs, and means.
            inside = [asdict(layer.impl.shape) for layer in layers], codec_versions(pair), profile.digest if profile is not None else ""
            return pages, OpaqueBlocks(pages.bytes, f"kvtide {pair} {hashlib.sha256(repr(inside).encode()).hexdigest()}"), what
        (shape,) = shapes
        return pages, TensorBlocks(len(caches), shape.kv_heads, shape.head_dim_k, shape.head_dim_v, pair), what

    def _rank(self) -> Rank:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        return get_pp_group().rank_in_group, get_tp_group().rank_in_group

    def get_handshake_metadata(self) -> Optional[KvtideHandshake]:
        return KvtideHandshake(self.namespace) if self.namespace is not None else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self.worker is not None and isinstance(kv_connector_metadata, KvtideMetadata):
            self.worker.fence(kv_connector_metadata.step.fenced)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self.worker is not None:
            self.worker.start_loads(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads happen between steps."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Saves are made from the step's metadata: CUDA graphs call no hooks of layers."""

    def wait_for_save(self) -> None:
        if self.worker is not None:
            self.worker.start_saves(self._step())

    def _step(self) -> Step:
        metadata = self._get_connector_metadata()
        return metadata.step if isinstance(metadata, KvtideMetadata) else Step()

    def get_finished(self, finished_req_ids: Set[str]) -> Tuple[Optional[Set[str]], Optional[Set[str]]]:
        return self.worker.take_done() if self.worker is not None else (None, None)

    def get_block_ids_with_load_errors(self) -> Set[int]:
        return self.worker.take_bad_blocks() if self.worker is not None else set()

    def get_kv_connector_stats(self) -> Optional[KVConnectorStats]:
        counts: Dict[str, Any] = {}
        if self.worker is not None:
            counts = {name: value for name, value in asdict(self.worker.take_counts()).items() if value}
        if self.plan is not None:
            counts.update(self.plan.take_counts())
        return KvtideStats(data=counts) if counts else None

    def build_connector_worker_meta(self) -> Optional[KVConnectorWorkerMetadata]:
        results = self.worker.take_saved() if self.worker is not None else {}
        return KvtideSaved(results) if results else None

    def shutdown(self) -> None:
        if self.worker is not None:
            self.worker.close()
        if self.plan is not None:
            self.plan.link.close()

    # --- scheduler ---

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Dict[Rank, KVConnectorHandshakeMetadata]) -> None:
        if self.plan is None:
            return
        ranks = sorted(rank for rank, one in metadata.items() if isinstance(one, KvtideHandshake))
        self.plan.ranks = tuple(ranks)
        self.plan.link.start([metadata[rank].namespace for rank in ranks], wait=self.settings.connect_wait)

    def set_xfer_handshake_metadata(self, metadata: Dict[int, KVConnectorHandshakeMetadata]) -> None:
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): one for rank, one in metadata.items()})

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Tuple[Optional[int], bool]:
        return self.plan.matched(request, num_computed_tokens) if self.plan is not None else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self.plan is not None:
            self.plan.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> Dict[Any, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        if num_external_tokens == 0 or self.plan is None:
            return {}
        out: Dict[Any, int] = {}
        for tier, tokens in self.plan.tokens_by_tier(request.request_id, num_external_tokens):
            source = CacheHitSource.HOST if connector_events.in_memory(tier) else CacheHitSource.DISK
            out[source] = out.get(source, 0) + tokens
        return out

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KvtideMetadata(self.plan.build(scheduler_output) if self.plan is not None else Step())

    def update_connector_output(self, connector_output: Any) -> None:
        if self.plan is None:
            return
        bad = connector_output.invalid_block_ids or set()
        for request_id in connector_output.finished_recving or ():
            one = self.plan.tracked.get(request_id)
            if bad and one is not None and not bad.isdisjoint(one.blocks):
                self.plan.load_failed(request_id)
        self.plan.received(connector_output.finished_recving or ())
        if isinstance(connector_output.kv_connector_worker_meta, KvtideSaved):
            self.plan.saved(connector_output.kv_connector_worker_meta.results)

    def take_events(self) -> Iterable[Any]:
        if self.plan is None or self.plan.watch is None or self.events is None:
            return ()
        self.plan.watch.poll()
        return self.events.events(self.plan.watch.take())

    def has_pending_push_work(self) -> bool:
        """Steps go on until workers have said what became of the last saves: they are to be published."""
        return self.plan is not None and bool(self.plan.announced)

    def request_finished(self, request: Any, block_ids: List[int]) -> Tuple[bool, Optional[Dict[str, Any]]]:
        return (self.plan.finished(request.request_id) if self.plan is not None else False), None

    def reset_cache(self) -> Optional[bool]:
        return self.plan.reset() if self.plan is not None else True

    # --- metrics ---

    @classmethod
    def build_kv_connector_stats(cls, data: Optional[Dict[str, Any]] = None) -> Optional[KVConnectorStats]:
        return KvtideStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, metric_types: Any, labelnames: List[str],
                           per_engine_labelvalues: Dict[int, List[object]]) -> KVConnectorPromMetrics:
        return KvtidePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class KvtideStats(KVConnectorStats):
    """Sums of :class:`~kvtide.vllm.connector_worker.Counts`."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> Dict[str, float]:
        return {f"kvtide {name.replace('_', ' ').replace('.', ' ')}": round(value, 3) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


COUNTERS = {
    "saved_blocks": "Blocks stored in kvtided",
    "present_blocks": "Blocks that were in kvtided already",
    "dropped_blocks": "Blocks not stored: no room, or the daemon is away",
    "saved_bytes": "Bytes stored in kvtided, as they travel",
    "loaded_blocks": "Blocks loaded from kvtided",
    "loaded_bytes": "Bytes loaded from kvtided, as they travel",
    "in_place_blocks": "Of the loaded blocks, those copied from where they lie in kvtided's host memory (--host-sharing)",
    "failed_loads": "Loads that failed: their requests compute",
    "save_seconds": "Time that stores took",
    "load_seconds": "Time that loads took",
    "lookups": "Questions of the scheduler",
    "asked_blocks": "Blocks that it asked for",
    "found_blocks": "Blocks that it found, from the first on",
}
TOKENS_BY_TIER = "hit_tokens"


class KvtidePromMetrics(KVConnectorPromMetrics):
    """``vllm:kvtide_*_total``."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: List[str],
                 per_engine_labelvalues: Dict[int, List[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self.counters: Dict[str, Any] = {}
        for name, words in COUNTERS.items():
            counter = self._counter_cls(name=f"vllm:kvtide_{name}", documentation=words + ".", labelnames=labelnames)
            self.counters[name] = {engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()}
        self.engines = per_engine_labelvalues
        self.hits = self._counter_cls(name=f"vllm:kvtide_{TOKENS_BY_TIER}", documentation="Tokens of loads from kvtided, by its tier.",
                                      labelnames=[*labelnames, "tier"])

    def observe(self, transfer_stats_data: Dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name in self.counters:
                self.counters[name][engine_idx].inc(value)
            elif name.startswith(f"{TOKENS_BY_TIER}."):
                self.hits.labels(*self.engines[engine_idx], name.split(".", 1)[1]).inc(value)


def alike(caches: Sequence[torch.Tensor]) -> bool:
    """Whether all layers have pages of one kind."""
    return len({(cache.shape, cache.stride(), cache.dtype) for cache in caches}) == 1


def hash_tokens(config: Any, kv_cache_config: Any) -> int:
    """Tokens that one of vLLM's block hashes stands for."""
    try:
        from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
    except ImportError:
        return config.cache_config.block_size
    return resolve_kv_cache_block_sizes(kv_cache_config, config)[1]
