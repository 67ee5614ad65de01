"""vLLM's pages as rows of tokens, whatever backend wrote them.

Backends order what is in a page as their kernels like it: heads before tokens or after, K beside V or before it, keys transposed
(vLLM's CPU backend), packed for matrix units. Nothing declares it, so it is learned: the backend itself writes numbers that say
which value they are into the null block, and where they arrive is the order. What comes out is a permutation, or the pages are
treated as bytes that nobody here understands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch

from .. import _core
from .settings import BLOCK_TOKENS

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
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


def side_by_side(cache: torch.Tensor) -> bool:
    """Whether the bytes of a page fill one piece of memory, in whatever order."""
    filled = 1
    for step, size in sorted((step, size) for step, size in zip(cache.stride()[1:], cache.shape[1:]) if size > 1):
        if step != filled:
            return False
        filled *= size
    return True


@dataclass(frozen=True)
class Copiers:
    """Compiled code that moves all layers of many blocks at once (``kernels/page_copier.h``): one for each of the worker's
    threads."""

    saving: Any
    loading: Any


class Pages:
    """Reads and writes chunks of the pages of all layers.

    Payload: tensors ``[chunks, layers, 2, chunk tokens, heads, head_dim]`` in the cache's dtype, or bytes
    ``[chunks, layers, bytes of a chunk's pages]``; with copiers of rows, blocks as they rest, ``[chunks, bytes]``.

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
            self.parts: Tuple[int, ...] = (len(caches), 2, self.pages_per_chunk, order.tokens, order.heads, order.head_dim)
            self.bytes = torch.Size(self.shape).numel() * first.element_size()
        else:
            sizes = {cache[0].numel() * cache.element_size() for cache in caches}
            self.page_bytes = max(sizes)
            if len(sizes) != 1:
                raise ValueError(f"layers have pages of different sizes: {sorted(sizes)}")
            self.shape = (len(caches), self.pages_per_chunk * self.page_bytes)
            self.parts = (len(caches), 1, self.pages_per_chunk, self.page_bytes)
            self.bytes = len(caches) * self.pages_per_chunk * self.page_bytes
        self.raw_bytes = self.bytes
        self.copiers: Optional[Copiers] = None
        views = [self._views(cache) for cache in caches]
        self.views: Optional[List[Tuple[torch.Tensor, ...]]] = None if None in views else views

    def _views(self, cache: torch.Tensor) -> Optional[Tuple[torch.Tensor, ...]]:
        """Of a layer: K and V as [pages, tokens, heads, head_dim], or its bytes as [pages, bytes], without a copy; None if they do
        not lie so."""
        order = self.order
        if order is None:
            if not side_by_side(cache):
                return None
            size = (cache.shape[0], cache[0].numel())
            return (cache.as_strided(size, (cache.stride(0), 1), cache.storage_offset()).view(torch.uint8),)
        if order.strides is None:
            return None
        size = (cache.shape[0], order.tokens, order.heads, order.head_dim)
        return tuple(cache.as_strided(size, (cache.stride(0), *steps), cache.storage_offset() + first)
                     for first, *steps in order.strides)

    def will_be_read(self, blocks: Sequence[int]) -> None:
        """On the engine's thread, before the event behind which ``read`` of these full blocks begins."""

    def will_be_written(self, blocks: Sequence[int]) -> None:
        """On the engine's thread, before the event behind which ``write`` of these blocks begins."""

    def use_copiers(self, device: Any, piece_bytes: int, pair: str = "") -> bool:
        """Moves pages with compiled code from now on, in pieces of at most ``piece_bytes`` (or one chunk): rows are coded in
        ``pair`` on the way, and a payload is blocks as they rest. False if the pages do not lie so that it could.

        Args:
            device: ``_core.PagedDevice`` of the caches.
        """
        cache, order = self.caches[0], self.order
        if self.views is None or len({(one.shape[0], one.stride(0)) for one in self.caches}) != 1:
            return False
        layers, element = [one.data_ptr() for one in self.caches], cache.element_size()
        common = (device, layers, cache.stride(0) * element, cache.shape[0], self.pages_per_chunk)
        if order is None:
            def make() -> Any:
                return _core.PageCopier.of_bytes(*common, max(piece_bytes, self.bytes), self.page_bytes)
        else:
            tokens = self.pages_per_chunk * order.tokens
            if tokens % BLOCK_TOKENS or order.strides is None or cache.dtype not in _TYPES:
                return False
            chunk = len(layers) * tokens // BLOCK_TOKENS * _core.paged_page_bytes(pair, order.heads, order.head_dim, order.head_dim)
            k, v = (list(side) for side in order.strides)

            def make() -> Any:
                return _core.PageCopier.of_rows(*common, max(piece_bytes, chunk), _TYPES[cache.dtype], order.tokens, order.heads,
                                                order.head_dim, k, v, pair)
        self.copiers = Copiers(make(), make())
        self.bytes = self.copiers.saving.chunk_bytes
        self.shape, self.dtype = (self.bytes,), torch.uint8
        return True

    def ids(self, blocks: Sequence[int]) -> np.ndarray:
        """Numbers of the blocks' pages."""
        first = np.asarray(blocks, np.int32)[:, None] * self.split
        return (first + np.arange(self.split, dtype=np.int32)).reshape(-1)

    def pages_of(self, blocks: Sequence[int]) -> List[int]:
        return [block * self.split + part for block in blocks for part in range(self.split)]

    def _pairs(self, payload: torch.Tensor, pages: Sequence[int], first: int) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Parts of the payload from its page ``first`` on, and what belongs to them in the caches. Lists of views, so that one call
        copies all: a thread that comes back from each layer's call waits for the engine's each time."""
        parts, here, there = payload.view(-1, *self.parts), [], []
        for layer, views in enumerate(self.views or ()):
            for i, page in enumerate(pages, first):
                chunk, at = divmod(i, self.pages_per_chunk)
                for side, view in enumerate(views):
                    here.append(parts[chunk, layer, side, at])
                    there.append(view[page])
        return here, there

    def read(self, blocks: Sequence[int], out: torch.Tensor) -> None:
        """Chunks of these blocks into ``out`` [chunks, *shape], on the caches' device or the host; with copiers on the host."""
        if self.copiers is not None:
            self.copiers.saving.read(0, self.ids(blocks), out.numpy())
            return self.copiers.saving.wait(0)
        pages = self.pages_of(blocks)
        if self.views is not None:
            here, there = self._pairs(out, pages, 0)
            torch._foreach_copy_(here, there)
            return
        ids, parts = torch.tensor(pages, device=self.caches[0].device), out.view(-1, *self.parts)
        for layer, cache in enumerate(self.caches):
            into = parts[:, layer]
            if self.order is None:
                into.copy_(cache[ids].reshape(len(ids), -1).contiguous().view(torch.uint8).view(into.shape))
                continue
            page = cache[ids].reshape(len(ids), -1)
            for side in range(2):
                into[:, side].copy_(page[:, self.order.index[side]].view(into[:, side].shape))

    def write(self, payload: torch.Tensor, blocks: Sequence[int], skip: int = 0) -> None:
        """Blocks from chunks: those of the payload from its block ``skip`` on, as many as there are ids."""
        if self.copiers is not None:
            self.copiers.loading.write(0, payload.numpy(), skip * self.split, self.ids(blocks))
            return self.copiers.loading.wait(0)
        pages, first = self.pages_of(blocks), skip * self.split
        if self.views is not None:
            here, there = self._pairs(payload, pages, first)
            torch._foreach_copy_(there, here)
            return
        ids, parts, span = torch.tensor(pages, device=self.caches[0].device), payload.view(-1, *self.parts), slice(first, first + len(pages))
        for layer, cache in enumerate(self.caches):
            rows = [parts[:, layer, side].flatten(0, 1)[span].to(cache.device) for side in range(self.parts[1])]
            if self.order is None:
                cache[ids] = rows[0].contiguous().view(cache.dtype).reshape(len(ids), *cache.shape[1:])
                continue
            page = torch.empty((len(ids), self.order.index.numel()), dtype=cache.dtype, device=cache.device)
            for side in range(2):
                page[:, self.order.index[side].flatten()] = rows[side].flatten(1)
            cache[ids] = page.view(len(ids), *cache.shape[1:])


class OwnPages(Pages):
    """Those of kvtide's attention backend, coded: they travel as they are, ``[chunks, layers, bytes of a page]``.

    Args:
        caches: of each layer that has pages.
        parts: the backend's, asked when they are needed: vLLM makes them after the connector.
    """

    def __init__(self, caches: Sequence[torch.Tensor], blocks: int, parts: Callable[[], Sequence[Any]]) -> None:
        super().__init__(caches, blocks, 1, None)
        self.backends = parts

    def will_be_read(self, blocks: Sequence[int]) -> None:
        for part in self.backends():
            part.will_be_read(blocks)

    def will_be_written(self, blocks: Sequence[int]) -> None:
        for part in self.backends():
            part.will_be_written(blocks)
