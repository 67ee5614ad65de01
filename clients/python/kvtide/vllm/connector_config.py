"""What a user chooses for the connector, and what names the keys and values of a model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, List, Mapping

from ..fingerprint import name_of, weights_of
from ..store_settings import StoreSettings
from .settings import BLOCK_TOKENS


@dataclass(frozen=True)
class ConnectorSettings(StoreSettings):
    """Keys of ``kv_connector_extra_config``. With kvtide's own pages the pair is theirs.

    Attributes:
        lookup_timeout: seconds that the scheduler waits for an answer.
        piece_mib: also of the memory that is pinned and taken on the GPU: four pieces of each.
        event_seconds: where KV events are published, from one round of asking which blocks are still there to the next.
    """

    timeout: float = 30.0
    piece_mib: int = 32
    lookup_timeout: float = 1.0
    event_seconds: float = 5.0

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> "ConnectorSettings":
        return cls.make(extra, "kv_connector_extra_config")


def refusals(config: Any) -> List[str]:
    """Why blocks of this vLLM cannot rest in a daemon, each with what to change. The engine runs without, it does not fail."""
    out = []
    parallel, cache = config.parallel_config, config.cache_config
    if not cache.enable_prefix_caching:
        out.append("prefix caching is off: blocks have no names; leave --no-enable-prefix-caching out")
    for name, what in (("decode_context_parallel_size", "--decode-context-parallel-size"),
                       ("prefill_context_parallel_size", "--prefill-context-parallel-size")):
        if getattr(parallel, name, 1) > 1:
            out.append(f"{what}: blocks are split over ranks; leave it out")
    return out


def chunk_tokens(block_tokens: int) -> int:
    """Tokens that rest under one key: whole blocks of both."""
    if BLOCK_TOKENS % block_tokens == 0:
        return BLOCK_TOKENS
    if block_tokens % BLOCK_TOKENS == 0:
        return block_tokens
    # 16 x odd: their common multiple would be large; a chunk is a block, and its last 64 tokens are not full.
    return block_tokens


def fingerprint(config: Any, layers: List[str], hash_tokens: int, rank: tuple, size: tuple) -> str:
    """Names what computes the blocks: differs whenever keys and values, or the meaning of a hash, would. The seed of the hashes
    is not part of it: with another one no key is the same.

    Args:
        layers: names of the rank's layers.
        rank, size: (pipeline, tensor) parallel.
    """
    model = config.model_config
    said = {
        "weights": weights_of(model.model, str(getattr(model.hf_config, "_commit_hash", None) or model.revision)),
        "config": _plain(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "adapters": bool(config.lora_config),
        "layers": layers,
        "hash": [config.cache_config.prefix_caching_hash_algo, hash_tokens],
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return f"{name_of(model.model)} {digest} {str(model.dtype).replace('torch.', '')} pp{rank[0]}/{size[0]} tp{rank[1]}/{size[1]}"


def _plain(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what says where the files were and who read them."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version", "_commit_hash")}
