"""KV events: what a daemon holds, as vLLM publishes it (``--kv-events-config``).

A chunk is told as the blocks of vLLM that it has, with their tokens and vLLM's own hashes, so that a router joins them to those that it
knows from the GPU. ``medium`` is ``CPU`` for memory of the daemon and ``STORAGE`` for what lies deeper.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Iterable, List, Optional, Sequence, Tuple

from vllm.distributed import kv_events
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

from ..block_watch import Change, runs

OWNER = "kvtide"


def wanted(config: Any) -> bool:
    """Whether vLLM publishes events."""
    events = getattr(config, "kv_events_config", None)
    return bool(events is not None and events.enable_kv_cache_events)


def in_memory(tier: str) -> bool:
    """Tiers of the daemon that are memory of its host or its devices."""
    return tier not in ("disk", "remote")


@dataclass(frozen=True)
class ChunkOf:
    """What is said of a chunk; ``hashes`` of its blocks, ``parent`` of the block before it."""

    hashes: Tuple[bytes, ...]
    parent: Optional[bytes]
    tokens: array
    lora_id: Optional[int]
    lora_name: Optional[str]
    extra_keys: Tuple[Optional[Tuple[Any, ...]], ...]


class EventMaker:
    """Args:
        block_tokens: of vLLM's blocks.
        hash_tokens: that one of vLLM's hashes stands for.
        spec: of the layers, vLLM's.
        here: the daemon is on this host.
    """

    def __init__(self, block_tokens: int, hash_tokens: int, spec: Any, here: bool) -> None:
        self.block_tokens, self.hash_tokens, self.here = block_tokens, hash_tokens, here
        self.kind, self.window = get_kv_cache_spec_kind(spec).value, get_kv_cache_spec_sliding_window(spec)

    def describe(self, request: Any, first: int, end: int) -> ChunkOf:
        """Tokens [first, end) of a request."""
        ends = range(first + self.block_tokens, end + 1, self.block_tokens)
        keys = [kv_cache_utils.generate_block_hash_extra_keys(request, at - self.block_tokens, at, 0)[0] for at in ends]
        lora = request.lora_request
        return ChunkOf(tuple(request.block_hashes[at // self.hash_tokens - 1] for at in ends),
                       request.block_hashes[first // self.hash_tokens - 1] if first else None, array("I", request.all_token_ids[first:end]),
                       lora.adapter_id if lora else None, lora.name if lora else None, tuple(keys) if any(keys) else ())

    def events(self, changes: Sequence[Change]) -> List[Any]:
        """Chunks that follow one another are one event."""
        return [self._removed(run) if run[0].removed else self._stored(run) for run in runs(changes, _follows)]

    def _removed(self, run: Sequence[Change]) -> Any:
        return kv_events.BlockRemoved(block_hashes=_outside(hash for one in run for hash in one.what.hashes),
                                      **self._known(kv_events.BlockRemoved, run[0].tier))

    def _stored(self, run: Sequence[Change]) -> Any:
        first = run[0].what
        keys = [keys for one in run for keys in one.what.extra_keys or (None,) * len(one.what.hashes)]
        if hasattr(kv_cache_utils, "to_event_extra_keys"):
            keys = kv_cache_utils.to_event_extra_keys(keys)
        return kv_events.BlockStored(
            block_hashes=_outside(hash for one in run for hash in one.what.hashes),
            parent_block_hash=_outside([first.parent])[0] if first.parent is not None else None,
            token_ids=[token for one in run for token in one.what.tokens], block_size=self.block_tokens, lora_id=first.lora_id,
            lora_name=first.lora_name, extra_keys=keys, kv_cache_spec_kind=self.kind, kv_cache_spec_sliding_window=self.window,
            **self._known(kv_events.BlockStored, run[0].tier))

    def _known(self, event: Any, tier: str) -> dict:
        """Where blocks are, in the fields that this release of vLLM has."""
        said = {"medium": kv_events.MEDIUM_CPU if in_memory(tier) else getattr(kv_events, "MEDIUM_STORAGE", "STORAGE"), "group_idx": 0,
                "locality": "LOCAL" if self.here and tier != "remote" else "REMOTE", "ownership": OWNER}
        return {name: value for name, value in said.items() if name in event.__struct_fields__}


def _follows(before: Change, after: Change) -> bool:
    return after.removed or (after.what.parent == before.what.hashes[-1] and after.what.lora_name == before.what.lora_name)


def _outside(hashes: Iterable[bytes]) -> List[Any]:
    """As vLLM publishes them: bytes, or integers if it is told so."""
    return [kv_cache_utils.maybe_convert_block_hash(one) for one in hashes]
