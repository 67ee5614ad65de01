"""The attention "kvtide" of transformers: queries go to the pool, which attends over keys and values where they lie.

Registered when kvtide.transformers is imported. Models call it right after ``cache.update``, which in attend mode returns a
:class:`Handle` in place of tensors; with ordinary tensors (no cache, or a materialising one) it attends over those in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Tuple

import torch

from ..errors import InvalidArgument

if TYPE_CHECKING:
    from .store import Store

NAME = "kvtide"


class Handle:
    """Stands for the keys and the values of one layer; what it adds is stored by the first attention that uses it. Layers that
    share keys and values use the same handle again."""

    def __init__(self, store: "Store", layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.store = store
        self.layer = layer
        self.start = start
        self.k: Optional[torch.Tensor] = k
        self.v: Optional[torch.Tensor] = v
        self.shape, self.dtype, self.device = k.shape, k.dtype, k.device

    def to(self, *args: Any, **kwargs: Any) -> "Handle":
        """Models move shared keys to the device of a layer; the pool has them already."""
        return self

    def attend(self, q: torch.Tensor, mask: Optional[torch.Tensor], options: dict) -> torch.Tensor:
        """q [batch, query_heads, n, head_dim] are the queries of the new tokens, or of the last of them: models may leave those
        of a prompt out in layers that share the keys of earlier ones."""
        store, tokens, queries = self.store, self.shape[2], q.shape[2]
        if queries > tokens:
            raise InvalidArgument(f"layer {self.layer}: {queries} queries for {tokens} new tokens")
        store.note_mask(self.start, tokens, mask)
        if store.model is None:  # the first forward, while shapes are learned: over its own tokens
            store.query_heads[self.layer] = q.shape[1]
            return local(q, self.k, self.v, mask, **options)
        k, v, self.k, self.v = self.k, self.v, None, None
        if k is not None and queries < tokens:
            store.append(self.layer, k, v, self.start)
            k = v = None
        return store.append_attend(self.layer, self.start + tokens - queries, q, k, v, options)


def attention(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: Optional[torch.Tensor],
    scaling: Optional[float] = None,
    dropout: float = 0.0,
    sliding_window: Optional[int] = None,
    softcap: Optional[float] = None,
    **kwargs: Any,
) -> Tuple[torch.Tensor, None]:
    """transformers' attention function: query [batch, query_heads, n, head_dim] -> [batch, n, query_heads, head_dim_v]."""
    attention_mask = _padding(attention_mask)
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False and query.shape[2] > 1:
        raise InvalidArgument(f'the attention "{NAME}" attends causally; this model wants otherwise')
    if dropout:
        raise InvalidArgument(f'the attention "{NAME}" is for inference: dropout is {dropout}')
    sinks = kwargs.get("s_aux")
    options = {
        "scale": scaling if scaling is not None else query.shape[-1] ** -0.5,
        "window": sliding_window or None,
        "softcap": softcap or None,
        "sinks": None if sinks is None else sinks.detach().float().cpu().numpy(),
    }
    if isinstance(key, Handle):
        return key.attend(query, attention_mask, options), None
    return local(query, key, value, attention_mask, **options), None


def local(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Optional[torch.Tensor],
    scale: float,
    window: Optional[int],
    softcap: Optional[float],
    sinks: Any,
) -> torch.Tensor:
    """Causal attention over tensors in torch; the queries belong to the last keys. Padding gets zeros."""
    queries, tokens = q.shape[2], k.shape[2]
    place = torch.arange(tokens, device=q.device)
    position = torch.arange(tokens - queries, tokens, device=q.device)[:, None]
    seen = place <= position
    if window:
        seen = seen & (place > position - window)
    seen = seen[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None, -tokens:].to(q.device).bool()
    if softcap is None and sinks is None:
        repeated = q.shape[1] // k.shape[1]
        if repeated > 1:
            k, v = k.repeat_interleave(repeated, dim=1), v.repeat_interleave(repeated, dim=1)
        # A query that sees nothing looks at itself; its output is not used.
        safe = seen | (place == position)[None, None]
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=safe, scale=scale)
        return output.transpose(1, 2).contiguous()
    repeated = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeated, dim=1), v.repeat_interleave(repeated, dim=1)
    logits = torch.matmul(q.float(), k.float().transpose(2, 3)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~(seen | (place == position)[None, None]), float("-inf"))
    if sinks is not None:
        extra = torch.as_tensor(sinks, device=q.device, dtype=logits.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, queries, 1)
        weights = torch.cat([logits, extra], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    return torch.matmul(weights, v.float()).to(q.dtype).transpose(1, 2).contiguous()


def mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Optional[torch.Tensor] = None,
    cache_position: Optional[torch.Tensor] = None,
    **kwargs: Any,
) -> Optional[torch.Tensor]:
    """transformers' mask function: padding as bool [batch, 1, q_length, kv_length], the same for every query and without memory
    for each, or None when there is none. Which earlier tokens a query sees follows from positions and the layer's window; a
    model that wants anything else is refused here."""
    positions = cache_position if cache_position is not None else q_length  # older versions pass these
    if isinstance(positions, torch.Tensor) and positions.ndim:
        q_offset, q_length = positions[0], positions.shape[0]
    _check_causal(mask_function, int(q_length), int(q_offset), kwargs.get("config"))
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, -kv_length:].bool()
    if bool(attention_mask.all()):
        return None
    return attention_mask[:, None, None, :].expand(-1, 1, int(q_length), -1)


def _padding(attention_mask: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """What `mask` said, as [batch, kv_length]. Other masks are refused."""
    if attention_mask is None or (attention_mask.ndim == 2 and attention_mask.dtype == torch.bool):
        return attention_mask
    if attention_mask.ndim == 4 and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1:
        last = attention_mask[:, :, -1:, :]
        if attention_mask.stride(2) == 0 or torch.equal(last.expand_as(attention_mask), attention_mask):
            return last[:, 0, 0, :]
    raise InvalidArgument(
        f'the attention "{NAME}" attends causally and takes masks of padding only, not {attention_mask.dtype} '
        f'{list(attention_mask.shape)}. Use another attention, and KvtideCache(mode="materialise")'
    )


def _check_causal(function: Any, queries: int, offset: int, config: Any) -> None:
    """Looks at the diagonal, its neighbours, both ends of the window and the first token for every query."""
    if function is None:
        return
    q = torch.arange(offset, offset + queries)
    window = getattr(config, "sliding_window", None) or 0
    distances = [-1, 0, 1] + ([window - 1, window] if window else [])
    columns = [q - distance for distance in distances] + [torch.zeros_like(q)]
    rows = torch.cat([q] * len(columns))
    places = torch.cat(columns)
    inside = (places >= 0) & (rows >= 0)
    rows, places = rows[inside], places[inside]
    zero = torch.zeros_like(rows)
    seen = torch.as_tensor(function(zero, zero, rows, places)).expand(rows.shape)
    causal = places <= rows
    if torch.equal(seen, causal) or (window and torch.equal(seen, causal & (places > rows - window))):
        return
    raise InvalidArgument(
        f'the attention "{NAME}" knows causal masks and sliding windows; this model asks for another one. '
        'Use another attention, and KvtideCache(mode="materialise")'
    )


def register() -> None:
    """Makes the attention and its masks known to transformers under the name "kvtide"."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
