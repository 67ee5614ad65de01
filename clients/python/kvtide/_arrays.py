"""Arrays of the caller: NumPy, torch and whatever speaks DLPack, made ready for the compiled part.

Host memory that is dense and row-major goes through without a copy. Tensors on a GPU are copied to the host; results go
back to where the queries came from.
"""

from __future__ import annotations

import sys
from typing import Any, Sequence, Tuple

import numpy as np

from .errors import InvalidArgument

_NUMPY_TYPES = ("float32", "float16")


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def borrow(array: Any, name: str) -> Any:
    """The array as the compiled part takes it: float32, float16 or bfloat16, in host memory, dense.

    ``ml_dtypes.bfloat16`` arrays are handed over as their bits, since NumPy has no type of its own for them.
    """
    if is_torch(array):
        torch = sys.modules["torch"]
        if array.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InvalidArgument(f"{name} is {array.dtype}; use float32, float16 or bfloat16")
        return array.detach().cpu().contiguous()
    if not isinstance(array, np.ndarray):
        if not hasattr(array, "__dlpack__"):
            raise InvalidArgument(f"{name} is a {type(array).__name__}; use a NumPy array, a torch tensor or a DLPack object")
        array = np.from_dlpack(array)
    if array.dtype.name == "bfloat16":
        return np.ascontiguousarray(array).view(np.uint16)
    if array.dtype.name not in _NUMPY_TYPES:
        raise InvalidArgument(f"{name} is {array.dtype}; use float32, float16 or bfloat16")
    return np.ascontiguousarray(array)


def floats(array: Any, name: str) -> np.ndarray:
    """The array as dense float32 in host memory."""
    array = borrow(array, name)
    if is_torch(array):
        return array.float().numpy()
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def vector(values: Any) -> np.ndarray:
    """A few numbers of any kind as dense float32."""
    if is_torch(values):
        values = values.detach().cpu().float().numpy()
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1)


def check_rank(array: Any, name: str) -> Tuple[int, ...]:
    shape = tuple(int(n) for n in array.shape)
    if len(shape) != 3:
        raise InvalidArgument(f"{name} has the shape {list(shape)}; expected [tokens, heads, head_dim]")
    return shape


def new_output(like: Any, shape: Sequence[int]) -> Any:
    """Uninitialised float32 memory of the kind of ``like``, in host memory."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(tuple(shape), dtype=torch.float32)
    return np.empty(tuple(shape), dtype=np.float32)


def new_rows(like: Any, shape: Sequence[int]) -> Any:
    """Uninitialised memory of the framework and dtype of ``like`` on the host; None = NumPy float32."""
    if is_torch(like):
        return sys.modules["torch"].empty(tuple(shape), dtype=like.dtype)
    return np.empty(tuple(shape), dtype=np.float32 if like is None else like.dtype)


def finish_rows(rows: Any, like: Any) -> Any:
    return rows.to(like.device) if is_torch(like) else rows


def writable(array: Any, name: str) -> Any:
    """The array as memory that the compiled part writes into."""
    if not is_torch(array) and not isinstance(array, np.ndarray):
        raise InvalidArgument(f"{name} is a {type(array).__name__}; use a NumPy array or a torch tensor")
    dense = array.is_contiguous() if is_torch(array) else array.flags.c_contiguous and array.flags.writeable
    if not dense or (is_torch(array) and array.device.type != "cpu"):
        raise InvalidArgument(f"{name} is not dense memory of the host that can be written")
    return borrow(array, name)


def finish_output(output: Any, like: Any, keep_float32: bool = False) -> Any:
    """The float32 result in the dtype and on the device of ``like``."""
    if is_torch(like):
        return output.to(device=like.device, dtype=output.dtype if keep_float32 else like.dtype)
    dtype = getattr(like, "dtype", None)
    if keep_float32 or not isinstance(dtype, np.dtype) or dtype == np.float32:
        return output
    return output.astype(dtype)
