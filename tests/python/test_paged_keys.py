"""Attention over an engine's pages with calibrated keys, as kvtide/vllm asks for it; needs no engine."""

import numpy as np
import pytest

from kvtide import _core
from kvtide.errors import InvalidArgument

KV_HEADS, HEADS, DIM, TOKENS = 2, 4, 64, 64


def aligned(size):
    memory = np.zeros(size + 128, np.uint8)
    return memory[-memory.ctypes.data % 128:][:size]


class Pages:
    """One layer, a coded page and two exact ones, and one sequence."""

    def __init__(self, pair="tide4/turbo4"):
        self.coded = aligned(_core.paged_page_bytes(pair, KV_HEADS, DIM, DIM))
        self.exact = aligned(2 * _core.paged_page_bytes("f16/f16", KV_HEADS, DIM, DIM))
        self.paged = _core.Paged()
        self.paged.shape(pair, KV_HEADS, DIM, DIM, HEADS)
        self.paged.attend_as(DIM**-0.5, 0, 0, "f32", "f32")
        self.paged.bounds(1, TOKENS, 1, 2, 1)
        self.paged.pages(0, 0, 2, 0)
        self.paged.add_layer(self.coded.ctypes.data, self.exact.ctypes.data)
        self.arrays = {name: np.zeros(2, np.int32) for name in ("query_start", "lengths", "coded_first", "coded_count", "coded", "exact",
                                                                "seal_pages", "seal_count")}

    def make(self):
        self.paged.make(_core.PagedDevice("cpu", 1))

    def step(self, length, tokens, coded, q, k, v, seals=0):
        at = {name: array.ctypes.data for name, array in self.arrays.items()}
        self.arrays["query_start"][:] = 0, tokens
        self.arrays["lengths"][0], self.arrays["coded_count"][0], self.arrays["seal_count"][0] = length, coded, seals
        self.arrays["exact"][:] = (1, 0) if coded else (0, 1)  # the second block lies in page 1
        self.paged.tables(at["query_start"], at["lengths"], at["coded_first"], at["coded_count"], at["coded"], 1, at["exact"], 2, 0,
                          at["seal_pages"], at["seal_count"])
        self.paged.plan(1, tokens, tokens, seals)
        out = np.zeros((tokens, HEADS, DIM), np.float32)
        self.paged.write_attend(0, k.ctypes.data, KV_HEADS * DIM, v.ctypes.data, KV_HEADS * DIM, q.ctypes.data, HEADS * DIM,
                                out.ctypes.data, HEADS * DIM)
        if seals:
            self.paged.seal(0)
        return out


def parts(seed=1, dim=DIM, width=4):
    """Centres, transforms and widths of both heads: a rotation each."""
    random = np.random.default_rng(seed)
    turns = np.stack([np.linalg.qr(random.normal(size=(dim, dim)))[0] for _ in range(KV_HEADS)]).astype(np.float32)
    return (random.normal(size=(KV_HEADS, dim)).astype(np.float32), np.ascontiguousarray(turns),
            np.minimum(np.array([4, 3, 2, 0], np.uint8)[:, None], width).repeat(dim // 8, 1)[None].repeat(KV_HEADS, 0))


def attention(q, k, v):
    out = np.zeros_like(q)
    for h in range(HEADS):
        logits = k[:, h * KV_HEADS // HEADS] @ q[0, h] * DIM**-0.5
        weights = np.exp(logits - logits.max())
        out[0, h] = weights @ v[:, h * KV_HEADS // HEADS] / weights.sum()
    return out


def test_a_sealed_page_is_attended():
    random, pages, (centres, transforms, widths) = np.random.default_rng(2), Pages(), parts()
    pages.paged.transform_keys(centres, transforms, widths)
    pages.make()
    rows = lambda tokens, heads: random.normal(size=(tokens, heads, DIM)).astype(np.float32)  # noqa: E731
    k, v = rows(TOKENS, KV_HEADS) + centres, rows(TOKENS, KV_HEADS)
    pages.step(TOKENS, TOKENS, 0, rows(TOKENS, HEADS), k, v, seals=1)
    pages.exact[:len(pages.exact) // 2] = 0xff  # nobody reads it any more
    q, k1, v1 = rows(1, HEADS), rows(1, KV_HEADS) + centres, rows(1, KV_HEADS)
    out = pages.step(TOKENS + 1, 1, 1, q, k1, v1)
    wanted = attention(q, np.concatenate([k, k1]), np.concatenate([v, v1]))
    assert 1e-4 < np.linalg.norm(out - wanted) / np.linalg.norm(wanted) < 0.25  # four bits of both


def test_transforms_that_do_not_fit_are_refused():
    with pytest.raises(InvalidArgument, match="--keys after-rope"):
        Pages().make()
    pages = Pages()
    with pytest.raises(InvalidArgument, match="another head_dim"):
        pages.paged.transform_keys(parts()[0], parts(dim=128)[1], parts()[2])
    pages.paged.transform_keys(*parts(dim=128))
    with pytest.raises(InvalidArgument, match="another model"):
        pages.make()
    pages = Pages()
    pages.paged.transform_keys(*parts()[:2], parts(width=2)[2] + np.uint8(6))
    with pytest.raises(InvalidArgument, match="a width of 8"):
        pages.make()
