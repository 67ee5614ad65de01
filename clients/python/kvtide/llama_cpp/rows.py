"""Rows of a state into sequences of a pool, and back."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import numpy as np

from ..pool import Pool, Sequence
from .geometry import ModelShape
from .state import Part, Rows, State

_TOKENS_AT_ONCE = 4096


def _heads(rows: Rows, buffer: Any, first: int, end: int, heads: int) -> np.ndarray:
    view = rows.of(buffer)[first:end].reshape(end - first, heads, rows.width // heads)
    return np.require(view, requirements=["A", "C"])


def _append(sequence: Sequence, part: Part, layers: List[Any], data: Any, first: int) -> None:
    cells = len(part.positions)
    for begin in range(first, cells, _TOKENS_AT_ONCE):
        end = min(cells, begin + _TOKENS_AT_ONCE)
        sequence.append_layers({
            layer: (_heads(keys, data, begin, end, layers[layer].kv_heads), _heads(values, data, begin, end, layers[layer].kv_heads))
            for layer, (keys, values) in enumerate(zip(part.keys, part.values))
        }, start=begin)


def store_rows(pool: Pool, shape: ModelShape, state: State, data: Any, settings: Dict[str, Any],
               grown_from: Optional[List[Sequence]] = None, shared: int = 0) -> List[Sequence]:
    """Puts the rows of each part of a state into a sequence. The first ``shared`` tokens come from ``grown_from``, whose blocks
    are shared."""
    sequences: List[Sequence] = []
    try:
        for place, part in enumerate(state.parts):
            layers = shape.layers(part)
            model = pool.register(shape.name(layers), layers)
            if grown_from is not None and shared > 0:
                sequences.append(grown_from[place].fork())
                sequences[-1].truncate(shared)
            else:
                sequences.append(pool.create(model, rope_pairs=shape.rope_pairs, **settings))
            _append(sequences[-1], part, layers, data, shared)
    except BaseException:
        for sequence in sequences:
            sequence.close()
        raise
    return sequences


def load_rows(state: State, sequences: List[Sequence]) -> bytearray:
    """The bytes of the state with the rows as the sequences have them."""
    buffer = state.empty()
    for part, sequence in zip(state.parts, sequences):
        for layer, (keys, values) in enumerate(zip(part.keys, part.values)):
            k, v = sequence.read(layer, tokens=len(part.positions), like=np.empty(0, keys.dtype))
            keys.of(buffer)[:] = k.reshape(keys.cells, keys.width)
            values.of(buffer)[:] = v.reshape(values.cells, values.width)
    return buffer
