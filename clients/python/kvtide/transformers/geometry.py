"""What a cache has to know of a model's configuration: which layers keep keys and values, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Tuple

_SLIDING = ("sliding_attention", "reference_sliding_attention")


@dataclass(frozen=True)
class LayerKind:
    """One entry of the cache: ``kind`` is full, sliding, chunked, stock (kept by transformers' own layer) or shared (keeps
    nothing). ``window`` in tokens, 0 = all. ``lent``: later layers attend over what this one keeps, after it has grown."""

    kind: str
    window: int = 0
    lent: bool = False
    stock: Any = None


@dataclass(frozen=True)
class LayerShape:
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    query_heads: int


def text_config(model_or_config: Any) -> Any:
    """The configuration of the decoder, of a model or of a configuration (multimodal ones have several)."""
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"expected a transformers model or configuration, got a {type(model_or_config).__name__}")
    return config.get_text_config(decoder=True)


def _configured_types(config: Any) -> Tuple[List[str], List[Dict[str, Any]]]:
    """Types of the layers and what their stock classes take, as this version of transformers derives them."""
    from transformers import cache_utils

    derive = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if derive is not None:
        types, keywords = derive(config)
        if isinstance(keywords, dict):
            keywords = [
                {"sliding_window": _window(config, kind)} if kind in _SLIDING + ("chunked_attention",) else {} for kind in types
            ]
        return list(types), list(keywords)
    types = getattr(config, "layer_types", None)
    if types is None:
        kind = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
            kind = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        types = [kind] * config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    types = list(types)[: len(types) - shared]
    return types, [{"sliding_window": _window(config, kind)} if kind != "full_attention" else {} for kind in types]


def _window(config: Any, kind: str) -> Optional[int]:
    return getattr(config, "attention_chunk_size" if kind == "chunked_attention" else "sliding_window", None)


def layer_kinds(config: Any) -> List[LayerKind]:
    """One kind for each entry of the cache, in the order of the model's layers.

    Raises:
        ValueError: for layers that keep something else than keys and values in a way that no other cache can hold.
    """
    from transformers import cache_utils

    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{config.model_type} keeps one latent vector for each token (multi-head latent attention), not keys and values: "
            "KvtideCache cannot hold it. Use transformers' DynamicCache."
        )
    kinds = []
    mapping = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
    for index, (kind, keywords) in enumerate(zip(*_configured_types(config))):
        window = keywords.get("sliding_window") or 0
        if kind == "full_attention" or (kind in _SLIDING and not window):
            kinds.append(LayerKind("full"))
        elif kind in _SLIDING:
            kinds.append(LayerKind("sliding", int(window)))
        elif kind == "chunked_attention":
            kinds.append(LayerKind("chunked", int(window)))
        elif kind == "dummy":
            kinds.append(LayerKind("shared", stock=mapping[kind](**keywords)))
        elif kind in ("linear_attention", "conv") and kind in mapping:
            kinds.append(LayerKind("stock", stock=mapping[kind](**keywords)))
        else:
            raise ValueError(
                f"layer {index} of {config.model_type} is of type {kind!r}; KvtideCache knows full, sliding and chunked attention, "
                "and leaves linear attention to transformers"
            )
    if any(kind.kind == "shared" for kind in kinds) or getattr(config, "num_kv_shared_layers", 0):
        sliding = [index for index, kind in enumerate(kinds) if kind.kind == "sliding"]
        if sliding:
            kinds[sliding[-1]] = replace(kinds[sliding[-1]], lent=True)
    return kinds


def layer_shapes(config: Any, kinds: List[LayerKind]) -> Optional[List[LayerShape]]:
    """Heads and widths of every layer by the configuration; None where it does not say them plainly. The cache compares them
    with the first tensors that come, and goes by those where they differ."""
    per_layer = getattr(config, "per_layer_config", None)
    shapes = []
    for index in range(len(kinds)):
        one = per_layer[index] if per_layer is not None and index < len(per_layer) else config
        heads = getattr(one, "num_attention_heads", None)
        if not isinstance(heads, int):
            return None
        kv_heads = getattr(one, "num_key_value_heads", None) or heads
        dim = getattr(one, "head_dim", None) or getattr(one, "hidden_size", 0) // heads
        if not isinstance(kv_heads, int) or not isinstance(dim, int) or heads % kv_heads or not dim:
            return None
        shapes.append(LayerShape(kv_heads, dim, dim, heads))
    return shapes
