"""The state that llama.cpp writes of its memory, taken apart into rows of keys and values, and put together again.

What `llama_state_get_data` (a whole context) and `llama_state_seq_get_data` (one sequence) write, little-endian, in
llama.cpp's `llama_kv_cache::state_write`:

    [u32 length, architecture]                              a whole context only
    then for each cache (sliding layers have one of their own):
      u32 streams, and for each stream:
        u32 cells                                           0: nothing follows
        cells x (i32 position, u32 n, [x, y, token], n x i32 sequence)
        u32 values transposed, u32 layers, and in some versions u32 u32: by how much the rows of K and V are rotated, 0 = not
        layers x (i32 type, u64 bytes of a row, cells x row of keys)
        layers x (i32 type, u64 bytes of a row, cells x row of values)
                 or, transposed, (i32 type, u32 bytes of a value, u32 width, width x cells values)

A :class:`State` remembers everything but the rows: with the rows that it was taken apart into it gives the same bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

import numpy as np

from ..errors import InvalidArgument, KvtideError, Unimplemented

# ggml's numbers of types whose rows are plain numbers.
_TYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_NAMES = {2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 20: "iq4_nl", 30: "bf16"}
_WANTED = ("only f16 and f32 caches are taken, since llama.cpp rotates the rows of quantised ones; load the model with type_k and "
           "type_v f16 (llama-server: -ctk f16 -ctv f16) and let the pair of the pool compress them")
# A cell of a model with positions in several dimensions also has those, and in newer versions its token.
_CELL_EXTRAS = (0, 12, 8)


@dataclass(frozen=True)
class Rows:
    """Where the keys or the values of one layer lie: ``cells`` rows of ``width`` numbers."""

    offset: int
    dtype: np.dtype
    cells: int
    width: int
    transposed: bool

    @property
    def bytes(self) -> int:
        return self.cells * self.width * self.dtype.itemsize

    def of(self, buffer: Any) -> np.ndarray:
        """A view of the rows in the bytes of a state: ``[cells, width]``."""
        flat = np.frombuffer(buffer, self.dtype, self.cells * self.width, self.offset)
        return flat.reshape(self.width, self.cells).T if self.transposed else flat.reshape(self.cells, self.width)


@dataclass
class Part:
    """One cache: the positions of its cells, in the order of the rows, and the rows of its layers."""

    positions: np.ndarray
    keys: List[Rows] = field(default_factory=list)
    values: List[Rows] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """The cells are the tokens 0, 1, 2, ..., in order."""
        return bool(np.array_equal(self.positions, np.arange(len(self.positions))))


@dataclass
class State:
    """A state without its rows."""

    size: int
    architecture: str  # empty: not in the state
    parts: List[Part]
    gaps: List[Tuple[int, bytes]]  # what lies between the rows

    def empty(self) -> bytearray:
        """The bytes of the state with rows of zeros, to be filled by ``rows.of(buffer)[:] = ...``."""
        buffer = bytearray(self.size)
        for offset, data in self.gaps:
            buffer[offset : offset + len(data)] = data
        return buffer


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0
        self.gaps: List[Tuple[int, bytes]] = []
        self.gap = 0

    def take(self, count: int) -> int:
        start = self.at
        if count < 0 or start + count > len(self.data):
            raise InvalidArgument(f"the state ends at byte {len(self.data)}; {count} bytes were expected from {start} on")
        self.at = start + count
        return start

    def number(self, form: str) -> int:
        return int(struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0])

    def rows(self, dtype: np.dtype, cells: int, width: int, transposed: bool) -> Rows:
        self.close_gap()
        rows = Rows(self.at, dtype, cells, width, transposed)
        self.take(rows.bytes)
        self.gap = self.at
        return rows

    def close_gap(self) -> None:
        if self.at > self.gap:
            self.gaps.append((self.gap, bytes(self.data[self.gap : self.at])))
        self.gap = self.at


def _row_type(number: int, what: str) -> np.dtype:
    if number in _TYPES:
        return _TYPES[number]
    if number not in _NAMES:
        raise InvalidArgument(f"{what} have the type {number}")
    raise Unimplemented(f"{what} are stored as {_NAMES[number]}: {_WANTED}")


def _skip_rotations(reader: _Reader) -> None:
    """Two words that some versions write before the layers: sizes of the Hadamard matrices that rotate the rows of quantised
    caches. A layer begins with a type, which is small, and the bytes of a row, which are not 0."""
    if reader.at + 12 > len(reader.data):
        return
    first, second, third = struct.unpack_from("<III", reader.data, reader.at)
    known = first in _TYPES or first in _NAMES
    if known and not (first == 0 and (second == 0 or third != 0)):
        return
    if first > 1 << 16 or second > 1 << 16:
        raise InvalidArgument(f"the layers begin with {first}, {second}, {third}")
    if first or second:
        raise Unimplemented(f"the rows of K and V are rotated by matrices of {first} and {second}: {_WANTED}")
    reader.take(8)


def _flag(reader: _Reader, what: str) -> bool:
    value = reader.number("<I")
    if value > 1:
        raise InvalidArgument(f"{what} is {value}, neither 0 nor 1")
    return value == 1


def _cells(reader: _Reader, extra: int) -> np.ndarray:
    count = reader.number("<I")
    if count > len(reader.data) // 8:
        raise InvalidArgument(f"{count} cells are more than the state has room for")
    # Cells of one sequence each, as nearly all states have them.
    width = 3 + extra // 4
    if count > 0 and 4 * count * width <= len(reader.data) - reader.at:
        cells = np.frombuffer(reader.data, "<i4", count * width, reader.at).reshape(count, width)
        if (cells[:, 1] == 1).all() and (cells[:, 0] >= 0).all():
            reader.take(cells.nbytes)
            return cells[:, 0].astype(np.int32)
    positions = np.empty(count, np.int32)
    for i in range(count):
        positions[i] = reader.number("<i")
        sequences = reader.number("<I")
        if positions[i] < 0 or sequences > 1 << 16:
            raise InvalidArgument(f"cell {i} has the position {positions[i]} and {sequences} sequences")
        reader.take(extra + 4 * sequences)
    return positions


def _stream(reader: _Reader, extra: int) -> Optional[Part]:
    part = Part(_cells(reader, extra))
    cells = len(part.positions)
    if cells == 0:
        return None
    transposed = _flag(reader, "the mark of transposed values")
    layers = reader.number("<I")
    if not 0 < layers <= 1 << 12:
        raise InvalidArgument(f"{layers} layers")
    _skip_rotations(reader)
    for layer in range(layers):
        dtype = _row_type(reader.number("<i"), f"keys of layer {layer}")
        row = reader.number("<Q")
        if row == 0 or row % dtype.itemsize or row > 1 << 24:
            raise InvalidArgument(f"a row of keys of layer {layer} has {row} bytes")
        part.keys.append(reader.rows(dtype, cells, row // dtype.itemsize, False))
    for layer in range(layers):
        dtype = _row_type(reader.number("<i"), f"values of layer {layer}")
        if transposed:
            size, width = reader.number("<I"), reader.number("<I")
            if size != dtype.itemsize:
                raise InvalidArgument(f"a value of layer {layer} has {size} bytes")
        else:
            row = reader.number("<Q")
            width = row // dtype.itemsize if row % dtype.itemsize == 0 else 0
        if not 0 < width <= 1 << 22:
            raise InvalidArgument(f"rows of values of layer {layer} have {width} numbers")
        part.values.append(reader.rows(dtype, cells, width, transposed))
    return part


def _parse(data: memoryview, whole: bool, extra: int) -> State:
    reader = _Reader(data)
    architecture = ""
    if whole:
        length = reader.number("<I")
        if length > 256:
            raise InvalidArgument(f"the name of the architecture has {length} bytes; is this the state of a whole context?")
        start = reader.take(length)
        architecture = bytes(data[start : start + length]).decode("utf-8", "replace")
    parts: List[Part] = []
    while reader.at < len(data):
        streams = reader.number("<I")
        if not 0 < streams <= 1 << 10:
            raise InvalidArgument(f"{streams} streams at byte {reader.at - 4}")
        parts.extend(part for part in (_stream(reader, extra) for _ in range(streams)) if part is not None)
    reader.close_gap()
    return State(len(data), architecture, parts, reader.gaps)


def parse_state(data: Any, *, whole: bool = True) -> State:
    """Takes the bytes of a state apart.

    Args:
        data: bytes of ``llama_state_get_data`` (``whole``) or ``llama_state_seq_get_data``.
        whole: the state of a context, as ``llama_cpp.Llama.save_state`` has it; False = of one sequence, as slot files have it.

    Raises:
        Unimplemented: a cache type whose rows are not plain numbers (quantised caches, bf16).
        InvalidArgument: something else than keys and values, such as the memory of recurrent layers, or damaged bytes.
    """
    view = memoryview(data).cast("B")
    errors: List[KvtideError] = []
    for extra in _CELL_EXTRAS:
        try:
            return _parse(view, whole, extra)
        except (InvalidArgument, Unimplemented) as error:
            errors.append(error)
    for error in errors:
        if isinstance(error, Unimplemented):
            raise error
    raise InvalidArgument(f"not a state of keys and values alone, or a damaged one (the memory of recurrent layers is not "
                          f"taken): {errors[0]}")
