"""Attention by the book, in float64."""
import numpy as np


def attend(q, k, v, first=None, scale=None, causal=True, window=0, softcap=0.0, sinks=None):
    """q [queries, query_heads, dim], k [tokens, kv_heads, dim], v [tokens, kv_heads, dim_v] -> output, lse."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    queries, heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    first = tokens - queries if first is None else first
    k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
    logits = np.einsum("qhd,thd->qht", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    position, place = first + np.arange(queries)[:, None], np.arange(tokens)[None, :]
    seen = np.ones((queries, tokens), dtype=bool)
    if causal:
        seen &= place <= position
    if window:
        seen &= place > position - window
    logits = np.where(seen[:, None, :], logits, -np.inf)
    if sinks is not None:
        extra = np.broadcast_to(np.asarray(sinks, dtype=np.float64)[None, :, None], (queries, heads, 1))
        logits = np.concatenate([logits, extra], axis=2)
        v = np.concatenate([v, np.zeros((1,) + v.shape[1:])])
    top = logits.max(axis=2, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=2, keepdims=True)
    return np.einsum("qht,thd->qhd", weights / total, v), (top + np.log(total))[:, :, 0]
