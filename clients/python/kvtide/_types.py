"""Plain data that pools answer with. Sizes are bytes, times seconds; counters only grow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding of a layer's keys.

    Args:
        frequencies: radians a position of each pair of channels, at most ``head_dim / 2``; channels behind the pairs are not
            turned. Empty: keys are not turned at all.
        neighbours: pair i is channels 2i and 2i + 1, else i and i + pairs.
    """

    frequencies: Tuple[float, ...]
    neighbours: bool = False


@dataclass(frozen=True)
class Layer:
    """The attention of one model layer.

    Args:
        kv_heads: heads of K and V.
        head_dim: width of a K head, and of a V head unless ``head_dim_v`` says otherwise; a multiple of 16 up to 512.
        query_heads: query heads, a multiple of ``kv_heads``; 0 = as many.
        window: a query at position p sees positions > p - window; 0 = all.
        scale: factor of q.k; 0 = 1/sqrt(head_dim).
        softcap: logit soft-cap; 0 = none.
        rope: how the keys that come are turned, with which a daemon calibrates keys before rotary embedding from this model's
            traffic (``kvtide calibrate --from-daemon``); None = not known. Of all layers or of none.
    """

    kv_heads: int
    head_dim: int
    query_heads: int = 0
    head_dim_v: int = 0
    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    rope: Optional[Rope] = None

    def _wire(self) -> Dict[str, Any]:
        return {
            "kv_heads": self.kv_heads,
            "head_dim_k": self.head_dim,
            "head_dim_v": self.head_dim_v or self.head_dim,
            "query_heads": self.query_heads or self.kv_heads,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            **({} if self.rope is None else {"rope_frequencies": list(self.rope.frequencies), "rope_neighbours": self.rope.neighbours}),
        }


@dataclass(frozen=True)
class Tier:
    """A level of memory. ``backend`` is what computes there; ``device`` tells the parts of one tier apart."""

    name: str
    backend: str
    capacity_bytes: int
    device: str
    io: bool
    durable: bool


@dataclass(frozen=True)
class CacheTypeInfo:
    """A storage format of this build."""

    name: str
    bits: int
    group: int
    version: int
    bits_per_value: float


@dataclass(frozen=True)
class PoolInfo:
    """What a pool is and what it allows; a limit of 0 is no limit."""

    version: str
    block_tokens: int
    tiers: List[Tier]
    cache_types: List[CacheTypeInfo]
    default_pair: str
    default_exact_window: Tuple[int, int]
    models: List[str]
    max_message_bytes: int
    max_sequences: int
    max_models: int
    max_tokens: int
    max_items: int
    max_append_tokens: int
    process_id: int
    uptime_seconds: float

    @classmethod
    def _of(cls, raw: Mapping[str, Any]) -> "PoolInfo":
        raw = dict(raw)
        raw["tiers"] = [Tier(**tier) for tier in raw["tiers"]]
        raw["cache_types"] = [CacheTypeInfo(**one) for one in raw["cache_types"]]
        return cls(**raw)


@dataclass(frozen=True)
class TierShare:
    """Blocks of a sequence in one tier; shared blocks count for every sequence that holds them."""

    tier: str
    blocks: int
    bytes: int
    device: str


#: kvtide.v1.Priority.
PRIORITIES = {"low": 1, "normal": 2, "high": 3}


@dataclass(frozen=True)
class SequenceInfo:
    """One sequence as the pool sees it. ``tokens`` is its length, the minimum over its layers."""

    id: int
    forked_from: int
    model: str
    pair: str
    tenant: str
    tokens: int
    max_layer_tokens: int
    tiers: List[TierShare]
    dropped_blocks: int
    shared_blocks: int
    exact_window: Tuple[int, int]
    seal_at_once: bool
    idle_seconds: float
    age_seconds: float
    device: str
    durable: bool
    durable_tokens: int
    known_tokens: int
    reused_tokens: int
    #: Blocks of fewer bits than ``pair`` says, because their tier needed room, and what they may be recoded as.
    degraded_blocks: int
    degrade: List[str]
    #: Which these are, of ``Sequence.info()``: (layer group, first token, tokens, pair), ascending. In lists empty.
    degraded: List[Tuple[int, int, int, str]]
    priority: str  # "low", "normal" or "high"

    @property
    def bytes(self) -> int:
        """Bytes of its blocks in all tiers."""
        return sum(share.bytes for share in self.tiers)

    @classmethod
    def _of(cls, raw: Mapping[str, Any]) -> "SequenceInfo":
        raw = dict(raw)
        raw["tiers"] = [TierShare(**share) for share in raw["tiers"]]
        raw["priority"] = next(name for name, value in PRIORITIES.items() if value == raw["priority"])
        return cls(**raw)


@dataclass(frozen=True)
class CachedPrefix:
    """The longest cached prefix of some tokens, in full blocks of 64."""

    tokens: int
    #: Tokens by the tier that they lie in, in their order.
    tiers: List[Tuple[str, int]]


@dataclass(frozen=True)
class PairStats:
    """Blocks of one pair in one tier."""

    pair: str
    blocks: int
    bytes: int


@dataclass(frozen=True)
class TierStats:
    """One tier: what it holds, and what has moved in and out since the start."""

    name: str
    backend: str
    capacity_bytes: int
    used_bytes: int
    largest_free_bytes: int
    blocks: int
    pinned_blocks: int
    pairs: List[PairStats]
    demoted_blocks: int
    promoted_blocks: int
    dropped_blocks: int
    device: str
    lost_blocks: int
    io: bool
    problem: str
    read_bytes: int
    written_bytes: int
    read_errors: int
    write_errors: int
    checksum_errors: int
    sync_errors: int
    prefix_hit_tokens: int
    encrypted: bool
    #: Blocks that were recoded here to fewer bits for room, and the bytes that this has freed.
    degraded_blocks: int
    degraded_bytes: int
    #: Of a lower tier that attends: attentions over its blocks where they lie, and after they were to be brought home first.
    attended_in_place: int
    promoted_first: int
    attend_bytes_per_second: float
    promote_bytes_per_second: float
    low_priority_blocks: int
    high_priority_blocks: int


@dataclass(frozen=True)
class RemoteStats:
    """The remote tier, a server through which daemons share blocks, since the start of the daemon. ``problem`` says why it
    is not asked now, ``write_problem`` why nothing is written there; empty: it is."""

    server: str
    problem: str
    write_problem: str
    hit_blocks: int  # that lookups wanted and found there, or not
    miss_blocks: int
    read_blocks: int
    read_bytes: int
    written_blocks: int
    written_bytes: int
    present_blocks: int  # that were there when they were to be written
    left_out_blocks: int  # for want of room or time
    damaged_blocks: int
    timeouts: int
    errors: int
    connects: int
    queued_blocks: int
    memory_limit_bytes: int  # as the server says; 0: none, or it does not say
    memory_used_bytes: int
    memory_policy: str


@dataclass(frozen=True)
class PoolStats:
    """What the pool holds and has done. ``bits_per_value`` counts scales, padding and tails."""

    tiers: List[TierStats]
    models: int
    sequences: int
    tokens: int
    shared_blocks: int
    stored_bytes: int
    f16_equivalent_bytes: int
    bits_per_value: float
    uptime_seconds: float
    sequences_created: int
    sequences_closed: int
    appended_tokens: int
    sealed_blocks: int
    deferred_seals: int
    failed_seals: int
    copied_on_write_blocks: int
    window_freed_blocks: int
    evict_calls: int
    prefetch_calls: int
    moves: int
    failed_moves: int
    moved_bytes: int
    dropped_blocks: int
    attended_blocks: int
    attended_blocks_below_first_tier: int
    checksum_failures: int
    exhausted: int
    lost_blocks: int
    persist_calls: int
    persisted: int
    failed_persists: int
    persisted_bytes: int
    durable_sequences: int
    compacted_blocks: int
    compacted_bytes: int
    prefix_blocks: int
    prefix_alone_bytes: int
    durable_prefix_blocks: int
    prefix_lookups: int
    prefix_miss_tokens: int
    prefix_reused_tokens: int
    remote: Optional[RemoteStats] = None  # None: there is no remote tier

    @classmethod
    def _of(cls, raw: Mapping[str, Any]) -> "PoolStats":
        raw = dict(raw)
        if "remote" in raw:
            raw["remote"] = RemoteStats(**raw["remote"])
        raw["tiers"] = [
            TierStats(**{**tier, "pairs": [PairStats(**pair) for pair in tier["pairs"]]}) for tier in raw["tiers"]
        ]
        return cls(**raw)


@dataclass(frozen=True)
class MoveResult:
    """What an eviction or a prefetch did. ``blocks_left`` stayed for want of room or because they are being written,
    ``shared_blocks`` because forks that were not named hold them; ``degraded_blocks`` were recoded to fewer bits to make
    room."""

    blocks: int
    bytes: int
    dropped_blocks: int
    blocks_left: int
    shared_blocks: int
    degraded_blocks: int = 0


@dataclass(frozen=True)
class PersistResult:
    """Sequences that are durable now, with their tokens, and the blocks that were written for it."""

    sequences: int
    tokens: int
    blocks: int
    bytes: int


@dataclass(frozen=True)
class PoolPlanCandidate:
    """One pair at one context length, in the pool's own memory."""

    pair: str
    rejection: str
    kv_bytes: int
    total_bytes: int
    free_bytes: int
    fits: bool
    measured: bool
    bits_per_value: float
    ratio_to_f16: float
    perplexity_increase_percent: float
    max_context: int
    max_concurrency: int
    measured_model: str  # the measurement behind perplexity_increase_percent
    measured_text: str
    measured_tokens: int
    calibrated: bool  # it is that of keys coded by a profile: create(..., key_centring="calibrated")


@dataclass(frozen=True)
class PoolPlanContext:
    """The answer for one context length. ``verdict`` is ``fits``, ``fits_with_tiers`` or ``does_not_fit``."""

    context: int
    verdict: str
    chosen_pair: str
    reason: str
    split_pair: str
    split_device_bytes: int
    split_host_bytes: int
    candidates: List[PoolPlanCandidate]


@dataclass(frozen=True)
class PoolPlan:
    """What fits into a pool, and with which pair."""

    verdict: str
    device_budget_bytes: int
    contexts: List[PoolPlanContext]
    assumptions: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)

    @classmethod
    def _of(cls, raw: Mapping[str, Any]) -> "PoolPlan":
        raw = dict(raw)
        raw["contexts"] = [
            PoolPlanContext(**{**one, "candidates": [PoolPlanCandidate(**c) for c in one["candidates"]]})
            for one in raw["contexts"]
        ]
        return cls(**raw)
