"""States of llama.cpp made by hand, as `llama_state_get_data` writes them, and a stand-in for llama_cpp.LlamaState."""
import struct

import numpy as np


class LlamaState:
    """The fields of llama_cpp.llama.LlamaState."""

    def __init__(self, input_ids, scores, n_tokens, llama_state, llama_state_size, seed):
        self.input_ids, self.scores, self.n_tokens = input_ids, scores, n_tokens
        self.llama_state, self.llama_state_size, self.seed = llama_state, llama_state_size, seed


def cells(positions, extra=0, sequence=0):
    return b"".join(struct.pack("<iI", p, 1) + b"\7" * extra + struct.pack("<i", sequence) for p in positions)


def cache(keys, values, positions=None, *, transposed=False, dtype="<f2", number=1, extra=0, rotations=None):
    """One KV cache; keys and values: [layers][tokens][width]."""
    count = len(keys[0])
    positions = range(count) if positions is None else positions
    out = struct.pack("<II", 1, count) + cells(positions, extra) + struct.pack("<II", int(transposed), len(keys))
    if rotations is not None:
        out += struct.pack("<II", *rotations)
    for rows in keys:
        out += struct.pack("<iQ", number, rows.shape[1] * np.dtype(dtype).itemsize) + rows.astype(dtype).tobytes()
    for rows in values:
        if transposed:
            out += struct.pack("<iII", number, np.dtype(dtype).itemsize, rows.shape[1])
            out += np.ascontiguousarray(rows.T.astype(dtype)).tobytes()
        else:
            out += struct.pack("<iQ", number, rows.shape[1] * np.dtype(dtype).itemsize) + rows.astype(dtype).tobytes()
    return out


def whole(*caches, architecture=b"llama"):
    return struct.pack("<I", len(architecture)) + architecture + b"".join(caches)


def rows(layers, tokens, width, seed=0):
    return list(np.random.default_rng(seed).standard_normal((layers, tokens, width)).astype(np.float16))


def state(tokens, data, vocabulary=8):
    ids = np.zeros(len(tokens) + 100, np.intc)
    ids[: len(tokens)] = tokens
    return LlamaState(ids, np.ones((len(tokens), vocabulary), np.float32), len(tokens), data, len(data), 3)
