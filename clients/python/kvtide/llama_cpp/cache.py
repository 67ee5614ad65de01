"""A prompt cache for llama-cpp-python whose states lie compressed in a pool."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from typing import Any, List, Optional, Sequence as SequenceOf, Tuple

import numpy as np

from ..errors import InvalidArgument, KvtideError, ResourceExhausted, Unimplemented
from ..pool import Pool, Sequence, connect
from .geometry import ModelShape
from .rows import load_rows, store_rows
from .state import State, parse_state

_BLOCK = 64


@dataclass(eq=False)
class _Entry:
    tokens: np.ndarray  # int32, that the state has
    state: State
    sequences: List[Sequence]
    value: Any  # the LlamaState without its large parts

    def close(self) -> None:
        for sequence in self.sequences:
            try:
                sequence.close()
            except KvtideError:
                pass  # the pool has gone, and the sequence with it


def _common(a: np.ndarray, b: np.ndarray) -> int:
    count = min(len(a), len(b))
    different = np.flatnonzero(a[:count] != b[:count])
    return int(different[0]) if len(different) else count


class KvtideCache:
    """``llama.set_cache(KvtideCache(llama))``: llama-cpp-python looks up the longest stored prefix of each prompt, and stores
    what it has computed afterwards.

    Keys and values of a state are taken apart and kept in the pool under ``pair``; a conversation that grows shares the blocks
    of what came before. With ``pair="f16/f16"`` a state comes back to the byte. When the pool is full, the entry that was used
    longest ago goes; when its daemon has gone, lookups miss, with a warning: a cache never stops a completion.

    The state's logits are not kept: llama-cpp-python computes those of the last token again. ``scores=True`` keeps them in this
    process, uncompressed, for models loaded with ``logits_all=True`` whose prompts are echoed with log-probabilities.

    Args:
        model: the ``llama_cpp.Llama`` (or the path of its GGUF file). Its cache types have to be f16 (the default) or f32:
            ``Unimplemented`` otherwise.
        pool: where to keep the states; None = ``kvtide.connect()``.
        pair: K and V type, such as ``"q8_0/turbo4"``; None = the pool's default.
        capacity_bytes: most bytes of this cache in the pool; None = what the pool has room for.
        scores: keep logits too.
        options: of :meth:`kvtide.Pool.create`, such as ``exact_window`` and ``tenant``.
    """

    def __init__(self, model: Any, *, pool: Optional[Pool] = None, pair: Optional[str] = None,
                 capacity_bytes: Optional[int] = None, scores: bool = False, **options: Any) -> None:
        self._shape = ModelShape.of(model)
        parameters = getattr(model, "context_params", None)
        for name in ("type_k", "type_v"):
            if parameters is not None and getattr(parameters, name) not in (0, 1):
                raise Unimplemented(f"the model was loaded with {name}={getattr(parameters, name)}; only f16 and f32 caches are "
                                    "taken, since llama.cpp rotates the rows of quantised ones: leave it out and let the pair "
                                    "of the pool compress them")
        self.pool = connect() if pool is None else pool
        self._owned = pool is None
        self.capacity_bytes = capacity_bytes
        self._settings = dict(options)
        if pair is not None:
            self._settings["pair"] = pair
        self._keep_scores = scores
        self._entries: List[_Entry] = []  # the one used last at the end
        self._lock = threading.Lock()

    # llama-cpp-python asks `if self.cache:`, so that it must not look empty.
    def __bool__(self) -> bool:
        return True

    @property
    def entries(self) -> int:
        """States that are stored."""
        return len(self._entries)

    @property
    def cache_size(self) -> int:
        """Bytes of the states in the pool; blocks that states share count for each."""
        with self._lock:
            return self._size()

    def _size(self) -> int:
        mine = {sequence.id for entry in self._entries for sequence in entry.sequences}
        return sum(info.bytes for info in self.pool.sequences() if info.id in mine) if mine else 0

    def clear(self) -> None:
        """Forgets all states."""
        with self._lock:
            while self._entries:
                self._entries.pop().close()

    def close(self) -> None:
        """Forgets all states, and closes the pool that was opened for them."""
        self.clear()
        if self._owned:
            self.pool.close()

    def __enter__(self) -> "KvtideCache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _find(self, key: SequenceOf[int]) -> Tuple[Optional[_Entry], int]:
        tokens = np.asarray(key, np.int32)
        best, length = None, 0
        for entry in self._entries:
            common = _common(entry.tokens, tokens)
            if common > length:
                best, length = entry, common
        return best, length

    def __contains__(self, key: SequenceOf[int]) -> bool:
        with self._lock:
            return self._find(key)[0] is not None

    def __getitem__(self, key: SequenceOf[int]) -> Any:
        """The state that shares the longest prefix with the tokens; KeyError if none shares any."""
        with self._lock:
            while True:
                entry, _ = self._find(key)
                if entry is None:
                    raise KeyError("no state begins like these tokens")
                try:
                    data = load_rows(entry.state, entry.sequences)
                except KvtideError as error:
                    warnings.warn(f"a stored state is lost: {error}", RuntimeWarning, stacklevel=2)
                    self._entries.remove(entry)
                    entry.close()
                    continue
                self._entries.remove(entry)
                self._entries.append(entry)
                old = entry.value
                return type(old)(input_ids=old.input_ids, scores=old.scores, n_tokens=old.n_tokens, llama_state=bytes(data),
                                 llama_state_size=len(data), seed=old.seed)

    def __setitem__(self, key: SequenceOf[int], value: Any) -> None:
        """Stores a ``LlamaState``. ``Unimplemented`` and ``InvalidArgument`` for states that are not keys and values alone."""
        data = value.llama_state
        state = parse_state(data)
        tokens = np.array(value.input_ids[: value.n_tokens], np.int32)
        with self._lock:
            parent, shared = self._parent(state, tokens)
            while True:
                try:
                    sequences = store_rows(self.pool, self._shape, state, data, self._settings,
                                           parent.sequences if parent else None, shared)
                    break
                except ResourceExhausted as error:
                    # The one it grows from goes last.
                    victims = [entry for entry in self._entries if entry is not parent] or self._entries
                    if not victims:
                        warnings.warn(f"a state of {len(tokens)} tokens has no room in the pool: {error}", RuntimeWarning,
                                      stacklevel=2)
                        return
                    if victims[0] is parent:
                        parent, shared = None, 0
                    self._entries.remove(victims[0])
                    victims[0].close()
                except InvalidArgument:
                    raise
                except KvtideError as error:
                    warnings.warn(f"a state of {len(tokens)} tokens was not stored: {error}", RuntimeWarning, stacklevel=2)
                    return
            for entry in [entry for entry in self._entries if np.array_equal(entry.tokens, tokens)]:
                self._entries.remove(entry)
                entry.close()
            self._entries.append(_Entry(tokens, state, sequences, self._light(value)))
            while self.capacity_bytes is not None and len(self._entries) > 1 and self._size() > self.capacity_bytes:
                self._entries.pop(0).close()

    def _parent(self, state: State, tokens: np.ndarray) -> Tuple[Optional[_Entry], int]:
        """The entry with whose first blocks the new state begins, and how many tokens they are."""
        if not state.parts or not all(part.plain and len(part.positions) == len(tokens) for part in state.parts):
            return None, 0
        entry, common = self._find(tokens.tolist())
        if entry is None or len(entry.state.parts) != len(state.parts):
            return None, 0
        if not all(part.plain and len(part.positions) == len(entry.tokens) for part in entry.state.parts):
            return None, 0
        shared = common // _BLOCK * _BLOCK
        return (entry, shared) if shared > 0 else (None, 0)

    def _light(self, value: Any) -> Any:
        scores = value.scores
        if not self._keep_scores and scores is not None:
            # One row stands for all when the state is loaded.
            scores = np.zeros((1, scores.shape[1]), scores.dtype)
        input_ids = np.full_like(value.input_ids, -1)
        input_ids[: value.n_tokens] = value.input_ids[: value.n_tokens]
        return type(value)(input_ids=input_ids, scores=scores, n_tokens=value.n_tokens, llama_state=b"", llama_state_size=0,
                           seed=value.seed)
