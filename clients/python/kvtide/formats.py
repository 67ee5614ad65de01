"""The cache types as functions over arrays: the bytes that the pools store, for checking and for reuse.

A page holds 64 tokens (rows) of one head on one side: codes and scales in the order that the attention kernels read. ``k`` and
``v`` pages of one type differ in that order. See kernels/format/README.md for what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional

import numpy as np

from . import _arrays, _core
from .errors import InvalidArgument

BLOCK_TOKENS: int = _core.BLOCK_TOKENS
"""Tokens of a page."""


@dataclass(frozen=True)
class CacheType:
    """A storage format.

    Attributes:
        name: its name on the wire.
        bits: of a code; 16 for types without codes.
        group: values that share one float16 scale; 0 = no scales.
        version: raised with every change of what stored bytes mean.
        rotated: whether vectors are rotated before they are coded.
        alias_of: the type with the same bytes, if this is another name for it.
    """

    name: str
    bits: int
    group: int
    version: int
    rotated: bool
    alias_of: Optional[str]


def types() -> List[CacheType]:
    """All cache types of this build."""
    return [CacheType(**raw) for raw in _core.cache_types()]


def page_bytes(type: str, head_dim: int) -> int:
    """Bytes of one page of 64 tokens: codes, scales and padding."""
    return _core.page_bytes(type, head_dim)


def block_bytes(pair: str, *, layers: int, kv_heads: int, head_dim: int, head_dim_v: int = 0) -> int:
    """Bytes of a block: K and V of 64 tokens in all layers of a layer group."""
    return _core.block_bytes(pair, layers, kv_heads, head_dim, head_dim_v or head_dim)


def bits_per_value(type: str, head_dim: int) -> float:
    """Stored bits per value of a full page, scales and padding included."""
    return page_bytes(type, head_dim) * 8 / (BLOCK_TOKENS * head_dim)


def encode(rows: Any, type: str, side: str = "k", *, mean: Any = None, gain: Any = None) -> np.ndarray:
    """Codes the vectors of one head.

    Args:
        rows: ``[tokens, head_dim]``, float32, float16 or bfloat16; finite and within float16.
        type: name of a cache type.
        side: ``"k"`` or ``"v"``.
        mean, gain: ``[head_dim]`` of a profile: ``(row - mean) * gain`` is coded.

    Returns:
        ``uint8[pages, page_bytes]``; the last page is filled up with zero vectors.
    """
    rows = _arrays.floats(rows, "rows")
    if rows.ndim != 2 or rows.shape[0] < 1:
        raise InvalidArgument(f"rows have the shape {list(rows.shape)}; expected [tokens, head_dim]")
    pages = np.zeros((-(-rows.shape[0] // BLOCK_TOKENS), page_bytes(type, rows.shape[1])), dtype=np.uint8)
    _core.encode(type, side, rows, pages, _vector(mean), _vector(gain))
    return pages


def decode(
    pages: Any, type: str, head_dim: int, side: str = "k", *, tokens: Optional[int] = None, mean: Any = None, gain: Any = None
) -> np.ndarray:
    """The vectors of :func:`encode`, in their original frame.

    Args:
        pages: ``uint8[pages, page_bytes]``.
        tokens: rows to return; None = 64 for each page.

    Returns:
        ``float32[tokens, head_dim]``.
    """
    pages = np.ascontiguousarray(pages, dtype=np.uint8)
    if pages.ndim != 2:
        raise InvalidArgument(f"pages have the shape {list(pages.shape)}; expected [pages, page_bytes]")
    rows = np.empty((pages.shape[0] * BLOCK_TOKENS if tokens is None else tokens, head_dim), dtype=np.float32)
    _core.decode(type, side, pages, rows, _vector(mean), _vector(gain))
    return rows


def _vector(values: Any) -> Optional[np.ndarray]:
    return None if values is None else _arrays.vector(values)


def parse_pair(text: str, *others: str) -> str:
    """``turbo4/turbo4`` of a pair's name, or of one type for both keys and values (``turbo4``).

    Raises:
        InvalidArgument: no pair of known types. ``others``: what can be written instead, for the words.
    """
    names = [one.name for one in types()]
    parts = text.split("/") if "/" in text else [text, text]
    if len(parts) != 2 or not set(parts) <= set(names):
        raise InvalidArgument(f'pair "{text}": write {"".join(f"{one}, or " for one in others)}the type of keys and of values such as '
                              f"turbo4/turbo4; types: {', '.join(names)}")
    return "/".join(parts)
