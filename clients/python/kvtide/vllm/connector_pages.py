"""vLLM's pages as rows of tokens, whatever backend wrote them.

Backends order what is in a page as their kernels like it: heads before tokens or after, K beside V or before it, keys transposed
(vLLM's CPU backend), packed for matrix units. Nothing declares it, so it is learned: the backend itself writes numbers that say
which value they are into the null block, and where they arrive is the order. What comes out is a permutation, or the pages are
treated as bytes that nobody here understands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence, Tuple

import torch

_DIGIT_BITS = 7  # numbers below 128 are exact in every type of a cache


@dataclass(frozen=True)
class PageOrder:
    """Where the values of a page lie.

    Attributes:
        tokens, heads, head_dim: of a page.
        index: [2, tokens, heads, head_dim]: place in the page's values, taken in the order of its view.
        strides: of K and of V as (first, token, head, dim) in elements of the page's memory, if they are even.
    """

    tokens: int
    heads: int
    head_dim: int
    index: torch.Tensor
    strides: Optional[Tuple[Tuple[int, int, int, int], ...]]


def learn(layer: Any, cache: torch.Tensor) -> Optional[PageOrder]:
    """The order in which the layer's backend writes block 0 of ``cache`` ([blocks, heads, tokens, content]); None if it is no
    permutation of keys and values. Block 0 is vLLM's null block; its content is put back."""
    write = getattr(layer.impl, "do_kv_cache_update", None)
    if write is None or cache.dim() != 4 or cache.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    _, heads, tokens, content = cache.shape
    if content % 2:
        return None
    dim, device = content // 2, cache.device
    before = cache[0].clone()
    values = torch.arange(2 * tokens * heads * dim, device=device).view(2, tokens, heads, dim)
    slots = torch.arange(tokens, device=device)
    arrived = torch.zeros(values.numel(), dtype=torch.int64, device=device)
    try:
        for shift in range(0, values.numel().bit_length(), _DIGIT_BITS):
            digit = ((values >> shift) & ((1 << _DIGIT_BITS) - 1)).to(cache.dtype)
            write(layer, digit[0], digit[1], cache, slots)
            arrived += cache[0].reshape(-1).to(torch.int64) << shift
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
        return None
    finally:
        cache[0].copy_(before)
    index = torch.full((values.numel(),), -1, dtype=torch.int64, device=device)
    if int(arrived.min()) < 0 or int(arrived.max()) >= values.numel():
        return None
    index[arrived] = torch.arange(values.numel(), device=device)
    if int(index.min()) < 0:
        return None
    index = index.view(2, tokens, heads, dim)
    return PageOrder(tokens, heads, dim, index, _even(index, cache))


def _even(index: torch.Tensor, cache: torch.Tensor) -> Optional[Tuple[Tuple[int, int, int, int], ...]]:
    """Strides in the page's memory, if K and V each have them."""
    _, heads, tokens, content = cache.shape
    _, by_head, by_token, by_value = cache.stride()
    place = (index // (tokens * content)) * by_head + (index // content % tokens) * by_token + (index % content) * by_value
    out = []
    for side in place:
        steps = [int(side.select(axis, 1).flatten()[0] - side.flatten()[0]) if side.shape[axis] > 1 else 0 for axis in range(3)]
        even = int(side.flatten()[0])
        for axis, step in enumerate(steps):
            shape = [1, 1, 1]
            shape[axis] = side.shape[axis]
            even = even + (torch.arange(side.shape[axis], device=side.device) * step).view(shape)
        if not torch.equal(even, side):
            return None
        out.append((int(side.flatten()[0]), *steps))
    return tuple(out)


class Pages:
    """Reads and writes chunks of the pages of all layers.

    Payload: tensors ``[chunks, layers, 2, chunk tokens, heads, head_dim]`` in the cache's dtype, or bytes
    ``[chunks, layers, bytes of a chunk's pages]``.

    Args:
        caches: of each layer, ``[pages, ...]`` with the blocks first.
        blocks: vLLM's blocks; a block is ``pages / blocks`` pages that follow each other.
        order: how rows lie in a page; None = bytes.
    """

    def __init__(self, caches: Sequence[torch.Tensor], blocks: int, chunk_blocks: int, order: Optional[PageOrder]) -> None:
        self.caches, self.order, self.chunk_blocks = list(caches), order, chunk_blocks
        self.split = caches[0].shape[0] // blocks
        self.pages_per_chunk = chunk_blocks * self.split
        first = caches[0]
        self.dtype = first.dtype if order is not None else torch.uint8
        if order is not None:
            self.shape: Tuple[int, ...] = (len(caches), 2, self.pages_per_chunk * order.tokens, order.heads, order.head_dim)
            self.bytes = torch.Size(self.shape).numel() * first.element_size()
        else:
            sizes = {cache[0].numel() * cache.element_size() for cache in caches}
            self.page_bytes = max(sizes)
            if len(sizes) != 1:
                raise ValueError(f"layers have pages of different sizes: {sorted(sizes)}")
            self.shape = (len(caches), self.pages_per_chunk * self.page_bytes)
            self.bytes = len(caches) * self.pages_per_chunk * self.page_bytes

    def will_be_read(self, blocks: Sequence[int]) -> None:
        """On the engine's thread, before the event behind which ``read`` of these full blocks begins."""

    def will_be_written(self, blocks: Sequence[int]) -> None:
        """On the engine's thread, before the event behind which ``write`` of these blocks begins."""

    def pages_of(self, blocks: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(blocks, dtype=torch.int64)
        if self.split > 1:
            ids = (ids[:, None] * self.split + torch.arange(self.split)).flatten()
        return ids.to(self.caches[0].device)

    def sides(self, cache: torch.Tensor) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        """K and V as [pages, tokens, heads, head_dim] without a copy, if the order is even."""
        if self.order is None or self.order.strides is None:
            return None
        order, views = self.order, []
        for first, *steps in order.strides:
            views.append(cache.as_strided((cache.shape[0], order.tokens, order.heads, order.head_dim), (cache.stride(0), *steps),
                                          cache.storage_offset() + first))
        return views[0], views[1]

    def read(self, blocks: Sequence[int], out: torch.Tensor) -> None:
        """Chunks of these blocks into ``out`` [chunks, *shape], on the caches' device or the host."""
        ids = self.pages_of(blocks)
        chunks = len(blocks) // self.chunk_blocks
        for layer, cache in enumerate(self.caches):
            if self.order is None:
                page = cache[ids].reshape(len(ids), -1).contiguous().view(torch.uint8)
                out[:, layer].copy_(page.reshape(chunks, -1))
                continue
            order, sides = self.order, self.sides(cache)
            into = out[:, layer].unflatten(2, (self.pages_per_chunk, order.tokens))  # [chunks, 2, pages, tokens, heads, dim]
            if sides is not None:
                for side in range(2):
                    into[:, side].copy_(sides[side][ids].unflatten(0, (chunks, self.pages_per_chunk)))
            else:
                page = cache[ids].reshape(len(ids), -1)
                for side in range(2):
                    into[:, side].copy_(page[:, order.index[side]].unflatten(0, (chunks, self.pages_per_chunk)))

    def write(self, payload: torch.Tensor, blocks: Sequence[int], skip: int = 0) -> None:
        """Blocks from chunks: those of the payload from its block ``skip`` on, as many as there are ids."""
        ids = self.pages_of(blocks)
        first = skip * self.split
        span = slice(first, first + len(ids))
        for layer, cache in enumerate(self.caches):
            if self.order is None:
                page = payload[:, layer].reshape(-1, self.page_bytes)[span].to(cache.device)
                cache[ids] = page.contiguous().view(cache.dtype).reshape(len(ids), *cache.shape[1:])
                continue
            order, sides = self.order, self.sides(cache)
            rows = payload[:, layer].unflatten(2, (self.pages_per_chunk, order.tokens))
            parts = [rows[:, side].flatten(0, 1)[span].to(cache.device) for side in range(2)]  # [pages, tokens, heads, dim]
            if sides is not None:
                for view, part in zip(sides, parts):
                    view[ids] = part
            else:
                page = torch.empty((len(ids), order.index.numel()), dtype=cache.dtype, device=cache.device)
                for side in range(2):
                    page[:, order.index[side].flatten()] = parts[side].flatten(1)
                cache[ids] = page.view(len(ids), *cache.shape[1:])


class OwnPages(Pages):
    """Those of kvtide's attention backend, coded: they travel as they are, ``[chunks, layers, bytes of a page]``.

    Args:
        caches: of each layer that has pages.
        parts: the backend's, asked when they are needed: vLLM makes them after the connector.
    """

    def __init__(self, caches: Sequence[torch.Tensor], blocks: int, parts: Callable[[], Sequence[Any]]) -> None:
        super().__init__(caches, blocks, 1, None)
        self.parts = parts

    def will_be_read(self, blocks: Sequence[int]) -> None:
        for part in self.parts():
            part.will_be_read(blocks)

    def will_be_written(self, blocks: Sequence[int]) -> None:
        for part in self.parts():
            part.will_be_written(blocks)
