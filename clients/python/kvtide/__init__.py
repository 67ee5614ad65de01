"""kvtide: the KV cache of LLM inference in compressed pools, and the planner of their memory.

>>> import kvtide
>>> pool = kvtide.connect("embedded", device_memory="64MiB", host_memory="64MiB")
>>> name = pool.register("tiny", [kvtide.Layer(kv_heads=2, head_dim=64, query_heads=4)])
>>> sequence = pool.create(name, pair="q8_0/turbo4")

``kvtide.connect`` opens a pool, ``kvtide.plan`` plans memory, ``kvtide.formats`` has the storage formats,
``kvtide.transformers`` a cache for Hugging Face transformers, ``kvtide.aio`` coroutines, ``kvtide.trace`` names calls in the
daemon's log.
"""

from . import errors, formats, profiles
from ._types import (
    CacheTypeInfo,
    CachedPrefix,
    Layer,
    MoveResult,
    PairStats,
    PersistResult,
    PoolInfo,
    PoolPlan,
    PoolPlanCandidate,
    PoolPlanContext,
    PoolStats,
    RemoteStats,
    Rope,
    SequenceInfo,
    Tier,
    TierShare,
    TierStats,
)
from ._trace import trace
from .errors import KvtideError
from .planner import plan
from .pool import Pool, Sequence, connect

__version__ = "0.1.0"
__all__ = [
    "CacheTypeInfo",
    "CachedPrefix",
    "KvtideError",
    "Layer",
    "MoveResult",
    "PairStats",
    "PersistResult",
    "Pool",
    "PoolInfo",
    "PoolPlan",
    "PoolPlanCandidate",
    "PoolPlanContext",
    "PoolStats",
    "RemoteStats",
    "Rope",
    "Sequence",
    "SequenceInfo",
    "Tier",
    "TierShare",
    "TierStats",
    "connect",
    "errors",
    "formats",
    "plan",
    "profiles",
    "trace",
]
