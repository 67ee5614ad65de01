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

from dataclasses import dataclass
from typing import Any, List, Protocol, Sequence, Tuple, Union


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
    """

    model: str
    block_tokens: int
    content: Union[TensorBlocks, OpaqueBlocks]
    salt: str = ""


@dataclass(frozen=True)
class StoreResult:
    """Blocks stored by the call, there already, and left out for want of room (``problem`` says why)."""

    stored: int
    present: int = 0
    left_out: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Found:
    """Hits from the first key on; ``tiers`` = neighbouring hits of one tier ``(name, blocks)``; lease 0 = none."""

    hits: int
    tiers: Tuple[Tuple[str, int], ...] = ()
    lease_id: int = 0
    lease_seconds: float = 0.0


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

    def delete(self) -> int: ...
