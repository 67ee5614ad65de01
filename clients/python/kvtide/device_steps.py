"""Steps on the pool's device: an engine attends over a mapped pool with tensors where it has them.

>>> import numpy as np, kvtide
>>> pool = kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory=0, direct_device="cpu")
>>> model = pool.register("steps", [kvtide.Layer(kv_heads=2, head_dim=64, query_heads=4)] * 2)
>>> sequence = pool.create(model, pair="q8_0/turbo4")
>>> steps = pool.device_steps(model, "q8_0/turbo4", dtype="float32", max_new_tokens=128, max_sequence_tokens=4096)
>>> rows = lambda heads: np.ones((100, heads, 64), np.float32)
>>> with steps.step([(sequence, 100)]) as step:              # new tokens of each sequence
...     for layer in range(2):
...         output = step.append_attend(layer, rows(4), rows(2), rows(2))
>>> output.shape, len(sequence)
((100, 4, 64), 100)

On a GPU the arrays are torch tensors (or anything with ``__cuda_array_interface__``), work goes to torch's current stream, and
a step talks to the pool twice: where it begins and where it ends. Memory that the caller frees before the step has ended has to be
freed in the order of that stream, as torch does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Iterable, List, Optional, Tuple, Union

import numpy as np

from ._arrays import is_torch
from .errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from .pool import Pool, Sequence

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CUDA_TYPES = {"<f4": "float32", "<f2": "float16"}
_PREFILL_BYTES = 128 << 20


class _Rows:
    """An array as the kernels take it: an address, the distance of its rows in elements, and its shape."""

    def __init__(self, array: Any, name: str, dtype: str, on_gpu: bool) -> None:
        if is_torch(array):
            address, found = array.data_ptr(), str(array.dtype).replace("torch.", "")
            shape, strides, here = tuple(array.shape), tuple(array.stride()), array.device.type == "cuda"
        elif hasattr(array, "__cuda_array_interface__"):
            about = array.__cuda_array_interface__
            found, shape, here = _CUDA_TYPES.get(about["typestr"], about["typestr"]), tuple(about["shape"]), True
            size = np.dtype(about["typestr"]).itemsize
            strides = tuple(n // size for n in about["strides"]) if about.get("strides") else _dense(shape)
            address = about["data"][0]
        elif isinstance(array, np.ndarray):
            address, found, shape, here = array.ctypes.data, array.dtype.name, array.shape, False
            strides = tuple(n // array.itemsize for n in array.strides)
        else:
            raise InvalidArgument(f"{name} is a {type(array).__name__}; use a torch tensor, a NumPy array or an array of a GPU")
        if here != on_gpu:
            raise InvalidArgument(f"{name} lies {'on a GPU' if here else 'in host memory'}, the pool "
                                  f"{'on a GPU' if on_gpu else 'in host memory'}")
        if found != dtype:
            raise InvalidArgument(f"{name} is {found}; these steps are for {dtype}")
        if len(shape) != 3:
            raise InvalidArgument(f"{name} has the shape {list(shape)}; expected [tokens, heads, head_dim]")
        if (shape[2] > 1 and strides[2] != 1) or (shape[1] > 1 and strides[1] != shape[2]):
            raise InvalidArgument(f"{name}: the heads of a token lie side by side; only the distance of tokens is free")
        self.address, self.shape = address, shape
        self.stride = strides[0] if shape[0] > 1 else shape[1] * shape[2]


def _dense(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


class DeviceSteps:
    """Makes steps over the sequences of one model; made by :meth:`kvtide.Pool.device_steps`. Not thread-safe.

    Args:
        pool: embedded on one device, or reached directly; with a ``direct_device``.
        model: registered with this pool.
        pair: K and V types of the sequences, ``"q8_0/turbo4"`` or several such names; a step may have sequences of all of them.
            None: as they come, which takes memory in the step that brings a new one. Not ``tide``.
        dtype: of q, k, v and results: ``"bfloat16"``, ``"float16"``, ``"float32"``.
        max_sequences: of a step.
        max_new_tokens: of all sequences of a step; 0 = ``max_sequences``.
        max_sequence_tokens: of a sequence, the new ones included.
        max_seals: full blocks that a step codes; others wait for the next one. 0 = those that it fills, and one for each sequence.
        prefill_bytes: device memory for decoded pages of steps with several new tokens of a sequence (CUDA).
        scale, softcap: instead of those that the layers were registered with.

    Raises:
        FailedPrecondition: the pool is not mapped into this process, or on several devices.
        InvalidArgument, Unimplemented: shapes or pairs without kernels.
        ResourceExhausted: no device memory for the tables.
    """

    def __init__(
        self,
        pool: "Pool",
        model: str,
        pair: Union[str, Iterable[str], None] = None,
        *,
        dtype: str = "bfloat16",
        max_sequences: int = 64,
        max_new_tokens: int = 0,
        max_sequence_tokens: int = 8192,
        max_seals: int = 0,
        prefill_bytes: int = _PREFILL_BYTES,
        scale: Optional[float] = None,
        softcap: Optional[float] = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise InvalidArgument(f"dtype is {dtype!r}; use one of {', '.join(map(repr, _DTYPES))}")
        pool._layer_count(model)
        tokens = max(max_new_tokens, max_sequences)
        pairs = [pair] if isinstance(pair, str) else list(pair or ())
        spec = {"pairs": pairs, "dtype": _DTYPES[dtype], "max_sequences": max_sequences, "max_new_tokens": tokens,
                "max_sequence_tokens": max_sequence_tokens, "max_seals": max_seals or tokens // 64 + max_sequences,
                "prefill_bytes": prefill_bytes if tokens > max_sequences else 0, "scale": scale, "softcap": softcap}
        self.pool = pool
        self.model = model
        self.dtype = dtype
        self.max_sequences, self.max_new_tokens, self.max_sequence_tokens = max_sequences, tokens, max_sequence_tokens
        self._layers = pool._models[model]
        self._on_gpu = pool.direct_device.startswith("cuda")
        self._core = pool._core.open_device_steps(model, pool._wires[model], spec)

    def _stream(self, stream: Optional[int]) -> int:
        torch = sys.modules.get("torch")
        if stream is not None or torch is None or not self._on_gpu:
            return stream or 0
        return int(torch.cuda.current_stream(self.pool.direct_device).cuda_stream)

    @property
    def device_bytes(self) -> int:
        """Memory on the device beside the pool."""
        return int(self._core.bytes)

    def step(self, items: Iterable[Tuple["Sequence", int]], *, token_ids: Optional[Iterable[Optional[Any]]] = None,
             stream: Optional[int] = None) -> "Step":
        """Begins a step: ``(sequence, new tokens)`` of each. Its blocks are reserved, and neither moved nor given away until it
        ends. Rows of q, k and v are the new tokens of the items, one item after the other.

        Args:
            token_ids: what the new tokens of each item are, as in :meth:`Sequence.append`; None = not said, or said by :meth:`Step.end`.
            stream: a ``cudaStream_t`` as an integer; None = torch's current one, the default stream without torch.

        Raises:
            Aborted: another writer is at one of the sequences.
            Unimplemented: what this way does not read, such as a sliding window behind exact first blocks.
        """
        return Step(self, list(items), token_ids, stream)

    def pin(self, items: Iterable[Tuple["Sequence", int]], *, prefix: int = 0, stream: Optional[int] = None) -> "PinnedStep":
        """For whoever only reads: attention of ``(sequence, queries)`` at the end of each sequence as it is now, or of its first
        ``prefix`` tokens, whoever writes to it, cuts or closes it meanwhile. Nobody is kept from writing.

        Raises:
            OutOfRange: queries that see tokens which have left a sliding window.
        """
        return PinnedStep(self, list(items), prefix, stream)


class Step:
    """An open step: a context manager that ends it, or takes it back after an exception."""

    def __init__(self, steps: DeviceSteps, items: List[Tuple["Sequence", int]], token_ids: Optional[Iterable[Optional[Any]]],
                 stream: Optional[int]) -> None:
        self._steps, self._items, self._open = steps, items, True
        self.tokens = sum(count for _, count in items)
        #: Position of the first new token of each item.
        self.starts: List[int] = steps._core.begin([(sequence.id, count) for sequence, count in items],
                                                   self._named(token_ids), steps._stream(stream))

    def _named(self, token_ids: Optional[Iterable[Optional[Any]]]) -> List[List[int]]:
        from .pool import _named

        said = [None] * len(self._items) if token_ids is None else list(token_ids)
        if len(said) != len(self._items):
            raise InvalidArgument(f"token ids of {len(said)} items, the step has {len(self._items)}")
        return [_named(ids, count, f"items[{i}]") for i, (ids, (_, count)) in enumerate(zip(said, self._items))]

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, kind: Any, *exc: object) -> None:
        if self._open:
            self.end() if kind is None else self.roll_back()

    def _rows(self, array: Any, name: str, heads: int, width: int) -> _Rows:
        rows = _Rows(array, name, self._steps.dtype, self._steps._on_gpu)
        if rows.shape != (self.tokens, heads, width):
            raise InvalidArgument(f"{name} has the shape {list(rows.shape)}; expected {[self.tokens, heads, width]}")
        return rows

    def _layer(self, layer: int) -> Any:
        if not self._open:
            raise FailedPrecondition("the step has ended")
        if not 0 <= layer < len(self._steps._layers):
            raise InvalidArgument(f"layer is {layer}; the model has layers 0 to {len(self._steps._layers) - 1}")
        return self._steps._layers[layer]

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Writes the new rows ``k [tokens, kv_heads, head_dim]`` and ``v [tokens, kv_heads, head_dim_v]`` of a layer. Values beyond
        float16 become its largest, what is no number becomes 0."""
        self._steps._core.write(layer, *self._pairs(layer, k, v))

    def attend(self, layer: int, q: Any, *, out: Any = None) -> Any:
        """Each of ``q [tokens, query_heads, head_dim]`` sees its sequence up to itself. Returns ``[tokens, query_heads, head_dim_v]``
        in memory of its own or in ``out``."""
        out, asked = self._attended(layer, q, out)
        self._steps._core.attend(layer, *asked, 0)
        return out

    def append_attend(self, layer: int, q: Any, k: Any, v: Any, *, out: Any = None) -> Any:
        """:meth:`append`, then :meth:`attend`, sooner than both."""
        written = self._pairs(layer, k, v)
        out, asked = self._attended(layer, q, out)
        self._steps._core.write_attend(layer, *written, *asked)
        return out

    def _pairs(self, layer: int, k: Any, v: Any) -> Tuple[int, int, int, int]:
        shape = self._layer(layer)
        keys = self._rows(k, "k", shape.kv_heads, shape.head_dim)
        values = self._rows(v, "v", shape.kv_heads, shape.head_dim_v or shape.head_dim)
        return keys.address, keys.stride, values.address, values.stride

    def _attended(self, layer: int, q: Any, out: Any) -> Tuple[Any, Tuple[int, int, int, int]]:
        shape = self._layer(layer)
        heads = shape.query_heads or shape.kv_heads
        queries = self._rows(q, "q", heads, shape.head_dim)
        if out is None:
            out = _empty_like(q, (self.tokens, heads, shape.head_dim_v or shape.head_dim))
        result = self._rows(out, "out", heads, shape.head_dim_v or shape.head_dim)
        return out, (queries.address, queries.stride, result.address, result.stride)

    def end(self, token_ids: Optional[Iterable[Optional[Any]]] = None) -> None:
        """Codes full blocks, waits for the device and makes the new tokens count, in all layers. All layers have to be written.

        Args:
            token_ids: of items whose ids were not known when the step began; None = not said.
        """
        named = self._named(token_ids)
        self._close()
        self._steps._core.end(named)
        for (sequence, count), start in zip(self._items, self.starts):
            sequence._lengths = [start + count] * len(sequence._lengths)

    def roll_back(self) -> None:
        """Takes the step back: the sequences are as they were."""
        self._close()
        self._steps._core.roll_back()

    def _close(self) -> None:
        if not self._open:
            raise FailedPrecondition("the step has ended")
        self._open = False


class PinnedStep(Step):
    """An open step that only reads: :meth:`attend`, and the end of the block lets go of it."""

    def __init__(self, steps: DeviceSteps, items: List[Tuple["Sequence", int]], prefix: int, stream: Optional[int]) -> None:
        self._steps, self._items, self._open = steps, items, True
        self.tokens = sum(count for _, count in items)
        #: Position of the first query of each item.
        self.starts = steps._core.pin([(sequence.id, count, prefix) for sequence, count in items], steps._stream(stream))

    def append(self, layer: int, k: Any, v: Any) -> None:
        """Not here: FailedPrecondition."""
        raise FailedPrecondition("the step is pinned: it takes no rows")

    def append_attend(self, layer: int, q: Any, k: Any, v: Any, *, out: Any = None) -> Any:
        """Not here: FailedPrecondition."""
        raise FailedPrecondition("the step is pinned: it takes no rows")

    def end(self, token_ids: Optional[Iterable[Optional[Any]]] = None) -> None:
        """Waits for the device and lets go of the sequences."""
        if token_ids is not None:
            raise InvalidArgument("a pinned step has no new tokens")
        self._close()
        self._steps._core.end([])


def _empty_like(array: Any, shape: Tuple[int, ...]) -> Any:
    if is_torch(array):
        return array.new_empty(shape)
    if isinstance(array, np.ndarray):
        return np.empty(shape, array.dtype)
    raise InvalidArgument(f"give out=: this module makes no {type(array).__name__}")
